"""Steering = probe x direction x rule x space: a list of TransformerLens hooks and nothing else.

The probe says whether and how far, the direction which way, the rule turns both into a shift, the
space writes it back. A `Steering` is a frozen value; `at(threshold)` gives another one.
"""

import math
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from mera_tl.inference.decoding import Window
from mera_tl.inference.variants import OptionTokens, single_tokens
from mera_tl.models.model import Model, resid_post
from mera_tl.probes.probe import LinearProbe
from mera_tl.steering.attach import Attachment, attach_hooks
from mera_tl.steering.rules import Adaptive, Gated, Rule
from mera_tl.steering.spaces import ResidualSpace, Space

DENSE = 64
"""Tokens up to which a pass is steered as a whole where all of them move."""

Positions = Literal["all", "last", "final", "generated"]


@dataclass(frozen=True, eq=False, repr=False)
class Steering:
    """What to steer, which way, how far and where; steers nothing until it is given a limit."""

    probe: LinearProbe
    direction: Float[Tensor, "*option layer d_model"] | None = None
    """One direction per layer, or per (unsteered answer, layer); None is the paper's `d = w`."""
    rule: Rule = field(default_factory=Adaptive)
    space: Space = field(default_factory=ResidualSpace)
    layers: Literal["all", "best"] | tuple[int, ...] = "all"
    """All layers, the probe's best one, or these."""
    positions: Positions = "all"
    """Every token; from the final prompt token on (last); that token alone (final); or generated
    tokens only."""
    certificate: Any = field(default=None, init=False, compare=False)
    """What is promised of this very steering, if anything; `replace` and `at` drop it."""

    def __post_init__(self) -> None:
        if not isinstance(self.probe, LinearProbe):
            raise ValueError(
                f"{self.probe!r:.60} is no probe; pass one, as Steering(fit_error_probe(...))."
            )
        n_layers = self.probe.n_layers
        if isinstance(self.layers, tuple):
            wrong = [layer for layer in self.layers if not 0 <= layer < n_layers]
            if wrong or not self.layers:
                raise ValueError(
                    f"layers={self.layers} but the probe has {n_layers} layers, numbered 0 to "
                    f"{n_layers - 1}; pass layers=({n_layers - 1},) for the last."
                )
            without = sorted(set(self.layers) - set(self.space.layers or self.layers))
            if without:
                raise ValueError(
                    f"layers={self.layers} but there is no SAE of layer {without[0]}, only of "
                    f"{', '.join(map(str, self.space.layers or ()))}; choose among them."
                )
        elif self.layers not in ("all", "best"):
            raise ValueError(
                f'layers={self.layers!r} is not "all", "best" or a tuple of layer numbers.'
            )
        if self.positions not in get_args(Positions):
            wanted = ", ".join(get_args(Positions))
            raise ValueError(f"positions={self.positions!r} is none of {wanted}.")
        shape = self.probe.weights.shape[-2:]
        if self.direction is not None and self.direction.shape[-2:] != shape:
            raise ValueError(
                f"A direction of shape {tuple(self.direction.shape)} does not fit a probe of shape "
                f"{tuple(shape)}; derive both from the same activations."
            )

    def __repr__(self) -> str:
        which = "along w" if self.direction is None else "along its own direction"
        if self.probe.per_answer or (self.direction is not None and self.direction.ndim == 3):
            which += " per answer"
        layers = self.layers if isinstance(self.layers, str) else ",".join(map(str, self.layers))
        return (
            f"Steering({self.probe.kind} probe at {self.probe.position}, {which}, {self.rule}, "
            f"{self.space.name} space, layers {layers}, positions {self.positions}"
            + ("" if self.certificate is None else f", {type(self.certificate).__name__}")
            + ")"
        )

    def _repr_html_(self) -> str:
        return f"<b>{escape(repr(self))}</b>"

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The layers that are steered, in order."""
        if self.layers == "all":
            return self.space.layers or tuple(range(self.probe.n_layers))
        if self.layers == "best":
            return (self.probe.best_layer,)
        return tuple(sorted(set(self.layers)))  # pyright: ignore[reportArgumentType]

    def at(self, threshold: float) -> "Steering":
        """Return the same steering at `threshold` (the paper's alpha): MERA's rule, or a gate.

        Raises:
            ValueError: if the threshold, a predicted error, is not in (0, 1), or the rule has none.
        """
        if not isinstance(self.rule, Adaptive | Gated):
            raise ValueError(
                f"{self.rule} moves every token whatever is predicted, so it has no threshold; "
                "pass rule=Adaptive() or Gated() to steer at one."
            )
        if not 0 < threshold < 1:
            raise ValueError(
                f"threshold={threshold} is not a predicted error strictly between 0 and 1."
            )
        limit = torch.logit(torch.tensor(threshold)).item()
        return replace(self, rule=replace(self.rule, limit=limit))

    def with_certificate(self, certificate: Any) -> "Steering":
        """Return this steering with the certificate that was issued for it."""
        steering = replace(self)
        # Not an argument of the constructor, so that a change of anything else drops it.
        object.__setattr__(steering, "certificate", certificate)
        return steering

    def check(self, model: Any) -> None:
        """Refuse a model other than the one this steering was certified for, or fitted on.

        Raises:
            ValueError: naming what differs.
        """
        (self.probe if self.certificate is None else self.certificate).check(model)

    def fwd_hooks(self) -> list[tuple[str, "SteerHook"]]:
        """Return the hooks, for `evaluate` or `HookedTransformer.hooks(fwd_hooks=...)`.

        Warns where the rule has no limit yet: such hooks read scores and move nothing.
        """
        if self.limit == math.inf:
            warnings.warn(
                "This steering has no threshold yet, so its hooks move nothing; choose one with "
                "steering.at(threshold) or mera_tl.calibrate, or call reading_hooks() to read "
                "scores only.",
                stacklevel=2,
            )
        return self._hooks()

    def checked_hooks(self, model: Model) -> list[tuple[str, "SteerHook"]]:
        """Return the hooks for this model; those of a steering without a limit only read.

        Raises:
            ValueError: if the steering was certified for, or its probe fitted on, another model.
        """
        self.check(model)
        return self._hooks()

    def reading_hooks(self) -> list[tuple[str, "SteerHook"]]:
        """Return hooks that read every score in scope and move nothing, bit for bit."""
        return replace(self, rule=Adaptive())._hooks()

    @property
    def limit(self) -> float:
        """The score above which a token is moved; -inf for a rule that moves every one."""
        return self.rule.limit if isinstance(self.rule, Adaptive | Gated) else -math.inf

    def attach(
        self, model: Any, *, log: str | Path | None = None, options: OptionTokens | None = None
    ) -> AbstractContextManager[Attachment]:
        """Steer a model of any kind for the length of a `with` block.

        `model` is a `mera_tl.Model`, a `HookedTransformer`, a `TransformerBridge`, or any
        decoder-only model of transformers; call its forward or `generate` as ever, in batches
        padded on either side, with beams, draws, with or without a cache. `log` is a file to which
        every prompt adds a line of JSON (see `Generation.records`). A steering that depends on the
        unsteered answer needs the `options` (certified on a `mera_tl.Model`, it knows them), and
        then runs every prompt once more.

        Raises:
            ValueError: as `attach_hooks`, or if a `mera_tl.Model` is not the one certified.
        """
        if isinstance(model, Model):
            self.check(model)
            options = options or self.options(model)
        return attach_hooks(model, self.fwd_hooks(), log=log, options=options)

    def options(self, model: Model) -> OptionTokens | None:
        """Return the tokens of the options that it was certified with.

        None if it was not, or if answers were read as whole options (readout "options"), which
        takes more than the logits of one pass.
        """
        setup = getattr(self.certificate, "setup", None) or {}
        readout = (setup.get("readout") or {}).get("readout", "options")
        if readout == "options":
            return None
        tokens = single_tokens(model, setup["options"], first=readout == "exact")
        return OptionTokens(tuple(setup["options"]), model.tokenizer, tokens)

    def _hooks(self) -> list[tuple[str, "SteerHook"]]:
        return [(resid_post(layer), self.hook(layer)) for layer in self.layer_numbers]

    def hook(self, layer: int) -> "SteerHook":
        """Return the hook of one layer."""
        weights = self.probe.weights[..., layer, :].float()
        bias = self.probe.bias[..., layer].float()
        direction = weights if self.direction is None else self.direction[..., layer, :].float()
        w, d = torch.broadcast_tensors(weights, direction)
        # One unit of strength is as long in the residual stream, whatever the space.
        unit = self.probe.resid_norm[layer] * self.space.stretch(d, layer)
        step = self.rule.step(w, d, unit)
        return SteerHook(layer, weights, bias, step, self.rule, self.space, self.positions)


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

    def to(self, device: torch.device) -> "SteerHook":
        """Return the same hook with its vectors on a device."""
        moved = {n: getattr(self, n).to(device) for n in ("weights", "bias", "step")}
        return replace(self, **moved)

    @property
    def per_answer(self) -> bool:
        """Whether the unsteered answer must be known, for the direction or for the probe."""
        return self.step.ndim == 2

    @cached_property
    def _always_steps(self) -> bool:
        """Whether no answer has an empty direction; asked once, not at every token."""
        return bool((self.step != 0).any(-1).all())

    def __call__(self, resid: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
        """Return the steered activation."""
        window = hook.ctx.get("window")
        span = self._columns(resid.shape[1], window)
        if span.start >= span.stop or (
            self.per_answer and getattr(window, "answers", None) is None
        ):
            return resid
        is_whole = span == slice(0, resid.shape[1])
        here = resid if is_whole else resid[:, span]
        features, score = self.read(here, window)
        amount = self.rule.amount(score)
        step = self._for_rows(self.step, window).to(here.device)[:, None]
        moved = amount != 0
        if not self._always_steps:
            moved = moved & (step != 0).any(-1)
        if window is not None:
            inside = self._inside(span, window).to(here.device)
            moved = moved & inside
            margin = (span.start, resid.shape[1] - span.stop)
            hook.ctx["moved"] = moved if is_whole else torch.nn.functional.pad(moved, margin)
            hook.ctx["shift"] = torch.zeros(len(here), device=here.device)
            hook.ctx["steerable"] = inside.sum(-1)
            hook.ctx["peak"] = score.masked_fill(~inside, -torch.inf).amax(-1)
        n_moved = int(moved.sum())
        if not n_moved:
            return resid
        if n_moved == moved.numel() <= DENSE:
            # A decoded token: picking what moves would cost more than moving it.
            steered_here = self.space.write(here, features, amount[..., None] * step, self.layer)
            if window is not None:
                hook.ctx["shift"] = _relative(steered_here, here).sum(-1)
            return (
                steered_here
                if is_whole
                else torch.cat([resid[:, : span.start], steered_here, resid[:, span.stop :]], dim=1)
            )
        # Only the tokens that move are written: the others stay bit-equal, and cost nothing.
        shift = amount[moved][:, None] * step.expand_as(features)[moved]
        before = here[moved]
        after = self.space.write(before, features[moved], shift, self.layer)
        steered = resid.clone()
        steered[:, span][moved] = after
        if window is not None:
            rows = moved.nonzero()[:, 0]
            hook.ctx["shift"].index_add_(0, rows, _relative(after, before))
        return steered

    def read(
        self, resid: Float[Tensor, "batch pos d_model"], window: Window | None
    ) -> tuple[Float[Tensor, "batch pos d"], Float[Tensor, "batch pos"]]:
        """Return features and the probe's score of some columns."""
        features = self.space.read(resid, self.layer)
        weights = self._for_rows(self.weights, window).to(resid.device)
        bias = self._for_rows(self.bias[..., None], window).to(resid.device)
        if len(weights) == 1:  # the same for all rows
            return features, features @ weights[0] + bias
        return features, einsum(features, weights, "batch pos d, batch d -> batch pos") + bias

    @staticmethod
    def _for_rows(
        values: Float[Tensor, "*option d"], window: Window | None
    ) -> Float[Tensor, "#batch d"]:
        """Return what holds for every row of a pass, where it depends on the unsteered answer."""
        if values.ndim == 1:
            return values[None]
        assert window is not None and window.answers is not None  # __call__ has looked
        return values[window.answers.to(values.device)]

    def _columns(self, n_columns: int, window: Window | None) -> slice:
        """Return the columns of a pass that hold everything in scope."""
        n_prompt = (n_columns if n_columns > 1 else 0) if window is None else window.n_prompt
        ends = None if window is None else window.ends
        first_end = n_prompt if ends is None else int(ends.min())
        start = first_column(self.positions, first_end, n_columns)
        stop = min(n_prompt, n_columns) if self.positions == "final" else n_columns
        return slice(start, stop)

    def _inside(self, span: slice, window: Window) -> Bool[Tensor, "batch pos"]:
        """Return which tokens of these columns are in scope, row by row."""
        real = window.real[:, span]
        if window.ends is None or self.positions == "all":
            return real
        column = torch.arange(span.start, span.stop, device=real.device)
        final = window.ends.to(real.device)[:, None] - 1
        in_scope = {"last": column >= final, "final": column == final, "generated": column > final}
        return real & in_scope[self.positions]


def _relative(
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
