"""One prompt, token by token and layer by layer: what the probe predicts, where the rule fires.

The ledger runs the same reading as `evaluate`, with a hook before and a hook after every steering
hook, so what it shows is what happened. `before` is the unsteered run, `after` the steered one;
layers behind a steered layer differ too, since they see what was moved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from mera_tl import plots
from mera_tl.inference.answers import Reading, ReadSettings, option_tokens, read_batch
from mera_tl.inference.decoding import Decoding, Window
from mera_tl.inference.evaluation import check_call, tokenize_task
from mera_tl.inference.prefix import Prefix, moves_none_before_the_last
from mera_tl.models.model import FwdHooks, Model
from mera_tl.probes.probe import LinearProbe
from mera_tl.steering.hook import SteerHook, relative_shift
from mera_tl.steering.reach import around
from mera_tl.steering.spaces import ResidualSpace
from mera_tl.steering.steering import Steering
from mera_tl.tasks.task import Example, Task


@dataclass(frozen=True, eq=False)
class Ledger:
    """What steering did to one prompt."""

    model: str
    row: int
    """Of the task; negative for a prompt that is not the task's."""
    tokens: tuple[str, ...]
    """Of the prompt, then those generated in the steered run; where the unsteered run said another
    one at that place, as "unsteered → steered"."""
    n_prompt: int
    """How many of them are the prompt's."""
    layers: tuple[int, ...]
    before: Float[np.ndarray, "layer pos"]
    """Predicted error in the unsteered run; NaN for a token that only the steered run has."""
    after: Float[np.ndarray, "layer pos"]
    """Predicted error in the steered run, after the shift."""
    shift: Float[np.ndarray, "layer pos"]
    """Length of the shift relative to the residual it moved; zero where nothing fired."""
    options: tuple[str, ...]
    label: str
    """The true answer; "" where it is not known."""
    answers: tuple[str | None, str | None]
    """Before and after; None where no option was answered."""
    probs: tuple[tuple[float, ...], tuple[float, ...]]
    """P(option) before and after."""
    position: str = "last"
    """Where the probe was fitted; predictions elsewhere are no predictions."""
    instead: str = ""
    """What was done where no activation was moved, in words."""
    replies: tuple[str | None, str | None] = (None, None)
    """Before and after, where replies are scored."""
    unsteered: "TracedPass | None" = field(default=None, repr=False)
    """The unsteered run, to be used again."""

    def is_valid(self, pos: int) -> bool:
        """Whether the probe was fitted to predict from tokens at this place."""
        return pos == self.n_prompt - 1 if self.position == "last" else pos >= self.n_prompt - 1

    @property
    def fired(self) -> int:
        """Number of (layer, token) pairs that were moved."""
        return int((self.shift > 0).sum())

    def frame(self) -> pd.DataFrame:
        """Return one row per token and layer."""
        rows = [
            {
                "pos": pos,
                "token": token,
                "layer": layer,
                "before": self.before[i, pos],
                "after": self.after[i, pos],
                "shift": self.shift[i, pos],
                "valid": self.is_valid(pos),
            }
            for pos, token in enumerate(self.tokens)
            for i, layer in enumerate(self.layers)
        ]
        return pd.DataFrame(rows)

    def figure(self) -> go.Figure:
        """Draw predicted error before and after, and the shifts."""
        return plots.ledger(
            self.frame(), title=f"{self._whose()}: {self._change()}", caption=self._moved()
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unsteered"}
        grids = {name: _plain(values.pop(name)) for name in ("before", "after", "shift")}
        return values | grids

    def __repr__(self) -> str:
        return f"Ledger({self})"

    def __str__(self) -> str:
        of = f", {self.model}" if self.row >= 0 else ""
        return f"{self._whose()}{of}: {self._change()}. {self._moved()}."

    def _whose(self) -> str:
        return f"Row {self.row}" if self.row >= 0 else "Your prompt"

    def _change(self) -> str:
        true = f", true is {self.label}" if self.label else ""
        if self.replies != (None, None):
            verdicts = [f" ({answer})" if true else "" for answer in self.answers]
            pairs = zip(self.replies, verdicts, strict=True)
            return " becomes ".join(f"{reply!r:.80}{verdict}" for reply, verdict in pairs)
        said = [answer or "nothing" for answer in self.answers]
        sure = [self._prob(answer, p) for answer, p in zip(self.answers, self.probs, strict=True)]
        if said[0] == said[1]:
            return f"answers {said[0]} ({sure[0]}, steered {sure[1]}){true}"
        return f"{said[0]} ({sure[0]}) becomes {said[1]} ({sure[1]}){true}"

    def _prob(self, answer: str | None, probs: tuple[float, ...]) -> str:
        return "-" if answer is None else f"P = {probs[self.options.index(answer)]:.2f}"

    def _moved(self) -> str:
        if not self.fired:
            return "Nothing was moved" + (f"; {self.instead}" if self.instead else "")
        return (
            f"{self.fired} of {self.shift.size} (layer, token) pairs moved, by up to "
            f"{self.shift.max():.2f} of the residual's norm"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **more: Any) -> Any:
        # As plotly shows its own figures: nothing is downloaded.
        return self.figure()._repr_mimebundle_(include, exclude, **more)


def explain(
    model: Model,
    example: Example,
    steering: Steering | FwdHooks,
    *,
    probe: LinearProbe | None = None,
    settings: ReadSettings | None = None,
    unsteered: "TracedPass | None" = None,
) -> Ledger:
    """Show what a steering, or the hooks of one, does to a single prompt.

    Reads every layer of `probe` (by default the steering's own) in raw space, else the steered
    layers alone. `unsteered` is that half of an earlier ledger, `ledger.unsteered`, of the same
    prompt read by the same probe in the same layers: it is then not run again, nor is what the
    prompt begins with where nothing is moved before its final token.

    Raises:
        ValueError: as `evaluate`, or if there is nothing to read.
    """
    if not isinstance(example, Example):
        raise ValueError(f"{example!r:.60} is not one example; pass one, as task.examples[0].")
    task = Task("The example", (example,), "all")
    hooks = steering.fwd_hooks() if isinstance(steering, Steering) else steering
    check_call(model, task, hooks)
    settings = replace(ReadSettings.of(task, settings), progress=False)
    readers = [hook for _, hook in hooks if isinstance(hook, SteerHook)]
    if isinstance(steering, Steering):
        probe = probe or steering.probe
    raw = all(isinstance(reader.space, ResidualSpace) for reader in readers)
    if raw and probe is not None and probe.weights.shape[-1] == model.d_model:
        readers = [hook for _, hook in Steering(probe).reading_hooks()]
    if not readers:
        raise ValueError(
            "There is nothing to read; pass a steering, its hooks, or a probe of the residual "
            "stream."
        )
    tokens = tokenize_task(model, task, settings)
    if unsteered is not None and unsteered.tokens != tokens[0]:
        raise ValueError("`unsteered` is of another prompt; leave it out, and it is run again.")
    first = unsteered or TracedPass(model, readers, tokens, example, [], settings)
    begun = unsteered if moves_none_before_the_last(hooks) else None
    steered = first
    if hooks:
        steered = TracedPass(model, readers, tokens, example, hooks, settings, begun)
    told = _ledger(model, example, readers, tokens[0], (first, steered))
    return told if probe is None else replace(told, position=probe.position)


def _ledger(
    model: Model,
    example: Example,
    readers: Sequence[SteerHook],
    tokens: Sequence[int],
    runs: Sequence["TracedPass"],
) -> Ledger:
    unsteered, steered = runs
    words = [_shown(model.tokenizer.decode([token])) for token in tokens]
    before, after = unsteered.predicted(), steered.predicted()
    said_before, said_after = (
        [_shown(model.tokenizer.decode([token])) for token in run.generated] for run in runs
    )
    words += [
        word if old in (word, None) else f"{old} → {word}"
        for old, word in zip_longest(said_before[: len(said_after)], said_after)
    ]
    missing = np.full((len(before), max(0, after.shape[1] - before.shape[1])), np.nan)
    before = np.concatenate([before, missing], axis=1)[:, : after.shape[1]]
    readings = [run.reading for run in runs]
    said = [int(reading.predictions[0]) for reading in readings]
    answers = [example.options[i] if i >= 0 else None for i in said]
    probs = [tuple(round(p, 6) for p in reading.probs[0].tolist()) for reading in readings]
    return Ledger(
        model=model.name,
        row=example.row,
        tokens=tuple(words),
        n_prompt=len(tokens),
        layers=tuple(reader.layer for reader in readers),
        before=before,
        after=after,
        shift=steered.shifts(),
        options=example.options,
        label=example.options[example.label],
        answers=(answers[0], answers[1]),
        probs=(probs[0], probs[1]),
        replies=(unsteered.reply, steered.reply),
        unsteered=unsteered,
    )


class TracedPass:
    """One reading of a prompt, with what went into and came out of every layer's hooks."""

    def __init__(
        self,
        model: Model,
        readers: Sequence[SteerHook],
        tokens: list[list[int]],
        example: Example,
        fwd_hooks: FwdHooks,
        settings: ReadSettings,
        begun: "TracedPass | None" = None,
    ) -> None:
        self._model, self._readers, self.tokens = model, readers, tokens[0]
        self.beginning: Prefix | None = None if begun is None else begun.beginning
        n = 0 if self.beginning is None else len(self.beginning.tokens)
        # What `begun` has run, unsteered, is not run again: nothing moved there.
        known: Mapping[int, Tensor] = {} if begun is None else begun._out
        self._into = {layer: resid[:n] for layer, resid in known.items()}
        self._out = dict(self._into)
        self._fed: Tensor = torch.empty(0)
        self.generated: list[int] = []
        options = option_tokens(model, Task("one", (example,), "all"), settings)
        hooks = around(readers, fwd_hooks, self._keep)
        handle = model.hooked.embed.register_forward_pre_hook(self._feed)
        try:
            self.reading: Reading = read_batch(
                *(model, tokens, options, settings, hooks),
                prefix=self.beginning,
                on_prompt=self._begin,
            )
        finally:
            handle.remove()
        self.reply: str | None = None
        if example.scorer is not None:
            (self.reply,) = options.texts([[t for t in self.reading.tokens[0].tolist() if t >= 0]])
            score = torch.tensor(example.score(self.reply))
            graded = {"predictions": (score == 1).long()[None]}
            graded["probs"] = torch.stack([1 - score, score])[None]
            self.reading = replace(self.reading, **graded)

    def _begin(self, decoding: Decoding) -> None:
        self.beginning = decoding.beginning()

    def _feed(self, module: Any, fed: tuple[Tensor, ...]) -> None:  # noqa: ARG002
        self._fed = fed[0]

    def _keep(self, reader: SteerHook, into: Tensor, out: Tensor, window: Window) -> None:
        if not window.n_prompt and reader is self._readers[0]:
            self.generated.append(int(self._fed[0, -1]))
        for kept, resid in ((self._into, into), (self._out, out)):
            new = resid[0, window.real[0].to(resid.device)].float().cpu()
            old = kept.get(reader.layer, new[:0])
            # A second pass over prompt tokens, the answer known, replaces the first.
            again = min(len(old), window.n_prompt) if window.answers is not None else 0
            kept[reader.layer] = torch.cat([old[: len(old) - again], new])

    def predicted(self) -> Float[np.ndarray, "layer pos"]:
        """Return the predicted error of every token, as the layer passed it on."""
        scores = []
        for reader in self._readers:
            features = reader.space.read(self._out[reader.layer], reader.layer)
            weights, bias = reader.weights.cpu(), reader.bias.cpu()
            if weights.ndim == 2:  # a probe per answer: that of the answer given
                answer = max(0, int(self.reading.predictions[0]))
                weights, bias = weights[answer], bias[answer]
            scores.append(torch.sigmoid(features.cpu() @ weights + bias))
        return torch.stack(scores).double().numpy()

    def shifts(self) -> Float[np.ndarray, "layer pos"]:
        """Return the length of every shift relative to the norm of what it moved."""
        layers = [reader.layer for reader in self._readers]
        rows = [relative_shift(self._out[layer], self._into[layer]) for layer in layers]
        return torch.stack(rows).double().numpy()


def _shown(token: str) -> str:
    return token.replace("\n", "↵").strip() or "␣"


def _plain(grid: Float[np.ndarray, "layer pos"]) -> list[list[float | None]]:
    return [[None if np.isnan(v) else round(float(v), 6) for v in row] for row in grid]
