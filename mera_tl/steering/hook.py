"""One hook of a steering: what it reads of a pass, what it moves there, and what that came to."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from mera_tl.inference.decoding import Window
from mera_tl.steering.rules import Rule
from mera_tl.steering.spaces import Space

DENSE = 64
"""Tokens up to which a pass is steered as a whole where all of them move."""

Positions = Literal["all", "last", "final", "generated"]


@dataclass(frozen=True, eq=False)
class SteerHook:
    """A hook on one layer's `resid_post`.

    Inside `evaluate` it knows padding and prompt from the window; elsewhere a pass of several
    columns is taken as a prompt without padding, a pass of one column as a decoded token.
    """

    layer: int
    # TransformerLens names every hook it puts on by its repr: printing tensors took longer than
    # running a small model.
    weights: Float[Tensor, "*#option d"] = field(repr=False)
    bias: Float[Tensor, "*#option"] = field(repr=False)
    step: Float[Tensor, "*option d"] = field(repr=False)
    rule: Rule
    space: Space
    positions: Positions
    first_k: int | None = None
    """Generated tokens that may be moved, the first so many; None is all."""

    def to(self, device: torch.device) -> "SteerHook":
        """Return the same hook with its vectors on a device."""
        moved = {n: getattr(self, n).to(device) for n in ("weights", "bias", "step")}
        return replace(self, **moved)

    @property
    def per_answer(self) -> bool:
        """Whether the unsteered answer must be known, for the direction or for the probe."""
        return self.step.ndim == 2

    @property
    def n_answers(self) -> int | None:
        """How many unsteered answers it knows; None where it depends on none."""
        return len(self.step) if self.per_answer else None

    @cached_property
    def _always_steps(self) -> bool:
        """Whether no answer has an empty direction; asked once, not at every token."""
        return bool((self.step != 0).any(-1).all())

    def __call__(self, resid: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
        """Return the steered activation; leave in `hook.ctx` what was done, where a window is."""
        window = hook.ctx.get("window")
        move = self.move(resid, window, self.scope(resid.shape[1], window))
        if move is not None and window is not None:
            hook.ctx.setdefault("left", []).append(move.counts())
        return resid if move is None else move.resid

    def scope(self, n_columns: int, window: Window | None) -> "Scope":
        """Return what of a pass may be moved; the same for all hooks of a steering."""
        columns = self._columns(n_columns, window)
        return Scope(columns, None if window is None else self._inside(columns, window))

    def move(
        self, resid: Float[Tensor, "batch pos d_model"], window: Window | None, scope: "Scope"
    ) -> "Move | None":
        """Return what the rule makes of a pass; None where there is nothing in scope."""
        span = scope.columns
        if span.start >= span.stop or (
            self.per_answer and getattr(window, "answers", None) is None
        ):
            return None
        is_whole = span == slice(0, resid.shape[1])
        here = resid if is_whole else resid[:, span]
        features, score = self.read(here, window)
        amount = self.rule.amount(score)
        step = self._for_rows(self.step, window).to(here.device)
        moved = amount != 0
        if not self._always_steps:
            moved = moved & (step != 0).any(-1)
        if scope.inside is not None:
            moved = moved & scope.inside.to(here.device)
        n_moved = int(moved.sum())
        if not n_moved:
            return Move(resid, scope, score, moved)
        if n_moved == moved.numel() <= DENSE:
            # A decoded token: picking what moves would cost more than moving it.
            after = self.space.write(here, features, amount[..., None] * step, self.layer)
            steered = after
            if not is_whole:
                steered = torch.cat([resid[:, : span.start], after, resid[:, span.stop :]], dim=1)
            return Move(steered, scope, score, moved, here, after)
        # Only the tokens that move are written: the others stay bit-equal, and cost nothing.
        shift = amount[moved][:, None] * step.expand_as(features)[moved]
        before = here[moved]
        after = self.space.write(before, features[moved], shift, self.layer)
        steered = resid.clone()
        steered[:, span][moved] = after
        return Move(steered, scope, score, moved, before, after)

    def read(
        self, resid: Float[Tensor, "batch pos d_model"], window: Window | None
    ) -> tuple[Float[Tensor, "batch pos d"], Float[Tensor, "batch pos"]]:
        """Return features and the probe's score of some columns."""
        features = self.space.read(resid, self.layer)
        check_width(features, self.weights, self.layer)
        weights = self._for_rows(self.weights, window).to(resid.device)
        if weights.ndim == 1:  # the same for all rows
            return features, features @ weights + self.bias.to(resid.device)
        bias = self._for_rows(self.bias[..., None], window).to(resid.device)[..., 0]
        if len(weights) == 1:
            return features, features @ weights[0, 0] + bias
        score = einsum(features, weights[:, 0], "batch pos d, batch d -> batch pos")
        return features, score + bias

    @staticmethod
    def _for_rows(
        values: Float[Tensor, "*option d"], window: Window | None
    ) -> Float[Tensor, "*batch_one d"]:
        """Return what holds for every row of a pass, where it depends on the unsteered answer."""
        if values.ndim == 1:
            return values
        assert window is not None and window.answers is not None  # `move` has looked
        return values[window.answers.to(values.device)][:, None]

    def _columns(self, n_columns: int, window: Window | None) -> slice:
        """Return the columns of a pass that hold everything in scope."""
        if self.per_answer and window is None:
            raise ValueError(
                "This steering depends on the option that the model is about to answer, which a "
                "hook that is called from outside cannot know; use evaluate, generate or "
                "steering.attach(model)."
            )
        n_prompt = (n_columns if n_columns > 1 else 0) if window is None else window.n_prompt
        ends = None if window is None else window.ends
        first_end = n_prompt if ends is None else int(ends.min())
        start = first_column(self.positions, first_end, n_columns)
        if self.first_k is not None and window is None:
            raise ValueError(
                f"first_k={self.first_k} counts generated tokens, and a hook that is called from "
                "outside cannot; use evaluate, generate or steering.attach(model)."
            )
        k = 0 if self.positions == "final" else self.first_k
        if ends is not None and k:  # rows end at different columns: `_inside` counts
            k = None
        n_before = 0 if window is None else window.n_before
        return slice(start, last_column(k, n_prompt, n_columns, n_before))

    def _inside(self, span: slice, window: Window) -> Bool[Tensor, "batch pos"]:
        """Return which tokens of these columns are in scope, row by row."""
        real = window.real
        if window.ends is None:
            return real[:, span]
        column = torch.arange(real.shape[1], device=real.device)
        final = window.ends.to(real.device)[:, None] - 1
        in_scope = {"last": column >= final, "final": column == final, "generated": column > final}
        inside = real & in_scope.get(self.positions, True)
        if self.first_k is not None:
            generated = real & (column > final)
            number = window.n_before + generated.cumsum(1)  # from 1 on; padding in between is none
            inside &= ~generated | (number <= self.first_k)
        return inside[:, span]


@dataclass(frozen=True, eq=False)
class Scope:
    """The part of a pass that a steering may move."""

    columns: slice
    """Those that hold everything in scope."""
    inside: Bool[Tensor, "batch pos"] | None
    """Which of their tokens are, row by row; None for all."""


class Move(NamedTuple):
    """What one hook did in one pass."""

    resid: Float[Tensor, "batch pos d_model"]
    """The activation as it goes on, all columns of it."""
    scope: Scope
    score: Float[Tensor, "batch scope"]
    """The probe's, of every column in scope."""
    moved: Bool[Tensor, "batch scope"]
    before: Float[Tensor, "*tokens d_model"] | None = None
    """The tokens that moved, row by row; None where none did."""
    after: Float[Tensor, "*tokens d_model"] | None = None

    def counts(self) -> dict[str, Tensor]:
        """Return what `Decoding` counts: tokens moved and in scope, shifts, highest scores."""
        inside = self.scope.inside
        assert inside is not None  # a pass without a window is not counted
        inside = inside.to(self.moved.device)
        shift = torch.zeros(len(self.moved), device=self.moved.device)
        if self.after is not None and self.before is not None:
            relative = relative_shift(self.after, self.before)
            if relative.ndim == 2:
                shift = relative.sum(-1)
            else:
                shift.index_add_(0, self.moved.nonzero()[:, 0], relative)
        span = self.scope.columns
        margin = (span.start, self.resid.shape[1] - span.stop)
        return {
            "moved": torch.nn.functional.pad(self.moved, margin) if any(margin) else self.moved,
            "shift": shift,
            "steerable": inside.sum(-1),
            "max_score": self.score.masked_fill(~inside, -torch.inf).amax(-1),
        }


def check_width(
    features: Float[Tensor, "*rows d"], weights: Float[Tensor, "*some d_probe"], layer: int
) -> None:
    """Refuse features of another number than a probe reads."""
    if features.shape[-1] != weights.shape[-1]:
        raise ValueError(
            f"This probe reads {weights.shape[-1]} features of layer {layer}, which has "
            f"{features.shape[-1]} here; fit a probe on this model, in the space that is steered."
        )


def relative_shift(
    after: Float[Tensor, "*tokens d_model"], before: Float[Tensor, "*tokens d_model"]
) -> Float[Tensor, "*tokens"]:
    """Return the length of a shift relative to what it moved."""
    size = before.float().norm(dim=-1).clamp(min=1e-12)
    return (after - before).float().norm(dim=-1) / size


def first_column(positions: str, n_prompt: int, n_columns: int) -> int:
    """Return the first column of a pass that is in scope; `n_columns` where none is."""
    last = max(0, n_prompt - 1)
    final = last if n_prompt else n_columns
    return {"all": 0, "last": last, "final": final, "generated": n_prompt}[positions]


def last_column(first_k: int | None, n_prompt: int, n_columns: int, n_before: int) -> int:
    """Return where a pass ends for a scope of so many generated tokens, `n_before` of them past."""
    if first_k is None:
        return n_columns
    return min(n_columns, n_prompt + max(0, first_k - n_before))
