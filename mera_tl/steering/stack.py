"""Many steerings as one hook a layer: each row of a batch has a steering of its own.

A `Stack` holds each different probe, step and rule once; its hooks look up those of a row by the
row's label.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mera_tl.inference.decoding import Window
from mera_tl.models.model import resid_post
from mera_tl.steering.hook import (
    Positions,
    SteerHook,
    check_width,
    first_column,
    last_column,
    relative_shift,
)
from mera_tl.steering.rules import Rule
from mera_tl.steering.spaces import Space
from mera_tl.steering.steering import Steering

Extent = tuple[Positions, int | None]
"""What of a pass a steering may move: its positions, and of how many generated tokens."""


def extent_of(steering: Steering) -> Extent:
    """Return what of a pass a steering may move."""
    return steering.positions, steering.first_k


def columns_of(scope: Extent, window: Window, n_columns: int) -> Bool[Tensor, " pos"]:
    """Return which columns of a pass are in scope."""
    n_prompt, column = min(window.n_prompt, n_columns), torch.arange(n_columns)
    start = first_column(scope[0], n_prompt, n_columns)
    stop = last_column(scope[1], n_prompt, n_columns, window.n_before)
    return (column >= start) & (column < stop)


@dataclass(frozen=True, eq=False)
class Stack:
    """Steerings of one space."""

    steerings: tuple[Steering, ...]

    @property
    def everywhere(self) -> bool:
        """Whether one of them may move prompt tokens before the final one."""
        return any(each.positions == "all" for each in self.steerings)

    @cached_property
    def layers(self) -> Mapping[int, "StackedLayer"]:
        """What they do, layer by layer."""
        numbers = sorted({layer for each in self.steerings for layer in each.layer_numbers})
        return {layer: StackedLayer.of(self.steerings, layer) for layer in numbers}

    @cached_property
    def groups(self) -> list[list[int]]:
        """Numbers of the steerings that read the same probe in the same layers and positions."""
        groups: dict[Any, list[int]] = {}
        for number, each in enumerate(self.steerings):
            key = (id(each.probe), each.layer_numbers, *extent_of(each))
            groups.setdefault(key, []).append(number)
        return list(groups.values())

    def hooks(self, steering: Int[Tensor, " label"]) -> list[tuple[str, "RowHook"]]:
        """Return hooks for rows each of which has a steering of its own, by the row's label."""
        return [
            (resid_post(number), RowHook(layer, steering))
            for number, layer in self.layers.items()
            if (layer.slot[steering] >= 0).any()
        ]


@dataclass(frozen=True, eq=False)
class StackedLayer:
    """What many steerings do in one layer, each different probe, step and rule held once."""

    layer: int
    space: Space
    probes: tuple[int, ...]
    """The id of the probe of each reader."""
    weights: Float[Tensor, "reader answer d"]
    bias: Float[Tensor, "reader answer"]
    steps: Float[Tensor, "slot answer d"]
    reader: Int[Tensor, " slot"]
    """The reader that goes with each step."""
    slot: Int[Tensor, " steering"]
    """The step of each steering; -1 where it does not act in this layer."""
    scope: Int[Tensor, " steering"]
    scopes: tuple[Extent, ...]
    rule: Int[Tensor, " steering"]
    rules: tuple[Rule, ...]

    @staticmethod
    def of(steerings: Sequence[Steering], layer: int) -> "StackedLayer":
        """Gather what some steerings do in a layer."""
        hooks: dict[Any, SteerHook] = {}
        slot = torch.full((len(steerings),), -1)
        places: dict[Any, int] = {}
        for number, each in enumerate(steerings):
            if layer in each.layer_numbers:
                rule: Any = each.rule
                if each.limit > -math.inf:  # a step does not depend on the limit
                    rule = replace(rule, limit=0.0)
                key = (id(each.probe), id(each.direction), rule)
                if key not in places:
                    places[key] = len(places)
                    hooks[key] = each.hook(layer)
                slot[number] = places[key]
        readers = {key[0]: hook for key, hook in hooks.items()}
        rules = {rule: i for i, rule in enumerate(dict.fromkeys(each.rule for each in steerings))}
        scopes = tuple(dict.fromkeys(map(extent_of, steerings)))
        n = max(len(each.step) if each.per_answer else 1 for each in hooks.values())
        return StackedLayer(
            layer,
            steerings[0].space,
            tuple(readers),
            torch.stack([_by_answer(each.weights, n) for each in readers.values()]),
            torch.stack([_by_answer(each.bias[..., None], n)[:, 0] for each in readers.values()]),
            torch.stack([_by_answer(each.step, n) for each in hooks.values()]),
            torch.tensor([list(readers).index(key[0]) for key in hooks]),
            slot,
            torch.tensor([scopes.index(extent_of(each)) for each in steerings]),
            scopes,
            torch.tensor([rules[each.rule] for each in steerings]),
            tuple(rules),
        )

    def scores(
        self, resid: Float[Tensor, "row pos d_model"], answers: Int[Tensor, " row"]
    ) -> Float[Tensor, "reader row pos"]:
        """Return every probe's score of every token, the unsteered answers known."""
        features = self.space.read(resid, self.layer)
        check_width(features, self.weights, self.layer)
        own = self._of_answers(answers)
        weights, bias = (x[:, own].to(features.device) for x in (self.weights, self.bias))
        score = einsum(features, weights, "row pos d, reader row d -> reader row pos")
        return score + bias[..., None]

    def moves(
        self, steering: Int[Tensor, " steering"], answers: Int[Tensor, " row"]
    ) -> Bool[Tensor, "steering row"]:
        """Return whether a steering's step has any length, for a row of that answer."""
        length = (self.steps != 0).any(-1)
        return length[self.slot[steering]][:, self._of_answers(answers)]

    def _of_answers(self, answers: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        answers = answers.cpu()
        return answers if self.weights.shape[1] > 1 else torch.zeros_like(answers)


def _by_answer(values: Float[Tensor, "*answer d"], n_answers: int) -> Tensor:
    return values.expand(n_answers, -1) if values.ndim == 1 else values


@dataclass(frozen=True, eq=False)
class RowHook:
    """A hook on one layer's `resid_post` whose rows have a steering each; see `SteerHook`."""

    stacked: StackedLayer = field(repr=False)
    steering: Int[Tensor, " label"] = field(repr=False)

    def __call__(self, resid: Float[Tensor, "row pos d_model"], hook: Any) -> Tensor:
        """Return the steered activations, each row's by its own steering."""
        window: Window = hook.ctx["window"]
        assert window.labels is not None and window.answers is not None
        steering = self.steering[window.labels.cpu()]
        rows = (self.stacked.slot[steering] >= 0).nonzero()[:, 0]
        if not len(rows):
            return resid
        everything = len(rows) == len(resid)
        here, there = rows.to(resid.device), resid.device
        some = resid if everything else resid[here]
        pace = _Pace.of(self.stacked, some, steering[rows], window, rows)
        self._leave(hook, pace, len(resid), here)
        moved = pace.amount != 0
        if not moved.any():
            return resid
        row, column = moved.nonzero().unbind(-1)
        before = some[row, column]
        step = self.stacked.steps.to(there)[pace.slot.to(there)[row], pace.own.to(there)[row]]
        shift = pace.amount[row, column, None] * step
        after = self.stacked.space.write(
            before, pace.features[row, column], shift, self.stacked.layer
        )
        steered = resid.clone()
        steered[here[row], column] = after
        hook.ctx["left"][-1]["shift"].index_add_(0, here[row], relative_shift(after, before))
        return steered

    @staticmethod
    def _leave(hook: Any, pace: "_Pace", n_rows: int, here: Tensor) -> None:
        """Leave for the decoding what it counts."""
        device, n_columns = here.device, pace.score.shape[1]
        left = {
            "moved": torch.zeros(n_rows, n_columns, dtype=torch.bool, device=device),
            "shift": torch.zeros(n_rows, device=device),
            "steerable": torch.zeros(n_rows, dtype=torch.long, device=device),
            "max_score": torch.full((n_rows,), -torch.inf, device=device),
        }
        left["moved"][here] = pace.amount != 0
        left["steerable"][here] = pace.scope.sum(-1)
        left["max_score"][here] = pace.score.masked_fill(~pace.scope, -torch.inf).amax(-1)
        hook.ctx.setdefault("left", []).append(left)


@dataclass(frozen=True, eq=False)
class _Pace:
    """How far the tokens of some rows move."""

    features: Float[Tensor, "row pos d"]
    score: Float[Tensor, "row pos"]
    scope: Bool[Tensor, "row pos"]
    amount: Float[Tensor, "row pos"]
    slot: Int[Tensor, " row"]
    own: Int[Tensor, " row"]
    """The unsteered answer, where steps depend on it."""

    @staticmethod
    def of(
        stacked: StackedLayer,
        resid: Float[Tensor, "row pos d_model"],
        steering: Int[Tensor, " row"],
        window: Window,
        rows: Int[Tensor, " row"],
    ) -> "_Pace":
        device, n_columns = resid.device, resid.shape[1]
        assert window.answers is not None
        own = stacked._of_answers(window.answers.cpu()[rows])
        slot = stacked.slot[steering]
        reader = stacked.reader[slot]
        features = stacked.space.read(resid, stacked.layer)
        weights, bias = (x[reader, own].to(device) for x in (stacked.weights, stacked.bias))
        score = einsum(features, weights, "row pos d, row d -> row pos") + bias[:, None]
        columns = torch.stack([columns_of(each, window, n_columns) for each in stacked.scopes])
        scope = columns[stacked.scope[steering]].to(device)
        scope &= window.real.to(device)[rows.to(device)]
        amount = torch.zeros_like(score)
        rule = stacked.rule[steering]
        for number in rule.unique().tolist():
            these = (rule == number).to(device)
            amount[these] = stacked.rules[number].amount(score[these])
        amount *= scope & (stacked.steps[slot, own] != 0).any(-1).to(device)[:, None]
        return _Pace(features, score, scope, amount, slot, own)
