"""What the calibration examples say about one candidate: counts, and what follows from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Real

from mera_tl.certificate.bounds import BOUNDS, lower_bound, upper_share
from mera_tl.certificate.terms import Terms

_DERIVED = {"recoveries": 0.0, "regressions": 0.0, "gain": 1e-9, "spread": 1e-9, "lower": 3e-5}
_DERIVED |= {"p": 1e-12, "level": 1e-12, "regressed_at_most": 1e-9}
"""What follows from counts or gains, and how far rounding may take it."""


@dataclass(frozen=True)
class Evidence:
    """What the calibration examples say about one candidate."""

    candidate: str
    """Its name: what tells it from the other candidates, such as `threshold 0.1`."""
    recoveries: int
    """Examples that steering improved; for `correct`, from incorrect to correct."""
    regressions: int
    """Examples that steering made worse."""
    gain: float
    """Mean gain."""
    spread: float
    """Standard deviation of the gains."""
    lower: float
    """Lower confidence bound of the mean gain, holding for all candidates at once."""
    p: float
    """P-value of a mean gain of at most `min_gain`, in the order that serves `level`."""
    level: float
    """Probability of error this candidate may spend: delta times its share."""
    regressed_at_most: float | None = None
    """Upper confidence bound of the share of regressions, where the terms limit it."""
    steering: Mapping[str, Any] = field(default_factory=dict)
    """The candidate in plain values: rule, layers, positions, and hashes of its tensors."""
    gains: tuple[float, ...] = field(default=(), repr=False)
    """The gains themselves, where counts do not determine the bound."""

    @classmethod
    def of(
        cls,
        gains: Real[np.ndarray, " example"],
        level: float,
        terms: Terms,
        min_gain: float,
        **named: Any,
    ) -> "Evidence":
        """Bound the mean of these gains at `level`."""
        # The betting bound depends on the order, which must not depend on the outcomes.
        order = np.random.default_rng(terms.seed).permutation(len(gains))
        lower, p, harm = -1.0, 1.0, None
        regressions = int((gains < 0).sum())
        if level > 0:
            curve = BOUNDS[terms.test](gains[order], level)
            lower, p = lower_bound(curve, level), curve(min_gain)
        if terms.max_regressions is not None:
            harm = upper_share(regressions, len(gains), level) if level > 0 else 1.0
        counted = terms.metric == "correct" and terms.test != "betting"
        return cls(
            recoveries=int((gains > 0).sum()),
            regressions=regressions,
            gain=float(gains.mean()),
            spread=float(gains.std()),
            lower=lower,
            p=p,
            level=level,
            regressed_at_most=harm,
            gains=() if counted else tuple(gains.tolist()),
            **named,
        )

    def again(self, level: float, terms: Terms, min_gain: float, n: int) -> "Evidence":
        """Derive this evidence from its counts (or gains), at another level or `min_gain`."""
        counts = (self.recoveries, self.regressions, n - self.recoveries - self.regressions)
        gains = np.array(self.gains) if self.gains else np.repeat([1.0, -1.0, 0.0], counts)
        named = {"candidate": self.candidate, "steering": self.steering}
        return Evidence.of(gains, level, terms, min_gain, **named)

    @property
    def threshold(self) -> float | None:
        """The paper's alpha, for a candidate that has one."""
        return self.steering.get("threshold")

    @property
    def strength(self) -> float | None:
        """The strength, for a candidate that has one."""
        return self.steering.get("strength")

    def agrees(self, derived: "Evidence") -> bool:
        """Return whether every number is, up to rounding, what it was derived to be."""
        # Roots are found to 1e-5, and special functions differ in their last digits.
        return all(
            said == number
            or (isinstance(said, float) and math.isclose(said, number, rel_tol=1e-6, abs_tol=slack))
            for name, slack in _DERIVED.items()
            for said, number in [(getattr(self, name), getattr(derived, name))]
        )
