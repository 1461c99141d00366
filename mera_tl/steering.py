"""Steering = probe x direction x rule x space: a list of TransformerLens hooks and nothing else.

The probe says whether and how far, the direction which way, the rule turns both into a shift, the
space writes it back. A `Steering` is a frozen value; `at(threshold)` gives another one.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mera_tl.decoding import Window
from mera_tl.models import resid_post
from mera_tl.probes import LinearProbe
from mera_tl.rules import Adaptive, Rule
from mera_tl.spaces import ResidualSpace, Space

Positions = Literal["all", "last", "generated"]


@dataclass(frozen=True, eq=False)
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
    """Every token; from the final prompt token on (last); or generated tokens only."""

    def __post_init__(self) -> None:
        n_layers = self.probe.weights.shape[0]
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
        if self.positions not in ("all", "last", "generated"):
            raise ValueError(f'positions={self.positions!r} is not "all", "last" or "generated".')
        if self.direction is not None and self.direction.shape[-2:] != self.probe.weights.shape:
            raise ValueError(
                f"A direction of shape {tuple(self.direction.shape)} does not fit a probe of shape "
                f"{tuple(self.probe.weights.shape)}; derive both from the same activations."
            )

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The layers that are steered, in order."""
        if self.layers == "all":
            return self.space.layers or tuple(range(self.probe.weights.shape[0]))
        if self.layers == "best":
            return (self.probe.best_layer,)
        return tuple(sorted(set(self.layers)))  # pyright: ignore[reportArgumentType]

    def at(self, threshold: float) -> "Steering":
        """Return the same steering with MERA's rule at `threshold` (the paper's alpha).

        Raises:
            ValueError: if the threshold, a predicted error, is not in (0, 1).
        """
        if not 0 < threshold < 1:
            raise ValueError(
                f"threshold={threshold} is not a predicted error strictly between 0 and 1."
            )
        return replace(self, rule=Adaptive(limit=torch.logit(torch.tensor(threshold)).item()))

    def fwd_hooks(self) -> list[tuple[str, "SteerHook"]]:
        """Return the hooks, for `evaluate` or `HookedTransformer.hooks(fwd_hooks=...)`."""
        return [(resid_post(layer), self._hook(layer)) for layer in self.layer_numbers]

    def _hook(self, layer: int) -> "SteerHook":
        weights = self.probe.weights[layer].float()
        direction = weights if self.direction is None else self.direction[..., layer, :].float()
        # One unit of strength is as long in the residual stream, whatever the space.
        unit = self.probe.resid_norm[layer] * self.space.stretch(direction, layer)
        step = self.rule.step(weights.expand_as(direction), direction, unit)
        return SteerHook(
            layer,
            weights,
            self.probe.bias[layer].float(),
            step,
            self.rule,
            self.space,
            self.positions,
        )


@dataclass(frozen=True, eq=False)
class SteerHook:
    """A hook on one layer's `resid_post`.

    Inside `evaluate` it knows padding and prompt from the window; elsewhere a pass of several
    columns is taken as a prompt without padding, a pass of one column as a decoded token.
    """

    layer: int
    weights: Float[Tensor, " d"]
    bias: Float[Tensor, ""]
    step: Float[Tensor, "*option d"]
    rule: Rule
    space: Space
    positions: Positions

    @property
    def per_answer(self) -> bool:
        """Whether the direction depends on the unsteered answer, which must then be known."""
        return self.step.ndim == 2

    def __call__(self, resid: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
        """Return the steered activation."""
        window = hook.ctx.get("window")
        start = self._first_column(resid.shape[1], window)
        if start >= resid.shape[1] or (
            self.per_answer and getattr(window, "answers", None) is None
        ):
            return resid
        here = resid[:, start:]
        features = self.space.read(here, self.layer)
        score = einsum(features, self.weights.to(here.device), "batch pos d, d -> batch pos")
        score = score + self.bias.to(here.device)
        amount = self.rule.amount(score)
        step = self._steps(window).to(here.device)
        moved = (amount != 0) & (step != 0).any(-1)
        if window is not None:
            real = window.real[:, start:].to(here.device)
            hook.ctx["steered"] = (moved & real).sum(-1)
            hook.ctx["steerable"] = real.sum(-1)
            hook.ctx["peak"] = score.masked_fill(~real, -torch.inf).amax(-1)
        if not moved.any():
            return resid
        # Only the tokens that move are written: the others stay bit-equal, and cost nothing.
        shift = amount[moved][:, None] * step.expand_as(features)[moved]
        steered = resid.clone()
        steered[:, start:][moved] = self.space.write(
            here[moved], features[moved], shift, self.layer
        )
        return steered

    def _steps(self, window: Window | None) -> Float[Tensor, "#batch #pos d"]:
        """Return the shift of amount one for every token of a pass."""
        if not self.per_answer:
            return self.step[None, None]
        assert window is not None and window.answers is not None  # __call__ has looked
        return self.step[window.answers][:, None]

    def _first_column(self, n_columns: int, window: Window | None) -> int:
        n_prompt = (n_columns if n_columns > 1 else 0) if window is None else window.n_prompt
        return {"all": 0, "last": max(0, n_prompt - 1), "generated": n_prompt}[self.positions]
