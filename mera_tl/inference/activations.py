"""Collect `resid_post` of all layers and the model's errors, in the pass that produces the answer.

Rows are gathered inside the hooks: per layer one vector an example at the final prompt token
(`last`) and, where a readout decodes, one at the answer token (`exact`), or, where replies are
scored, the mean over the reply's tokens (`generated`). They go to a file as they
come, so memory grows with the batch and not with the number of examples.
"""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mera_tl import storage
from mera_tl.inference.answers import Reading, ReadSettings, option_tokens, read_batch
from mera_tl.inference.decoding import Decoding, hooked_pass
from mera_tl.inference.evaluation import check_call, gather, n_after, run_batches, tokenize_task
from mera_tl.inference.outcomes import Outcomes
from mera_tl.inference.prefix import Prefix
from mera_tl.models.identity import manifest_of
from mera_tl.models.model import Model, resid_post
from mera_tl.tasks.splitting import rows_of, spans
from mera_tl.tasks.task import Task

Position = Literal["last", "exact", "generated"]
WriteRow = Callable[[str, int, np.ndarray], None]
"""Keeps "layer d_model" of one example at one position."""


@dataclass(frozen=True, eq=False, repr=False)
class Activations:
    """`resid_post` of every layer, at the positions that were collected, with the outcomes.

    `resid()` is of shape (layer, example, d_model), `by_position["last"]` (example, layer, d_model)
    as it lies on disk; `error`, `correct`, `labels` are of the unsteered answers, one an example.
    """

    by_position: Mapping[str, Float[Tensor, "example layer d_model"]] = field(repr=False)
    outcomes: Outcomes = field(repr=False)
    """Of the unsteered run that produced the activations."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """Model, data, template, positions: what a probe fitted on this is good for."""
    _finite: set[str] = field(default_factory=set, init=False, repr=False)
    """Positions whose values have been found finite: they are looked at once."""

    def resid(self, position: Position = "last") -> Float[Tensor, "layer example d_model"]:
        """Return the activations at a position, all layers; `exact` is zero where unanswered.

        Raises:
            ValueError: if that position was not collected, or holds a value that is not finite.
        """
        if position not in self.by_position:
            raise ValueError(
                f"Position {position!r} was not collected, only {', '.join(self.by_position)}; "
                "`exact` needs a readout that decodes: exact or exact_anywhere."
            )
        resid = self.by_position[position].transpose(0, 1)
        if position not in self._finite and not torch.isfinite(resid).all():
            bad = (~torch.isfinite(resid).all(-1)).nonzero()[0].tolist()
            raise ValueError(
                f"Activations hold NaN or infinity (first in layer {bad[0]}, example {bad[1]}); "
                "collect with dtype float32 or bfloat16, or leave that example out."
            )
        self._finite.add(position)
        return resid

    def check(self, model: Model, settings: ReadSettings) -> None:
        """Refuse a model, or a way of reading its answers, other than those collected under.

        Raises:
            ValueError: naming what differs.
        """
        for name, got in {**manifest_of(model), **_how_read(model, settings)}.items():
            kept = self.manifest.get(name, got)
            if name != "model" and kept != got:
                raise ValueError(
                    f"These activations are of {self.manifest.get('model')} with {name} {kept!r}, "
                    f"but now {model.name} has {got!r}; collect them again."
                )

    @property
    def error(self) -> Float[Tensor, " example"]:
        """The unsteered error, 1 - P(true option)."""
        return self.outcomes.error

    @property
    def correct(self) -> Bool[Tensor, " example"]:
        """Whether the unsteered answer was the true option."""
        return self.outcomes.correct

    @property
    def labels(self) -> Int[Tensor, " example"]:
        """The true options' indices."""
        return self.outcomes.labels

    @property
    def texts(self) -> list[int]:
        """A row number for each example, the same for examples with the same text."""
        first = {row: same[0] for same in self.manifest.get("repeats", ()) for row in same}
        return [first.get(row, row) for row in self.outcomes.rows.tolist()]

    @property
    def origin(self) -> dict[str, Any]:
        """What is said of whatever is fitted to these: their manifest, with the rows.

        Which texts are repeated may be a long list, and is left out.
        """
        said = {name: value for name, value in self.manifest.items() if name != "repeats"}
        return said | {"rows": spans(self.outcomes.rows.tolist())}

    def subset(self, indices: Int[Tensor, " kept"]) -> "Activations":
        """Return the activations of some examples."""
        kept = {name: resid[indices] for name, resid in self.by_position.items()}
        part = replace(self, by_position=kept, outcomes=self.outcomes.subset(indices))
        part._finite.update(self._finite)
        return part

    def save(self, folder: str | Path) -> None:
        """Write activations.safetensors, outcomes.jsonl and manifest.json into a folder."""
        folder = storage.path_of(folder)
        storage.reopen(folder / "manifest.json")
        storage.save_tensors(folder / "activations.safetensors", self.by_position)
        _save_rest(folder, self.outcomes, self.manifest)

    @classmethod
    def load(cls, folder: str | Path) -> "Activations":
        """Read what `save`, or `collect` with a folder, has written.

        Raises:
            ValueError: if a file is missing or damaged.
        """
        manifest = storage.read_json(Path(folder) / "manifest.json")
        records = storage.read_records(Path(folder) / "outcomes.jsonl")
        tensors = storage.load_tensors(Path(folder) / "activations.safetensors")
        with storage.reading(folder):
            return cls(tensors, Outcomes.from_records(records, manifest["options"]), manifest)

    def plot(self, layer: int = -1, position: Position = "last") -> Any:
        """Draw the two leading principal axes of a layer, by correctness, as a plotly figure.

        Raises:
            ValueError: if there is no such layer, or as `resid`.
        """
        from mera_tl.plots import cloud

        n_layers = len(self.resid(position))
        if layer not in range(-n_layers, n_layers):
            raise ValueError(f"layer={layer!r} is none of 0 to {n_layers - 1}; choose among them.")
        resid = self.resid(position)[layer].float()
        _, _, axes = torch.pca_lowrank(resid, q=2)
        x, y = ((resid - resid.mean(0)) @ axes).T.tolist()
        return cloud(x, y, self.correct.tolist(), layer=layer % n_layers)

    def __repr__(self) -> str:
        model, task = self.manifest.get("model"), self.manifest.get("task")
        shapes = ", ".join(f"{p} {tuple(t.shape)}" for p, t in self.by_position.items())
        return f"Activations({model} on {task}, example x layer x d_model: {shapes})"

    def _repr_html_(self) -> str:
        shapes = ", ".join(f"{p}: {tuple(t.shape)}" for p, t in self.by_position.items())
        model, task = self.manifest.get("model"), self.manifest.get("task")
        about = html.escape(f"{model} on {task} ({shapes})")
        return f"<b>resid_post</b> of {about}<br>{self.outcomes._repr_html_()}"


def collect(
    model: Model,
    task: Task[Any],
    *,
    settings: ReadSettings | None = None,
    out: str | Path | None = None,
) -> Activations:
    """Answer a task unsteered, gathering `resid_post` at `last` and, for replies, at `exact`.

    Of a scored task the mean over the tokens of each reply is gathered instead, `generated`; zero
    for a reply without any.

    For one prompt and every hook point there is TransformerLens's own `run_with_cache`:
    `model.hooked.run_with_cache(torch.tensor(model.tokenize([prompt])))`.

    With a folder `out`, activations are written there as they come and read back lazily by the
    operating system; without, they are kept in memory.

    Raises:
        ValueError: as `evaluate`.
    """
    check_call(model, task)
    settings = ReadSettings.of(task, settings)
    manifest = _manifest(model, task, settings)
    shapes = {name: (len(task), model.n_layers, model.d_model) for name in positions_of(settings)}
    if out is not None:
        out = storage.path_of(out)
        storage.reopen(out / "manifest.json")
        with storage.TensorFile(out / "activations.safetensors", shapes) as file:
            outcomes = _answer(model, task, settings, file.write)
        _save_rest(out, outcomes, manifest)
        return Activations.load(out)
    kept = {name: torch.zeros(shape) for name, shape in shapes.items()}

    def keep(position: str, row: int, values: np.ndarray) -> None:
        kept[position][row] = torch.from_numpy(values)

    return Activations(kept, _answer(model, task, settings, keep), manifest)


def _answer(model: Model, task: Task[Any], settings: ReadSettings, write_row: WriteRow) -> Outcomes:
    """Answer a task unsteered; whatever is gathered on the way goes to `write_row`."""
    prompts, options = tokenize_task(model, task, settings), option_tokens(model, task, settings)
    prefix = Prefix.of(model, prompts, n_after(model, task, settings))
    whole = settings.readout == "reply"

    def run(batch: list[int]) -> Reading:
        capture = _Capture(model, batch, write_row, n_means=len(batch) if whole else 0)
        reading = read_batch(
            model,
            [prompts[i] for i in batch],
            options,
            settings,
            capture.fwd_hooks,
            prefix=prefix,
            on_prompt=lambda decoding: capture.write("last", decoding.rows),
            on_answer=capture.add if whole else lambda rows: capture.write("exact", rows),
        )
        if whole:
            capture.write_means("generated")
        elif settings.decodes:
            # A reply's first word was taken for its answer until the reply had been read.
            nothing = np.zeros((model.n_layers, model.d_model), dtype=np.float32)
            for place in (reading.predictions < 0).nonzero()[:, 0].tolist():
                write_row("exact", batch[place], nothing)
        return reading

    return gather(task, options, run_batches(prompts, run, settings, "collect"))


def _manifest(model: Model, task: Task[Any], settings: ReadSettings) -> dict[str, Any]:
    return {
        **manifest_of(model),
        "task": task.name,
        "role": task.role,
        "options": list(task.options),
        "data_hash": task.data_hash,
        "source": dict(task.source),
        "hook": "blocks.{layer}.hook_resid_post",
        **_how_read(model, settings),
        "n": len(task),
        "repeats": task.repeats,
    }


def rows_fitted(origin: Mapping[str, Any], task: Task[Any]) -> set[int]:
    """Return the rows of a task's source that something was fitted to, as far as it says so.

    `origin` is what `Activations.origin` said, for a probe its manifest.
    """
    found: set[int] = set()
    for part in origin.get("mixture") or [origin]:
        theirs, ours = part.get("source") or {}, task.source
        same = (part.get("task"), theirs.get("from")) == (task.name, ours.get("from"))
        if files := theirs.get("files"):  # by whatever name, and in whatever wording
            same = files == ours.get("files")
        found |= rows_of(part.get("rows") or "") if same else set()
    return found


def _how_read(model: Model, settings: ReadSettings) -> dict[str, Any]:
    n_new = settings.n_new if settings.decodes else 0  # tokens in which there may be an answer
    how = {"readout": settings.readout, "answer_prefix": settings.prefix(model)}
    return {**how, "n_new": n_new, "truncate": settings.truncate}


def places_read(outcomes: Outcomes, position: Position) -> Bool[Tensor, " example"]:
    """Return which examples have an activation at a position; the others hold zeros there.

    No example lacks `last`; without an answer there is no `exact`, and without a token of a reply
    nothing `generated`.
    """
    if position == "generated":
        return outcomes.spoken
    return outcomes.answered | (position == "last")


def prompt_activations(
    model: Model, task: Task[Any], *, settings: ReadSettings | None = None
) -> Float[Tensor, "layer example d_model"]:
    """Return `resid_post` of every layer at the final prompt token; nothing is answered.

    Raises:
        ValueError: as `evaluate`.
    """
    settings = ReadSettings.of(task, settings)
    prompts = tokenize_task(model, task, settings)
    kept = torch.zeros(len(task), model.n_layers, model.d_model)

    def run(batch: list[int]) -> None:
        def write(_: str, row: int, values: np.ndarray) -> None:
            kept[row] = torch.from_numpy(values)

        capture = _Capture(model, batch, write)
        with torch.inference_mode(), hooked_pass(model, capture.fwd_hooks):
            decoding = Decoding(model, [prompts[i] for i in batch], capture.fwd_hooks)
            decoding.prompt()
            capture.write("last", decoding.rows)

    run_batches(prompts, run, settings, "prompts")
    return kept.transpose(0, 1)


def reply_activations(
    model: Model,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    *,
    settings: ReadSettings | None = None,
) -> Float[Tensor, "layer example d_model"]:
    """Return the mean of `resid_post` over the tokens of given replies, as they are read unsteered.

    It does not matter how a reply came about: sampled, steered or written by a person. Zero for an
    empty one.
    """
    both = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    kept = torch.zeros(model.n_layers, len(both), model.d_model)

    def run(batch: list[int]) -> None:
        n, width = torch.tensor([len(replies[i]) for i in batch]), max(len(both[i]) for i in batch)
        # Padding is on the left, so a reply is the end of its row.
        inside = (torch.arange(width) >= width - n[:, None]).float()

        def keep(resid: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            total = einsum(resid.float().cpu(), inside, "batch pos d, batch pos -> batch d")
            kept[hook.layer(), batch] = total / n.clamp(min=1)[:, None]

        hooks = [(resid_post(layer), keep) for layer in range(model.n_layers)]
        with torch.inference_mode(), hooked_pass(model, hooks):
            Decoding(model, [both[i] for i in batch], hooks).prompt()

    run_batches(both, run, settings or ReadSettings(), "read replies")
    return kept


def positions_of(settings: ReadSettings) -> tuple[Position, ...]:
    """Return the positions that are collected under a readout."""
    if settings.readout == "reply":
        return "last", "generated"
    return ("last", "exact") if settings.decodes else ("last",)


def _save_rest(folder: Path, outcomes: Outcomes, manifest: Mapping[str, Any]) -> None:
    storage.write_records(folder / "outcomes.jsonl", outcomes.to_records())
    storage.write_json(folder / "manifest.json", dict(manifest))


class _Capture:
    """Hooks that keep the final column of the latest pass, and their way out."""

    def __init__(
        self, model: Model, batch: list[int], write_row: WriteRow, *, n_means: int = 0
    ) -> None:
        self._batch, self._write_row = batch, write_row
        self._latest: list[Tensor] = [torch.empty(0)] * model.n_layers
        self._sums = torch.zeros(n_means, model.n_layers, model.d_model)
        self._counts = torch.zeros(n_means)
        self.fwd_hooks = [(resid_post(layer), self._keep) for layer in range(model.n_layers)]

    def _keep(self, resid: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
        # Prompts are padded on the left: the last column is every row's newest token.
        self._latest[hook.layer()] = resid[:, -1].float()

    def write(self, position: str, rows: Int[Tensor, " column_rows"]) -> None:
        """Write the latest columns of the rows that are not -1."""
        values = torch.stack([column.cpu() for column in self._latest], dim=1).numpy()
        for column, row in enumerate(rows.tolist()):
            if row >= 0:
                self._write_row(position, self._batch[row], values[column])

    def add(self, rows: Int[Tensor, " column_rows"]) -> None:
        """Add the latest columns of the rows that are not -1 to their means."""
        kept, values = rows.cpu(), torch.stack([column.cpu() for column in self._latest], dim=1)
        self._sums.index_add_(0, kept[kept >= 0], values[kept >= 0])
        self._counts.index_add_(0, kept[kept >= 0], torch.ones(int((kept >= 0).sum())))

    def write_means(self, position: str) -> None:
        """Write the mean of what was added to each row."""
        means = self._sums / self._counts.clamp(min=1)[:, None, None]
        for place, row in enumerate(self._batch):
            self._write_row(position, row, means[place].numpy())
