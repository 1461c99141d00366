"""Steering = probe x direction x rule x space: a list of TransformerLens hooks and nothing else.

The probe says whether and how far, the direction which way, the rule turns both into a shift, the
space writes it back. A `Steering` is a frozen value; `at(threshold)` gives another one.
"""

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from html import escape
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mera_tl.inference.variants import OptionTokens
from mera_tl.models.model import Model, resid_post
from mera_tl.probes.probe import LinearProbe
from mera_tl.steering.attach import Attachment, attach_hooks
from mera_tl.steering.hook import Positions, SteerHook
from mera_tl.steering.rules import Adaptive, Gated, Rule
from mera_tl.steering.spaces import ResidualSpace, Space


@dataclass(frozen=True, eq=False, repr=False)
class Steering:
    """What to steer, which way, how far and where; steers nothing until it is given a limit.

    As `Steering(probe, direction.vectors, layers="best", positions="last").at(0.3)`: above a
    predicted error of 0.3. `fwd_hooks()` are hooks of TransformerLens, `attach(model)` acts on any.

    Raises:
        ValueError: if a part is not of its kind, the direction has not the probe's shape, or the
            probe (or the space) has no such layer.
    """

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
    first_k: int | None = None
    """Of the generated tokens only the first so many; None is all."""
    certificate: Any = field(default=None, init=False, compare=False)
    """What is promised of this very steering, if anything; `replace` and `at` drop it."""

    def __post_init__(self) -> None:
        if not isinstance(self.probe, LinearProbe):
            raise ValueError(
                f"{self.probe!r:.60} is no probe; pass one, as Steering(fit_error_probe(...))."
            )
        for name, kind in (("rule", Rule), ("space", Space)):
            if not isinstance(value := getattr(self, name), kind):
                advice = {"rule": "Adaptive()", "space": "load_saes(...)"}[name]
                raise ValueError(f"{name}={value!r:.60} is no {name}; pass one, as {advice}.")
        if not isinstance(self.direction, Tensor | None):
            raise ValueError(
                f"direction={self.direction!r:.60} is no tensor; pass the vectors of one, as "
                "fit_direction(activations, probe, kind).vectors."
            )
        n_layers = self.probe.n_layers
        if isinstance(self.layers, tuple):
            wrong = [layer for layer in self.layers if layer not in range(n_layers)]
            if wrong or not self.layers:
                raise ValueError(
                    f"layers={self.layers} but the probe has {n_layers} layers, numbered 0 to "
                    f"{n_layers - 1}; pass layers=({n_layers - 1},) for the last."
                )
        elif self.layers not in ("all", "best"):
            raise ValueError(
                f'layers={self.layers!r} is not "all", "best" or a tuple of layer numbers, as (1,).'
            )
        without = sorted(set(self.layer_numbers) - set(self.space.layers or self.layer_numbers))
        if without:
            raise ValueError(
                f"layers={self.layers} but there is no SAE of layer {without[0]}, only of "
                f"{', '.join(map(str, self.space.layers or ()))}; choose among them."
            )
        if self.positions not in get_args(Positions):
            wanted = ", ".join(get_args(Positions))
            raise ValueError(f"positions={self.positions!r} is none of {wanted}.")
        if not isinstance(self.first_k, Integral | None) or (self.first_k or 0) < 0:
            raise ValueError(
                f"first_k={self.first_k!r} is no number of generated tokens; pass one, 0 or more."
            )
        shape = self.probe.weights.shape[-2:]
        if self.direction is not None and self.direction.shape[-2:] != shape:
            raise ValueError(
                f"A direction of shape {tuple(self.direction.shape)} does not fit a probe of shape "
                f"{tuple(shape)}; derive both from the same activations."
            )

        counts = [len(each) for each in (self.probe.weights, self.direction) if _is_many(each)]
        if len(set(counts)) > 1:
            raise ValueError(
                f"The probe knows {counts[0]} answers and the direction {counts[1]}; derive both "
                "from the same activations."
            )

    def __repr__(self) -> str:
        which = "along w" if self.direction is None else "along its own direction"
        if self.per_answer:
            which += " per answer"
        layers = self.layers if isinstance(self.layers, str) else ",".join(map(str, self.layers))
        several = "" if isinstance(self.layers, tuple) and len(self.layers) == 1 else "s"
        rule = repr(self.rule)
        if isinstance(self.rule, Adaptive | Gated):  # its limit as `at` takes it
            odds = torch.tensor(self.limit, dtype=torch.float64)
            at = "no threshold" if self.limit == math.inf else f"threshold {odds.sigmoid():.3g}"
            rule = f"{type(self.rule).__name__} at {at}".replace("at no", "with no")
            rule += f", strength {self.rule.strength:g}" if isinstance(self.rule, Gated) else ""
        return (
            f"Steering({self.probe.kind} probe at {self.probe.position}, {which}, {rule}, "
            f"{self.space.name} space, layer{several} {layers}, positions {self.positions}"
            + ("" if self.first_k is None else f" to generated token {self.first_k}")
            + ("" if self.certificate is None else f", {type(self.certificate).__name__}")
            + ")"
        )

    def _repr_html_(self) -> str:
        promise = "" if self.certificate is None else str(self.certificate).partition("\n")[0]
        return f"<b>{escape(repr(self))}</b>" + (f"<br>{escape(promise)}" if promise else "")

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The layers that are steered, in order."""
        if self.layers == "all":
            return self.space.layers or tuple(range(self.probe.n_layers))
        if self.layers == "best":
            return (self.probe.best_layer,)
        return tuple(sorted(set(self.layers)))  # pyright: ignore[reportArgumentType]

    @property
    def per_answer(self) -> bool:
        """Whether it depends on the unsteered answer, by its probe or by its direction."""
        return self.n_answers is not None

    @property
    def n_answers(self) -> int | None:
        """How many unsteered answers it has a direction or a probe for; None if for none."""
        return next((len(v) for v in (self.direction, self.probe.weights) if _is_many(v)), None)

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
        is_error = isinstance(threshold, Real) and 0 < threshold < 1
        limit = torch.logit(torch.tensor(threshold)).item() if is_error else math.inf
        if not math.isfinite(limit):  # in float32 also of what is all but 0 or 1
            raise ValueError(
                f"threshold={threshold!r} is not a predicted error strictly between 0 and 1."
            )
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

        Warns where they read scores and move nothing: the rule has no limit yet, or along the
        direction the probe's score falls in none of the layers.
        """
        if self.limit == math.inf:
            warnings.warn(
                "This steering has no threshold yet, so its hooks move nothing; choose one with "
                "steering.at(threshold) or mera_tl.calibrate, or call reading_hooks() to read "
                "scores only.",
                stacklevel=2,
            )
        hooks = self._hooks()
        if len(self._idle(hooks)) == len(hooks):
            warnings.warn(
                f"MERA's rule moves nothing here (layers {', '.join(map(str, self.layer_numbers))})"
                ": along this direction the probe's score does not fall; pass other layers or "
                "another direction, or rule=Gated().",
                stacklevel=2,
            )
        return hooks

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
    def idle_layers(self) -> tuple[int, ...]:
        """Steered layers where MERA's rule moves nothing: the score does not fall along `d`."""
        return self._idle(self._hooks())

    def _idle(self, hooks: Sequence[tuple[str, "SteerHook"]]) -> tuple[int, ...]:
        if not isinstance(self.rule, Adaptive):
            return ()
        return tuple(hook.layer for _, hook in hooks if not hook.step.any())

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
        unsteered answer runs every prompt once more; it needs the `options`, and knows those that
        it was certified with. A certificate was judged on greedy replies: where `generate` draws or
        penalises by the model's own generation_config, that is warned of.

        Raises:
            ValueError: as `attach_hooks`, or if the model is not the one certified or fitted on.
        """
        self.check(model)
        told: dict[str, Any] = {"log": log, "options": options or self.options}
        # What was loaded without its certificate holds the reason in its place.
        told["certified"] = hasattr(self.certificate, "terms")
        return attach_hooks(model, self.fwd_hooks(), **told)

    @property
    def options(self) -> OptionTokens | None:
        """The tokens of the options that it was certified with; None if it was not."""
        setup = getattr(self.certificate, "setup", None) or {}
        if "answers" not in setup:
            return None
        tokens = tuple(map(tuple, setup["answers"]["tokens"]))
        whole = tuple(tuple(map(tuple, each)) for each in setup["answers"]["continuations"])
        return OptionTokens(tuple(setup["options"]), None, tokens, whole)

    def _hooks(self) -> list[tuple[str, "SteerHook"]]:
        return [(resid_post(layer), self.hook(layer)) for layer in self.layer_numbers]

    def hook(self, layer: int) -> "SteerHook":
        """Return the hook of one layer."""
        weights = self.probe.weights[..., layer, :].float()
        bias = self.probe.bias[..., layer].float()
        direction = weights if self.direction is None else self.direction[..., layer, :].float()
        # No score compares with NaN, and so nothing would be moved, in silence.
        for name, part in {"probe": weights, "probe's bias": bias, "direction": direction}.items():
            if not torch.isfinite(part).all():
                raise ValueError(
                    f"The {name} of layer {layer} holds NaN or infinity; fit it on finite numbers."
                )
        w, d = torch.broadcast_tensors(weights, direction)
        # One unit of strength is as long in the residual stream, whatever the space.
        unit = self.probe.resid_norm[layer] * self.space.stretch(d, layer)
        step = self.rule.step(w, d, unit)
        where = (self.positions, self.first_k)
        return SteerHook(layer, weights, bias, step, self.rule, self.space, *where)


def _is_many(values: Tensor | None) -> TypeGuard[Tensor]:
    """Whether there are vectors for each unsteered answer."""
    return values is not None and values.ndim == 3
