"""How many examples a certificate needs: exact power of the paired test, before any is graded.

An `Effect` is what one expects of steering: the rate of recoveries and the rate of regressions. Its
gain is their difference and its churn their sum; the same gain needs more examples the more answers
change both ways. Counts assume one good threshold out of K, each tested at `delta / K`; neighbours
that are good too make certification likelier than planned. Imports neither torch nor pandas.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special

from mera_tl.certificate.bounds import CHURN_SHARE, chance_of_changed, exceedance, least_recoveries

# How regressions grow with the gain g: (per point of gain, at no gain).
CHURN_LEVELS = {"low": (0.2, 0.005), "mid": (0.5, 0.02), "high": (0.5, 0.07)}
# Beyond this the answer is "not in practice", and the tables below would grow without end.
MOST_EXAMPLES = 50_000


@dataclass(frozen=True)
class Effect:
    """What steering is expected to do, as rates over examples."""

    recovery: float
    """Share of examples that turn from incorrect to correct."""
    regression: float
    """Share of examples that turn from correct to incorrect."""

    def __post_init__(self) -> None:
        if not (self.recovery >= 0 and self.regression >= 0 and self.churn <= 1):
            raise ValueError(
                f"Rates of recovery {self.recovery:g} and regression {self.regression:g} cannot "
                "both hold; pass two rates of 0 or more with a sum of at most 1."
            )

    @property
    def gain(self) -> float:
        """Return the expected mean gain."""
        return self.recovery - self.regression

    @property
    def churn(self) -> float:
        """Return the share of examples whose outcome changes, either way."""
        return self.recovery + self.regression

    @classmethod
    def of_gain(
        cls, gain: float, *, churn: str | float = "mid", base: float | None = None
    ) -> "Effect":
        """Expect a gain with a churn: a rate, or one of `CHURN_LEVELS`.

        Raises:
            ValueError: if a model of accuracy `base` has too few errors for this many recoveries,
                or too few correct answers for this many regressions.
        """
        _check_base(base)
        if not -1 <= gain <= 1:
            raise ValueError(
                f"`gain={gain:g}` is not a share of examples between -1 and 1; pass 0.06 for six "
                "points."
            )
        if isinstance(churn, str):
            if churn not in CHURN_LEVELS:
                raise ValueError(
                    f"There is no churn level {churn!r}; "
                    f"pass one of {', '.join(CHURN_LEVELS)}, or a rate."
                )
            slope, least = CHURN_LEVELS[churn]
            regression = slope * abs(gain) + least
        else:
            regression = (churn - gain) / 2
        if not (regression >= 0 and 0 <= regression + gain <= 1 - regression):
            raise ValueError(
                f"A gain of {gain:g} and churn {churn!r} cannot both hold: {regression + gain:.3g} "
                f"of the answers would be recovered and {regression:.3g} lost; expect less of one."
            )
        effect = cls(regression + gain, regression)
        if base is not None and not (
            effect.recovery <= 1 - base + 1e-9 and effect.regression <= base + 1e-9
        ):
            raise ValueError(
                f"Base accuracy {base:g} leaves no room for recoveries on {effect.recovery:.3f}, "
                f"regressions on {effect.regression:.3f} of examples; expect less gain or churn."
            )
        return effect

    @classmethod
    def of_pilot(cls, recoveries: int, regressions: int, n: int) -> "Effect":
        """Expect what a pilot run showed.

        Raises:
            ValueError: if that many examples cannot have changed so.
        """
        if n < 1 or min(recoveries, regressions) < 0 or recoveries + regressions > n:
            raise ValueError(
                f"A pilot of n={n} examples cannot show {recoveries} recoveries and {regressions} "
                "regressions; pass counts of 0 or more, of at least one example."
            )
        return cls(recoveries / n, regressions / n)


def power(effect: Effect, n: int, *, min_gain: float = 0.0, level: float = 0.005) -> float:
    """Return the probability that `n` examples certify this effect at `level` (delta / K)."""
    changed = _likely_counts(effect.churn, n, 8.0)
    critical = _critical_score(n, min_gain, level, round(math.asin(math.sqrt(effect.churn)), 3))
    least = least_recoveries(changed, n, min_gain, critical)
    churn = np.array([effect.churn])
    chances = chance_of_changed(changed, n, churn)
    return exceedance(churn, chances, changed, least, effect.gain)


def sample_size(
    effect: Effect, *, min_gain: float = 0.0, level: float = 0.005, target: float = 0.8
) -> int | None:
    """Return about the fewest examples (within 1 %) that certify with probability `target`.

    None where no number does: the gain does not exceed `min_gain`, or 50,000 are too few.
    """
    if effect.gain <= min_gain:
        return None
    asked = {"min_gain": min_gain, "level": level}
    quantile, wanted = float(special.ndtri(1 - level)), float(special.ndtri(target))
    n = max(4, math.ceil(((quantile + wanted) / (effect.gain - min_gain)) ** 2 * effect.churn))
    for _ in range(12):
        if n > MOST_EXAMPLES:
            return None
        reached = float(special.ndtri(power(effect, n, **asked)))
        if math.isinf(reached):  # where every answer is recovered, power jumps from none to all
            few = (n for n in range(1, MOST_EXAMPLES) if power(effect, n, **asked) >= target)
            return next(few, None)
        # The distance to the critical score grows as the root of n; exact power is read at each
        # step.
        better = math.ceil(n * ((quantile + wanted) / max(quantile + reached, 1.0)) ** 2)
        if abs(better - n) <= max(1, n // 200) and reached >= wanted:
            break
        n = better + (better == n)
    return n


def continuous_sample_size(
    excess: float,
    spread: float,
    *,
    level: float = 0.005,
    target: float = 0.8,
    by_range: bool = False,
) -> int | None:
    """Return about how many examples certify a mean that exceeds `min_gain` by `excess`.

    For the betting bound, where gains have standard deviation `spread`; `by_range` for Hoeffding's,
    which pays for the range [-1, 1] whatever the spread.
    """
    if excess <= 0:
        return None
    paid = 1.0 if by_range else spread
    reach = math.sqrt(2 * math.log(1 / level)) * paid + float(special.ndtri(target)) * spread
    # However even gains are, a bet on one of them wins no more than this.
    fewest = math.log(1 / level) / math.log1p(0.9 * excess)
    return math.ceil(max((reach / excess) ** 2, fewest))


def likely_effects(
    gains: Sequence[float] = (0.02, 0.03, 0.04, 0.06, 0.1, 0.2), *, base: float | None = None
) -> list[Effect]:
    """Return these gains at low, mid and high churn, leaving out what accuracy `base` forbids."""
    _check_base(base)
    effects = []
    for gain in gains:
        for churn in CHURN_LEVELS:
            with suppress(ValueError):
                effects.append(Effect.of_gain(gain, churn=churn, base=base))
    return effects


def sample_size_table(
    effects: Sequence[Effect],
    *,
    min_gain: float = 0.0,
    delta: float = 0.05,
    n_thresholds: int = 10,
    target: float = 0.8,
) -> list[dict[str, float | int | None]]:
    """Return one row per effect: the examples needed, and what Hoeffding's bound would need.

    `n` is None where no number is enough in practice.
    """
    level = _level(delta, n_thresholds, min_gain, target)
    rows = []
    for effect in effects:
        n = sample_size(effect, min_gain=min_gain, level=level, target=target)
        spread = math.sqrt(max(0.0, effect.churn - effect.gain**2))
        rows.append(
            {
                "gain": round(effect.gain, 6),
                "churn": round(effect.churn, 6),
                "min_gain": min_gain,
                "delta": delta,
                "n_thresholds": n_thresholds,
                "n": n,
                "n_hoeffding": continuous_sample_size(
                    effect.gain - min_gain, spread, level=level, target=target, by_range=True
                ),
            }
        )
    return rows


def _check_base(base: float | None) -> None:
    if base is not None and not 0 <= base <= 1:
        raise ValueError(f"`base={base:g}` is not an accuracy between 0 and 1; pass one, as 0.7.")


def _level(delta: float, n_thresholds: int, min_gain: float, target: float) -> float:
    if not 0 < delta < 1 or not 0 < target < 1:
        raise ValueError(
            f"`delta={delta:g}` and `target={target:g}` are not both probabilities; "
            "pass two numbers between 0 and 1."
        )
    if not -1 < min_gain < 1 or n_thresholds < 1:
        raise ValueError(
            f"`min_gain={min_gain:g}` and `n_thresholds={n_thresholds}` cannot be planned for; "
            "pass a gain between -1 and 1 and at least one threshold."
        )
    return delta / n_thresholds


def _likely_counts(churn: float, n: int, spread: float) -> np.ndarray:
    margin = spread * (math.sqrt(n * churn * (1 - churn)) + 1)
    first, last = math.floor(n * churn - margin), math.ceil(n * churn + margin)
    return np.arange(max(0, first), min(n, last) + 1)


@lru_cache(maxsize=512)
def _critical_score(n: int, min_gain: float, level: float, angle: float) -> float:
    """Return the least score that is significant, whatever the churn near sin(angle)^2."""
    # The interval of churn that the test would hold possible, 4 standard deviations either way.
    width = 4 / (2 * math.sqrt(n))
    floor = math.asin(math.sqrt(abs(min_gain)))
    angles = np.linspace(max(floor, angle - width), min(math.pi / 2, angle + width), 25)
    churn = np.sin(np.maximum(angles, floor)) ** 2
    ends = [_likely_counts(float(rate), n, 7.5) for rate in (churn[0], churn[-1])]
    changed = np.arange(ends[0][0], ends[1][-1] + 1)
    chances = chance_of_changed(changed, n, churn)
    quantile = float(special.ndtri(1 - level))
    low, high = quantile - 1, quantile + 2
    for _ in range(12):
        middle = (low + high) / 2
        least = least_recoveries(changed, n, min_gain, middle)
        fits = exceedance(churn, chances, changed, least, min_gain) <= (1 - CHURN_SHARE) * level
        low, high = (low, middle) if fits else (middle, high)
    return high
