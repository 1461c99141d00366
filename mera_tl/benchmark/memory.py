"""How much memory and disk a run will take, before any weight is loaded.

Weights, the key-value cache and the files of activations are counted exactly, from the shapes of a
model without weights and from the tokens of the task; what passes through a block is a formula,
within a third of what profiles of four architectures showed.
"""

import shutil
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from mera_tl import storage
from mera_tl.benchmark.config import RunConfig
from mera_tl.benchmark.duration import FAMILY_PASSES
from mera_tl.benchmark.resources import SPARE, free_memory
from mera_tl.benchmark.run import Run
from mera_tl.inference.activations import positions_of
from mera_tl.inference.answers import ReadSettings, by_length
from mera_tl.inference.evaluation import tokenize_task
from mera_tl.methods.race import Choices
from mera_tl.models.loading import load_model, require_devices
from mera_tl.models.model import Model
from mera_tl.steering.many import CACHED

RECORDS = 1 << 20
"""Bytes of a run's other files: probes, outcomes, certificates, what a search tried."""
GPU_TOKENS = 16384
"""Tokens a batch that keep a GPU busy; more only take memory."""


@dataclass(frozen=True)
class Estimate:
    """Bytes, and what they are compared with."""

    title: str
    weights: int
    """On the device, or on all devices together."""
    cache: int
    """Keys and values of the largest batch, every token decoded."""
    passing: int
    """What lives at once inside a block while the largest batch passes, cache not counted."""
    copies: int
    """Caches of their own for the prompts that a search moves as a whole."""
    kept: int
    """What examples that choose and certify leave unsteered, kept for all methods; less where there
    is less."""
    process: int
    """Python and its libraries, where they share the device's memory."""
    batch: str
    """The largest batch, in words."""
    activations: int
    """The file of the training split's activations."""
    collected: str
    """What that file holds, in words."""
    free: int
    """Of the device's memory."""
    free_disk: int
    batch_tokens: int | None
    """What the batches may hold, where rows were not asked for."""
    on_gpu: bool

    @property
    def device(self) -> int:
        """Bytes on the device at most: in main memory, of the whole process."""
        batch = self.cache + self.passing + self.copies
        return self.process + self.weights + batch + self.kept

    @property
    def disk(self) -> int:
        """Bytes of the run's folder."""
        return self.activations + RECORDS

    @property
    def fits(self) -> bool:
        """Whether the run fits into what is free now."""
        return self._wanted <= self.free and self.disk <= self.free_disk

    @property
    def advice(self) -> str:
        """What to do about it, in one sentence."""
        if self.disk > self.free_disk:
            return "The activations do not fit on the disk: collect fewer with --train, or move."
        if self.weights > self.free:
            return (
                "The weights alone do not fit: take --dtype bfloat16, spread them with --n-devices "
                "N, or choose a smaller model."
            )
        if self._wanted > self.free:
            rows = self.batch_tokens is None
            smaller = "a smaller --batch-size" if rows else f"--batch-tokens {self._most_tokens}"
            return f"The largest batch does not fit: pass {smaller}."
        if self.on_gpu and (self.batch_tokens or GPU_TOKENS) < min(GPU_TOKENS, self._most_tokens):
            most = min(GPU_TOKENS, self._most_tokens)
            return f"This fits; a GPU is faster with --batch-tokens {most}."
        return "This fits."

    @property
    def _wanted(self) -> int:
        """Bytes that are not taken yet."""
        return self.device - self.process - self.kept

    @property
    def _most_tokens(self) -> int:
        """Tokens a batch that leave a tenth of what is free now beside the weights."""
        batch = self.cache + self.passing + self.copies
        share = 0.9 * (self.free - self.weights) / batch
        # Of long prompts, twice the tokens hold up to four times the rows.
        return max(1, int(min(share, share**0.5) * (self.batch_tokens or 0)))

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the sums among them."""
        return {
            **asdict(self),
            "device": self.device,
            "disk": self.disk,
            "fits": self.fits,
            "advice": self.advice,
        }

    def __str__(self) -> str:
        rows = [
            ("weights", self.weights, "twice that in main memory while a checkpoint is read"),
            ("cache of a batch", self.cache, self.batch),
            ("passing activations", self.passing, "of the same batch"),
            ("copies of caches", self.copies, "where a search moves whole prompts"),
            ("kept for reuse", self.kept, "what examples leave unsteered, for all methods"),
            ("Python, libraries", self.process, "taken already"),
            ("memory in all", self.device, f"at most; {human(self.free)} free now"),
            ("files on disk", self.disk, self.collected),
            ("disk", self.free_disk, "free here"),
        ]
        lines = [f"  {what:<20}{human(size):>10}   {note}" for what, size, note in rows]
        wrap = textwrap.TextWrapper(width=80, subsequent_indent=" " * 35)
        return "\n".join([self.title, *map(wrap.fill, lines), textwrap.fill(self.advice, 80)])


def planned(config: RunConfig, folder: Path | None = None) -> Run:
    """Return a run to check and to estimate: its model has every shape and no weights."""
    return Run(config, folder or Path(), progress=False, load=_outline)


def estimate(run: Run) -> Estimate:
    """Estimate what a run will take, of which `planned` tells enough.

    Raises:
        ValueError: as loading the model's configuration and the task.
    """
    config, model, settings = run.config, run.model, run.read
    prompts = [p for split in run.splits for p in tokenize_task(model, split, settings)]
    batches = [(len(b), len(prompts[b[0]])) for b in by_length(prompts, settings)]
    new = settings.n_new if settings.decodes else 0
    copied = min(settings.batch_tokens, sum(map(len, prompts)))
    rows, columns = max(
        batches, key=lambda b: cache_bytes(model, b[0], b[1] + new) + passing_bytes(model, *b)
    )
    train, positions = run.splits.train, positions_of(settings)
    device = _device(config)
    free = free_memory(device, config.n_devices)
    judged = FAMILY_PASSES * Choices().search_share * len(train)
    known = len(run.splits.calibration) + round(judged)
    return Estimate(
        title=f"{model.name} in {config.dtype} on {device}, {train.name}:",
        weights=weight_bytes(model),
        cache=cache_bytes(model, rows, columns + new),
        passing=passing_bytes(model, rows, columns),
        copies=CACHED * cache_bytes(model, 1, copied),
        kept=min(int(SPARE * free), cache_bytes(model, known, columns + new)),
        process=0 if device.startswith("cuda") else psutil.Process().memory_info().rss,
        batch=f"{rows} prompts of up to {columns} tokens, {new} decoded",
        activations=activation_bytes(model, len(train), settings),
        collected=f"{len(train)} prompts x {len(positions)} position{'s' * (len(positions) > 1)} "
        f"x {model.n_layers} layers "
        f"x {model.d_model}",
        free=free,
        free_disk=shutil.disk_usage(Path()).free,
        batch_tokens=None if settings.batch_size else settings.batch_tokens,
        on_gpu=device.startswith("cuda"),
    )


def _outline(config: RunConfig) -> Model:
    require_devices(_device(config), config.n_devices)
    told: Any = {"chat": config.chat and None, "system": config.system, "engine": config.engine}
    return load_model(config.model, dtype=config.dtype, device="meta", **told)


def _device(config: RunConfig) -> str:
    return config.device or ("cuda" if torch.cuda.is_available() else "cpu")


def weight_bytes(model: Model) -> int:
    """Return the bytes of all parameters, those of tied ones once."""
    stores = [weight.untyped_storage() for weight in model.hooked.parameters()]
    return sum({store._cdata: store.nbytes() for store in stores}.values())


def cache_bytes(model: Model, rows: int, columns: int) -> int:
    """Return the bytes of the keys and values of that many tokens."""
    cfg = model.hooked.cfg
    return 2 * cfg.n_layers * rows * columns * _kv_heads(cfg) * cfg.d_head * cfg.dtype.itemsize


def passing_bytes(model: Model, rows: int, columns: int) -> int:
    """Return about what lives at once in a forward pass, cache and weights not counted.

    Four copies of the residual stream, and the larger of four of the MLP's inner layer, or of the
    queries, keys and values with four of the scores (raw, masked, exponential, pattern).
    """
    cfg, tokens = model.hooked.cfg, rows * columns
    assert cfg.d_mlp is not None  # every family that loads has an MLP
    heads, kv_heads = cfg.n_heads * cfg.d_head, _kv_heads(cfg) * cfg.d_head
    attention = tokens * (5 * heads + 2 * kv_heads) + 4.3 * rows * cfg.n_heads * columns**2
    inside = max(4 * tokens * cfg.d_mlp, attention, rows * cfg.d_vocab)
    return int(cfg.dtype.itemsize * (4 * tokens * cfg.d_model + inside))


def activation_bytes(model: Model, n: int, settings: ReadSettings) -> int:
    """Return the size of the file that `collect` writes for `n` examples."""
    shapes = {name: (n, model.n_layers, model.d_model) for name in positions_of(settings)}
    return storage.TensorFile("", shapes).size


def human(n_bytes: int) -> str:
    """Write bytes for people, in binary units."""
    units, size = ["B", "KiB", "MiB", "GiB", "TiB"], float(n_bytes)
    while size >= 1000 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.3g} {units[0]}"


def _kv_heads(cfg: Any) -> int:
    return cfg.n_key_value_heads or cfg.n_heads
