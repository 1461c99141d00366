"""The terms of a certificate: all that must be fixed before a calibration outcome is seen.

A guarantee over a grid of thresholds holds because the grid, the confidence, the metric and the
test do not depend on the outcomes. `Protocol` is where they are written down. Only `min_gain` may
be chosen afterwards.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mera_tl.certificate.bounds import BOUNDS, uniform_weights


def _even_in_logit(first: float, last: float, count: int) -> tuple[float, ...]:
    low, high = (math.log(t / (1 - t)) for t in (first, last))
    logits = [low + (high - low) * i / (count - 1) for i in range(count)]
    return tuple(round(1 / (1 + math.exp(-logit)), 6) for logit in logits)


DEFAULT_THRESHOLDS: tuple[float, ...] = _even_in_logit(0.001, 0.7, 10)
"""Ten thresholds (the paper's alpha), evenly spaced in logit from .001 to .7."""

PAPER_THRESHOLDS: tuple[float, ...] = tuple(round(0.001 + 0.989 * i / 9, 12) for i in range(10))
"""The ten thresholds of the paper's methods, evenly spaced from .001 to .99."""


@dataclass(frozen=True)
class Protocol:
    """The terms of a certificate, fixed before any calibration outcome is seen."""

    thresholds: tuple[float, ...] = DEFAULT_THRESHOLDS
    """Thresholds to try. Every one of them costs confidence; ten are many at 250 examples."""
    delta: float = 0.05
    """Greatest probability of steering with a gain below `min_gain`, over all looks and groups."""
    metric: Literal["correct", "error"] = "correct"
    """What a gain is: a change of correctness (-1, 0, 1) or a fall of the error (in [-1, 1])."""
    bound: str | None = None
    """A name in `bounds.BOUNDS`; by default the exact test for `correct`, betting for `error`."""
    weights: tuple[float, ...] | None = None
    """Shares of delta, one per threshold, with a sum of 1; by default equal."""
    sizes: tuple[int, ...] = ()
    """Numbers of examples at which to look, such as (250, 600), if more than one look is planned:
    each spends an equal part of delta, and a later look may contain the examples of an earlier."""
    seed: int = 0
    """Order of the examples for the betting bound."""
    knob: Literal["threshold", "strength"] = "threshold"
    """What the numbers of the grid are: MERA's threshold, or the strength of a fixed shift."""

    def __post_init__(self) -> None:
        _check_grid(self.thresholds, self.weights)
        if not 0 < self.delta < 1:
            raise ValueError(
                f"`delta={self.delta!r}` is not a probability between 0 and 1; pass one, as 0.05."
            )
        if self.metric not in ("correct", "error") or self.test not in BOUNDS:
            raise ValueError(
                f"There is no metric {self.metric!r} with bound {self.bound!r}; pass 'correct' or "
                f"'error' and one of {', '.join(BOUNDS)}."
            )
        if self.metric == "error" and self.test in ("unconditional", "mcnemar"):
            raise ValueError(
                f"The {self.test!r} bound counts correct answers and the metric is 'error'; "
                "pass bound='betting'."
            )
        if any(size < 1 for size in self.sizes) or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(
                f"`sizes={self.sizes}` are not increasing numbers of examples; pass some, as "
                "(250, 600)."
            )

    @property
    def test(self) -> str:
        """Return the name of the bound in use."""
        return self.bound or ("unconditional" if self.metric == "correct" else "betting")

    @property
    def shares(self) -> tuple[float, ...]:
        """Return the share of delta of every threshold."""
        return self.weights or uniform_weights(len(self.thresholds))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Protocol":
        """Rebuild a protocol from plain values, where tuples have become lists."""
        terms = dict(value)
        for name in ("thresholds", "weights", "sizes"):
            terms[name] = None if terms[name] is None else tuple(terms[name])
        return cls(**terms)


def _check_grid(thresholds: Sequence[float], weights: Sequence[float] | None) -> None:
    distinct = len(set(thresholds)) == len(thresholds) > 0
    if not distinct or not all(math.isfinite(t) for t in thresholds):
        raise ValueError(
            f"`thresholds={tuple(thresholds)}` are not distinct finite numbers; pass at least one, "
            "each once."
        )
    if weights is None:
        return
    fair = len(weights) == len(thresholds) and all(weight >= 0 for weight in weights)
    if not fair or abs(sum(weights) - 1) > 1e-9:
        raise ValueError(
            f"`weights={tuple(weights)}` do not share delta among {len(thresholds)} thresholds; "
            "pass one number of 0 or more for each, with a sum of 1."
        )
