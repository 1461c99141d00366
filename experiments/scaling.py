"""What do collecting, fitting, calibrating and a whole run cost at sizes that were never run?

Every stage has a simple model of its cost: a sum of few products of n, tokens, layers, width and
thresholds, with coefficients that are not negative, fitted to processor seconds of one core on
small random Llamas. The largest size of each stage is kept out of the fit and predicted, as a
check; so is a whole run. Then the models are taken to 70 billion parameters and a million prompts.
That is an extrapolation over many orders of magnitude: it says which stage grows fastest and what
gives up first, not when a cluster would be done.

    python -m experiments.scaling

Expected: passes (collect, calibrate) grow with tokens x parameters, fits with n x width^2 x layers;
on accelerators, which only the passes use, fits and disk become the bottleneck. Two minutes of
processor time.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
import tyro
from scipy.optimize import nnls

import mera_tl
from mera_tl.benchmark import RunConfig, deal, open_run
from mera_tl.inference import Activations, Outcomes, ReadSettings, tokenize_task
from mera_tl.organism import FOLDER as ORGANISM
from mera_tl.storage import fingerprint, write_records

RESULTS = Path(__file__).parent / "results" / "scaling"
READ = ReadSettings(readout="last", progress=False)


@dataclass(frozen=True)
class Size:
    """What a cost depends on."""

    n: int
    layers: int
    width: int
    k: int = 0
    """Thresholds, all of which move every token: the most that calibrating can cost."""
    tokens: int = 0
    parameters: int = 0
    """Of the blocks, which every token passes; the unembedding sees one token a prompt."""


def drawn(shape: tuple[int, int, int], positions: tuple[str, ...], decay: float) -> Activations:
    """Draw activations [example layer d]; the error is linear in ten features, plus noise."""
    (n, _, width), generator = shape, torch.Generator().manual_seed(0)
    by_position = {}
    for position in positions:
        spectrum = torch.arange(1, width + 1) ** (-decay / 2)
        axes = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        resid = torch.randn(shape, generator=generator) * spectrum @ axes
        by_position[position] = resid / resid.std((0, 1))
    score = by_position[positions[-1]][:, -1, :10].sum(-1) / 2
    error = torch.sigmoid(score + torch.randn(n, generator=generator))
    zero, wrong = torch.zeros(n, dtype=torch.long), (error > 0.5).long()
    probs = torch.stack([1 - error, error], 1)
    parts = (torch.arange(n), zero, wrong, probs, *[zero] * 4, *[torch.zeros(n)] * 2)
    return Activations(by_position, Outcomes(("a", "b"), *parts), {"model": "drawn"})


def batches(size: Size) -> int:
    return -(-size.tokens // READ.batch_tokens)


TERMS: dict[str, dict[str, Callable[[Size], float]]] = {
    "collect": {
        "tokens x parameters": lambda s: s.tokens * s.parameters,
        "tokens x layers x width": lambda s: s.tokens * s.layers * s.width,
        "batches x layers": lambda s: batches(s) * s.layers,
    },
    "fit": {
        "n x width^2 x layers": lambda s: s.n * s.width**2 * s.layers,
        "width^3 x layers": lambda s: s.width**3 * s.layers,
        "n x width x layers": lambda s: s.n * s.width * s.layers,
        "layers": lambda s: s.layers,
    },
    "calibrate": {
        "(1 + k) x tokens x parameters": lambda s: (1 + s.k) * s.tokens * s.parameters,
        "(1 + k) x tokens x layers x width": lambda s: (1 + s.k) * s.tokens * s.layers * s.width,
        "(1 + k) x batches x layers": lambda s: (1 + s.k) * batches(s) * s.layers,
    },
}
PARTS = {"train": "600", "calibration": "200", "test": "200"}
"""Examples of the whole run that is timed."""
TARGETS = {  # layers, width, parameters of the blocks
    "Llama-3.2-1B": (16, 2048, 973_000_000),
    "Llama-3.1-8B": (32, 4096, 6_980_000_000),
    "Llama-3.3-70B": (80, 8192, 68_400_000_000),
}


@dataclass(frozen=True)
class Config:
    """Sizes: the last of each list is predicted, not fitted to."""

    models: tuple[tuple[int, int], ...] = (
        (2, 128),
        (4, 128),
        (2, 256),
        (4, 256),
        (2, 384),
        (4, 512),
    )
    """Layers and width."""
    n: tuple[int, ...] = (60, 180)
    fits: tuple[tuple[int, int, int], ...] = (
        (300, 2, 64),
        (1000, 4, 128),
        (300, 2, 256),
        (2000, 2, 256),
        (300, 2, 512),
        (1000, 2, 512),
        (4000, 2, 512),
        (3000, 2, 768),
    )
    """n, layers and width."""
    thresholds: tuple[int, ...] = (1, 4)
    workers: tuple[int, ...] = (1, 2, 4, 8)
    repeats: int = 2
    tokens_per_prompt: int = 100
    targets: tuple[int, ...] = (3_000, 1_000_000)
    """Prompts, of which three fifths train, a fifth calibrates, a fifth tests."""
    accelerator: float = 2e14
    """Useful operations a second of one accelerator: an assumption, nothing here measured it."""


def seconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = process_time()
        work()
        times.append(process_time() - start)
    return min(times)


def random_llama(layers: int, width: int, folder: Path) -> mera_tl.Model:
    """Write and load a random Llama that speaks the organism's tokens."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 32, "num_key_value_heads": width // 32}
    torch.manual_seed(0)
    config = LlamaConfig(**shape, **heads, vocab_size=400, max_position_embeddings=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ORGANISM / name, folder)
    return mera_tl.load_model(str(folder), device="cpu")


def passes(config: Config, folder: Path) -> list[dict[str, Any]]:
    """Measure collecting and calibrating."""
    rows, splits = [], mera_tl.load_task("yesno_hint").split(0, calibration=40)
    for layers, width in config.models:
        model = random_llama(layers, width, folder / f"{layers}-{width}")
        parameters = sum(w.numel() for w in model.hooked.blocks.parameters())

        def size(task: mera_tl.Task, k: int = 0, model=model, parameters=parameters) -> Size:
            tokens = sum(map(len, tokenize_task(model, task, READ)))
            return Size(len(task), model.n_layers, model.d_model, k, tokens, parameters)

        for n in config.n:
            task = splits.train.subset(range(n))
            spent = seconds(
                lambda t=task, m=model: mera_tl.collect(m, t, settings=READ), config.repeats
            )
            rows.append({"stage": "collect", **asdict(size(task)), "cpu_s": spent})
        activations = mera_tl.collect(model, splits.train.subset(range(200)), settings=READ)
        probe = mera_tl.fit_error_probe(activations)
        # Random models may have no error to read: what is measured needs a shift, whichever.
        weights = torch.randn(probe.weights.shape) / model.d_model
        steering = mera_tl.Steering(replace(probe, weights=weights))
        for k in config.thresholds:
            grid = [steering.at(1e-9 * 2.0**i) for i in range(k)]
            spent = seconds(
                lambda g=grid, m=model: mera_tl.calibrate(m, splits.calibration, g, settings=READ),
                config.repeats,
            )
            measured = asdict(size(splits.calibration, k))
            rows.append({"stage": "calibrate", **measured, "cpu_s": spent})
    return rows


def probe_fits(config: Config) -> list[dict[str, Any]]:
    rows = []
    for n, layers, width in config.fits:
        activations = drawn((n, layers, width), ("last",), 3.4)
        spent = seconds(lambda a=activations: mera_tl.fit_error_probe(a), config.repeats)
        rows.append({"stage": "fit", **asdict(Size(n, layers, width)), "cpu_s": spent})
    return rows


def side_by_side(config: Config, folder: Path) -> list[dict[str, Any]]:
    """Collect shard after shard on one core: the slowest is what many workers would wait for."""
    layers, width = config.models[-2]
    model = random_llama(layers, width, folder / "workers")
    task = mera_tl.load_task("yesno_hint").subset(range(500))
    prompts, rows = tokenize_task(model, task, READ), []
    for workers in config.workers:
        shards = [task.subset(places) for places in deal(prompts, READ, workers)]
        each = [
            seconds(lambda s=shard: mera_tl.collect(model, s, settings=READ), 1) for shard in shards
        ]
        rows.append({"kind": "workers", "workers": workers, "slowest": max(each), "sum": sum(each)})
    return rows


def whole_run(config: Config, folder: Path, costs: "Costs") -> dict[str, Any]:
    """Time a run of one method, from its configuration to its records, and predict it."""
    layers, width = config.models[-2]
    path = folder / "whole"
    model = random_llama(layers, width, path)
    run = RunConfig(model=str(path), task="yesno_hint", device="cpu", readout="last", **PARTS)
    start = process_time()
    with open_run(run, folder / "run", progress=False, load=lambda _: model) as opened:
        list(opened.records(("no_steering", "optimal_probe")))
    spent = process_time() - start
    parameters = sum(w.numel() for w in model.hooked.blocks.parameters())
    tokens = [sum(map(len, tokenize_task(model, split, READ))) for split in opened.splits]
    parts = of_a_run([int(n) for n in PARTS.values()], tokens, layers, width, parameters)
    said = sum(costs(stage, size) for stage, size in parts)
    return {"kind": "whole run", "cpu_s": spent, "predicted_s": said}


def of_a_run(
    n: list[int], tokens: list[int], layers: int, width: int, parameters: int
) -> list[tuple[str, Size]]:
    """Return the stages of a run of one method: train, calibration, test; ten thresholds."""
    sizes = [
        Size(count, layers, width, 10, long, parameters)
        for count, long in zip(n, tokens, strict=True)
    ]
    train, calibration, test = sizes
    stages = ("collect", "fit", "calibrate", "collect", "collect")
    return list(zip(stages, (train, train, calibration, test, test), strict=True))


class Costs:
    """Fitted to relative errors, each stage's largest layers x width left out."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.records: list[dict[str, Any]] = []
        self._coefficients: dict[str, np.ndarray] = {}
        for stage in TERMS:
            sizes = [(self.size(row), row["cpu_s"]) for row in rows if row["stage"] == stage]
            largest = max(size.width * size.layers for size, _ in sizes)
            kept = [(s, t) for s, t in sizes if s.width * s.layers < largest]
            terms = np.array([self.terms(stage, s) for s, _ in kept])
            spent = np.array([t for _, t in kept])
            self._coefficients[stage], _ = nnls(terms / spent[:, None], np.ones(len(spent)))
            for size, cpu_s in sizes:
                role = "fitted" if (size, cpu_s) in kept else "left out"
                found = {"cpu_s": cpu_s, "predicted_s": self(stage, size)}
                self.records.append(
                    {"kind": "measured", "stage": stage, "role": role, **asdict(size), **found}
                )
            named = dict(zip(TERMS[stage], self._coefficients[stage].tolist(), strict=True))
            self.records.append({"kind": "model", "stage": stage, "seconds_per": named})

    @staticmethod
    def size(row: dict[str, Any]) -> Size:
        return Size(**{name: row[name] for name in Size.__dataclass_fields__})

    @staticmethod
    def terms(stage: str, size: Size) -> list[float]:
        return [float(term(size)) for term in TERMS[stage].values()]

    def __call__(self, stage: str, size: Size) -> float:
        """Return seconds of one core."""
        return float(self._coefficients[stage] @ self.terms(stage, size))


def extrapolated(config: Config, costs: Costs) -> list[dict[str, Any]]:
    """Take the models to real sizes, and name what takes longest or does not fit."""
    rows = []
    for name, (layers, width, parameters) in TARGETS.items():
        for prompts in config.targets:
            n = [3 * prompts // 5, prompts // 5, prompts // 5]
            tokens = [config.tokens_per_prompt * count for count in n]
            parts = of_a_run(n, tokens, layers, width, parameters)
            hours = dict.fromkeys(TERMS, 0.0)
            for stage, size in parts:
                hours[stage] += costs(stage, size) / 3600
            operations = 2 * parameters * (tokens[0] + 11 * tokens[1] + 2 * tokens[2])
            on_gpu = operations / config.accelerator / 3600
            rows.append(
                {
                    "kind": "extrapolated",
                    "model": name,
                    "prompts": prompts,
                    **{f"{stage}_core_h": round(value, 3) for stage, value in hours.items()},
                    "passes_accelerator_h": round(on_gpu, 4),
                    "activations_tb": round(n[0] * 2 * layers * width * 4 / 1e12, 4),
                    "fit_memory_gb": round(3 * 8 * n[0] * width / 1e9, 2),
                    "bottleneck_on_cores": max(hours, key=lambda stage: hours[stage]),
                    "bottleneck_with_accelerator": "fit on one core"
                    if hours["fit"] > on_gpu
                    else "passes",
                }
            )
    return rows


def main(config: Config) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        costs = Costs([*passes(config, folder), *probe_fits(config)])
        records = [*costs.records, *side_by_side(config, folder), whole_run(config, folder, costs)]
    records += extrapolated(config, costs)
    for record in records:
        print(record)
    write_records(RESULTS / f"{fingerprint(asdict(config))}.jsonl", records)


if __name__ == "__main__":
    main(tyro.cli(Config))
