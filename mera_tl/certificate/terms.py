"""The terms of a certificate: all that must be fixed before a calibration outcome is seen.

A guarantee over several candidates holds because the candidates, the confidence, the metric and the
test do not depend on the outcomes. `Terms` is where these are written down; only `min_gain` may be
chosen afterwards.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from mera_tl.certificate.bounds import BOUNDS, check_probability


def _even_in_logit(first: float, last: float, count: int) -> tuple[float, ...]:
    low, high = (math.log(t / (1 - t)) for t in (first, last))
    logits = [low + (high - low) * i / (count - 1) for i in range(count)]
    return tuple(round(1 / (1 + math.exp(-logit)), 6) for logit in logits)


DEFAULT_THRESHOLDS: tuple[float, ...] = _even_in_logit(0.001, 0.7, 10)
"""Ten thresholds (the paper's alpha), evenly spaced in logit from .001 to .7."""

PAPER_THRESHOLDS: tuple[float, ...] = tuple(round(0.001 + 0.989 * i / 9, 12) for i in range(10))
"""The ten thresholds of the paper's methods, evenly spaced from .001 to .99."""


@dataclass(frozen=True)
class Terms:
    """The terms of a certificate, fixed before any calibration outcome is seen.

    Raises:
        ValueError: if a probability is none, there is no such metric or bound, the bound does not
            fit the metric, or the weights do not share delta.
    """

    delta: float = 0.05
    """Greatest probability, over the draw of the calibration examples, of a wrong promise."""
    metric: Literal["correct", "error"] = "correct"
    """What a gain is: a change of correctness (-1, 0, 1) or a fall of the error (in [-1, 1])."""
    bound: str | None = None
    """A name in `bounds.BOUNDS`; by default the exact test for `correct`, betting for `error`."""
    weights: tuple[float, ...] | None = None
    """Shares of delta, one per candidate, with a sum of 1; by default equal (Bonferroni)."""
    seed: int = 0
    """Order of the examples for the betting bound, and choice among examples of one text."""
    max_regressions: float | None = None
    """Greatest share of examples that steering may turn from right to wrong; None asks for none.
    Tested together with the gain, each at level delta (intersection-union)."""
    run_delta: float | None = None
    """Probability that any certificate of the run is wrong, where `delta` is a share of it (which
    may be nothing)."""
    step_down: bool = False
    """Whether `delta` includes what certified methods of the run handed over: then `min_gain` is
    promised and no lower bound beyond it."""

    def __post_init__(self) -> None:
        if self.delta != 0 or self.run_delta is None:  # a share of a run's may be nothing
            check_probability("delta", self.delta)
        if not isinstance(self.seed, Integral) or self.seed < 0:
            raise ValueError(f"`seed={self.seed!r}` is no whole number of 0 or more; pass one.")
        for name in ("run_delta", "max_regressions"):
            if (value := getattr(self, name)) is not None:
                check_probability(name, value)
        if self.run_delta is not None and self.delta > self.run_delta * (1 + 1e-9):
            raise ValueError(
                f"`delta={self.delta:g}` is more than all certificates of the run may spend "
                f"(run_delta={self.run_delta:g}); pass a share of it, as `share_delta` gives."
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
        if self.metric == "error" and self.max_regressions is not None:
            raise ValueError(
                "`max_regressions` counts answers that become wrong and the metric is 'error'; "
                "pass metric='correct'."
            )
        if self.weights is not None and (
            not all(w >= 0 for w in self.weights) or abs(sum(self.weights) - 1) > 1e-9
        ):
            raise ValueError(
                f"`weights={self.weights}` do not share delta among candidates; pass one number "
                "of 0 or more for each, with a sum of 1."
            )

    @property
    def promises_bounds(self) -> bool:
        """Whether lower bounds hold at once, so that `min_gain` may be asked for afterwards."""
        return self.max_regressions is None and not self.step_down

    @property
    def test(self) -> str:
        """Return the name of the bound in use."""
        return self.bound or ("unconditional" if self.metric == "correct" else "betting")

    def levels(self, n_candidates: int) -> tuple[float, ...]:
        """Return what each of so many candidates may spend of delta.

        Raises:
            ValueError: if the weights are of another number of candidates.
        """
        weights = (1 / n_candidates,) * n_candidates if self.weights is None else self.weights
        if len(weights) != n_candidates:
            raise ValueError(
                f"{len(weights)} weights came with {n_candidates} candidates; pass one for each."
            )
        return tuple(self.delta * weight for weight in weights)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Terms":
        """Rebuild terms from plain values, where tuples have become lists."""
        weights = value["weights"]
        return cls(**{**value, "weights": None if weights is None else tuple(weights)})
