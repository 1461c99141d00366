"""What a steering does where: layer by layer and token by token, seen as it happens.

A hook before and a hook after every steering hook, in the very pass that is evaluated. So what is
kept is what happened: which tokens were moved, how far, and what the probe predicts of the final
prompt token as it comes into a layer and as the layer passes it on (in SAE space: encoded again).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mera_tl import storage
from mera_tl.inference.answers import Reading, ReadSettings, option_tokens, read_batch
from mera_tl.inference.decoding import Window
from mera_tl.inference.evaluation import gather, n_after, run_batches, tokenize_task
from mera_tl.inference.outcomes import Outcomes
from mera_tl.inference.prefix import Prefix, moves_none_before_the_last
from mera_tl.models.model import FwdHooks, Model, resid_post
from mera_tl.steering.hook import SteerHook, relative_shift
from mera_tl.tasks.task import Task

BACK = 24
"""Prompt tokens that are told apart, counted back from the final one; those before are one."""

Seen = Callable[[SteerHook, Tensor, Tensor, Window], None]
"""Gets what went into the hooks of a layer and what came out, "batch pos d_model"."""


def around(readers: Sequence[SteerHook], fwd_hooks: FwdHooks, seen: Seen) -> FwdHooks:
    """Return hooks with a look at the layer of every reader before them and after them.

    Raises:
        ValueError: if a layer has two readers: which of them moved what is not seen.
    """
    if len({reader.layer for reader in readers}) < len(readers):
        raise ValueError("A layer has hooks of two steerings; look at one steering at a time.")
    into: dict[int, Tensor] = {}

    def before(resid: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
        into[hook.layer()] = resid

    def after(reader: SteerHook) -> Any:
        def look(resid: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            came, window = into.pop(hook.layer()), hook.ctx["window"]
            if not window.scores:  # an option that is tried is no token of the reply
                seen(reader, came, resid, window)

        return look

    names = [resid_post(reader.layer) for reader in readers]
    looks = [(name, after(reader)) for name, reader in zip(names, readers, strict=True)]
    return [*((name, before) for name in names), *fwd_hooks, *looks]


@dataclass(frozen=True, eq=False)
class Reach:
    """Where a steering has moved tokens, and what its probe predicted before and after."""

    layers: Int[Tensor, " layer"]
    """The steered layers."""
    before: Float[Tensor, "example layer"]
    """Predicted error of the final prompt token as it comes into the layer."""
    after: Float[Tensor, "example layer"]
    """The same as the layer passes it on."""
    tokens: Int[Tensor, "layer pos"]
    """Tokens seen; column BACK is the final prompt token, the first all that are further back."""
    moved: Int[Tensor, "layer pos"]
    """Those of them that were moved."""
    length: Float[Tensor, "layer pos"]
    """Sum of |shift| / |h| over those."""

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers.tolist()))
        return f"Reach({len(self.before)} examples, layer{'s' * (', ' in layers)} {layers})"

    def examples(self, layer: int) -> pd.DataFrame:
        """Return predicted error before and after a steered layer, one row per example."""
        place = self.layers.tolist().index(layer)
        columns = {"before": self.before[:, place], "after": self.after[:, place]}
        return pd.DataFrame({name: values.tolist() for name, values in columns.items()})

    def positions(self) -> pd.DataFrame:
        """Return one row per steered layer and token position that was seen.

        `position` is 0 at the final prompt token, negative before it, positive for generated
        tokens; those `further` back are counted at -BACK. `share` of the `n` tokens there were
        moved, by `shift` residual norms on average.
        """
        rows = []
        for i, layer in enumerate(self.layers.tolist()):
            for column in self.tokens[i].nonzero()[:, 0].tolist():
                n, moved = int(self.tokens[i, column]), int(self.moved[i, column])
                shift = float(self.length[i, column]) / max(1, moved)
                place = {"layer": layer, "position": column - BACK, "further": not column}
                rows.append(place | {"n": n, "share": moved / n, "shift": shift})
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        storage.save_tensors(path, vars(self))

    @classmethod
    def load(cls, path: str | Path) -> "Reach":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is missing or damaged.
        """
        return cls(**storage.load_tensors(path))


def evaluate_reach(
    model: Model, task: Task[Any], fwd_hooks: FwdHooks, *, settings: ReadSettings, title: str
) -> tuple[Outcomes, Reach]:
    """Answer a task under steering hooks, as `evaluate` does, and see what they do where.

    Raises:
        ValueError: as `evaluate`, or if there is no steering hook.
    """
    readers = [hook for _, hook in fwd_hooks if isinstance(hook, SteerHook)]
    if not readers:
        raise ValueError("There is no steering hook to look at; pass those of a Steering.")
    settings = ReadSettings.of(task, settings)
    options = option_tokens(model, task, settings)
    prompts, prefix = tokenize_task(model, task, settings), None
    if moves_none_before_the_last(fwd_hooks):
        prefix = Prefix.of(model, prompts, n_after(model, task, settings))
    n_shared = 0 if prefix is None else len(prefix.tokens)
    looks: dict[int, _Look] = {}  # by the first example of a batch: a batch may be run again

    def run(batch: list[int]) -> Reading:
        looks[batch[0]] = look = _Look(readers, len(batch), settings.n_new, n_shared)
        hooks, some = around(readers, fwd_hooks, look), [prompts[i] for i in batch]
        return read_batch(model, some, options, settings, hooks, prefix=prefix)

    results = run_batches(prompts, run, settings, title)
    order = torch.tensor([i for batch, _ in results for i in batch]).argsort()
    done = [looks[batch[0]] for batch, _ in results]
    reach = Reach(
        torch.tensor([reader.layer for reader in readers]),
        torch.cat([look.before for look in done])[order],
        torch.cat([look.after for look in done])[order],
        torch.stack([look.tokens for look in done]).sum(0),
        torch.stack([look.moved for look in done]).sum(0),
        torch.stack([look.length for look in done]).sum(0),
    )
    return gather(task, options, results), reach


class _Look:
    """What is seen of one batch."""

    def __init__(
        self, readers: Sequence[SteerHook], n_rows: int, n_new: int, n_shared: int
    ) -> None:
        self._n_shared = n_shared
        self._place = {reader.layer: i for i, reader in enumerate(readers)}
        self._step = dict.fromkeys(self._place, 0)
        n_layers, width = len(readers), BACK + 1 + n_new
        self.before, self.after = (torch.zeros(n_rows, n_layers) for _ in range(2))
        self.tokens, self.moved = (torch.zeros(n_layers, width).long() for _ in range(2))
        self.length = torch.zeros(n_layers, width)

    def __call__(self, reader: SteerHook, into: Tensor, out: Tensor, window: Window) -> None:
        place, end = self._place[reader.layer], into.shape[1]
        waits = reader.per_answer and window.answers is None
        if window.n_prompt and (waits or not reader.per_answer):
            # What all prompts begin with was run before; it is further back than a row's own.
            own = window.real.sum(-1).cpu()
            back = (own[:, None] + torch.arange(self._n_shared)).flatten()
            seen = (BACK - back).clamp(min=0)
            self.tokens[place].index_add_(0, seen, torch.ones_like(seen))
        if waits:  # the answer is not known yet, so this part of the prompt is run once more
            end = 0 if reader.positions == "all" else end - 1
        elif window.n_prompt:
            for kept, resid in ((self.before, into), (self.after, out)):
                kept[:, place] = reader.read(resid[:, -1:], window)[1][:, 0].sigmoid().cpu()
        self._step[reader.layer] += 0 if window.n_prompt else 1
        last = BACK + self._step[reader.layer]
        columns = (torch.arange(into.shape[1]) + last - into.shape[1] + 1).clamp(min=0)[:end]
        real = window.real[:, :end].cpu()
        length = relative_shift(out[:, :end], into[:, :end]).cpu() * real
        for total, values in ((self.tokens, real), (self.moved, length > 0)):
            total[place].index_add_(0, columns, values.sum(0))
        self.length[place].index_add_(0, columns, length.sum(0))
