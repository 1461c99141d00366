"""How sure a gain is: p-values and lower confidence bounds for the mean of paired gains.

A *gain* is steered minus unsteered on one example: -1, 0 or 1 when the outcome is correct or not,
anything in [-1, 1] when it is an error. A `Bound` turns gains into a `PValue`, a curve: at each
`min_gain` it bounds the probability of evidence this strong were the true mean gain `min_gain` or
less. Every curve here is monotone by construction, so its inverse, `lower_bound`, holds for all
`min_gain` at once, which is why `min_gain` may be asked after the outcomes have been seen. Over K
candidates each bound is taken at level `delta * weight`.
"""

import math
import numbers
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, Int, Real
from scipy import special

PValue = Callable[[float], float]
Bound = Callable[[Real[np.ndarray, " example"], float], PValue]

# Share of the level spent on the unknown churn (Berger & Boos 1994). A constant, since choosing
# it after seeing the outcomes would void the guarantee.
CHURN_SHARE = 0.05
# Standard deviations of Bin(n, churn) that are summed. What lies outside is counted as evidence
# for the null.
_WINDOW = 7.5
# Spacing of the churn grid in standard deviations of the observed churn. .2 and .01 agree to six
# digits.
_CHURN_STEP = 0.2


def lower_bound(p_value: PValue, level: float) -> float:
    """Return the greatest gain, to 1e-5, that the curve rejects at `level`, or -1.

    The true mean gain lies below it with probability at most `level`. The search starts at 0,
    where most bounds are.
    """

    def excess(gain: float) -> float:
        return math.log(max(p_value(gain), 1e-300) / level)

    step, low, high = 1e-3, 0.0, 0.0
    below = above = excess(0.0)
    while below > 0 and low > -1:
        high, above = low, below
        low, step = max(-1.0, low - step), 4 * step
        below = excess(low)
    while above <= 0 and high < 1:
        low, below = high, above
        high, step = min(1.0, high + step), 4 * step
        above = excess(high)
    if below > 0 or above <= 0:
        return low
    return _crossing(excess, (low, below), (high, above))


def _crossing(
    excess: Callable[[float], float], rejected: tuple[float, float], kept: tuple[float, float]
) -> float:
    """Close in from the rejected side on where `excess` turns positive (Illinois method)."""
    (low, below), (high, above) = rejected, kept
    while high - low > 1e-5:
        share = -below / (above - below) if above > below else 0.5
        # Half a tolerance off the ends, so that a step that lands on an end still closes the gap.
        middle = min(max(low + share * (high - low), low + 5e-6), high - 5e-6)
        value = excess(middle)
        if value <= 0:
            low, below, above = middle, value, above / 2
        else:
            high, above, below = middle, value, below / 2
    return low


def unconditional(recoveries: int, regressions: int, n: int, level: float) -> PValue:
    """Test a mean gain exactly from the counts of examples recovered and lost, of `n`.

    Tables are ordered by the lower limit of the restricted score statistic (Tango 1998) at
    `level`; the p-value is the greatest probability of a table at least as high over every churn
    (recovery plus regression rate) inside its two-sided Clopper-Pearson interval (Suissa &
    Shuster 1991; Berger & Boos 1994). As the order does not depend on the gain that is tested,
    the curve is monotone and its inverse is a bound in Buehler's (1957) sense.
    """
    _check_counts(recoveries, regressions, n, level)
    if regressions == n:
        return lambda _: 1.0
    spent = CHURN_SHARE * level
    limit, critical = _score_limit(recoveries, regressions, n, level)
    churn, changed = _churn_grid(recoveries + regressions, n, spent)
    least = least_recoveries(changed, n, limit, critical)
    chances = chance_of_changed(changed, n, churn)

    def p_value(min_gain: float) -> float:
        # A churn below |min_gain| cannot lose that much, so it is no part of the null.
        possible = churn >= -min_gain
        worst = 0.0
        if possible.any():
            worst = exceedance(churn[possible], chances[possible], changed, least, min_gain)
        if churn[0] < abs(min_gain) < churn[-1]:  # the kink, or the edge of what is possible
            edge = np.array([abs(min_gain)])
            chance = chance_of_changed(changed, n, edge)
            worst = max(worst, exceedance(edge, chance, changed, least, min_gain))
        return min(1.0, spent + worst)

    return p_value


def mcnemar(recoveries: int, regressions: int, n: int, level: float) -> PValue:
    """Test a mean gain given the number of changed answers: McNemar's exact test, made to bound.

    At `min_gain` 0 it is the one-sided sign test plus the share of the level that buys the bounds
    elsewhere, where the unknown churn is held inside its Clopper-Pearson interval. Simple to
    explain, weak away from 0.
    """
    _check_counts(recoveries, regressions, n, level)
    changed, spent = recoveries + regressions, CHURN_SHARE * level
    low, high = _clopper_pearson(changed, n, spent)

    def p_value(min_gain: float) -> float:
        worst_churn = low if min_gain > 0 else max(high, -min_gain)
        share = _share(min_gain, np.array([worst_churn]))
        tail = _binomial_tail(np.array([recoveries]), np.array([changed]), share)
        return min(1.0, spent + float(tail[0]))

    return p_value


def hoeffding(gains: Real[np.ndarray, " example"], level: float) -> PValue:  # noqa: ARG001
    """Bound by range alone (Hoeffding 1963), as the paper does: valid, and far too wide."""
    return hoeffding_curve(float(np.mean(gains)), len(gains))


def hoeffding_curve(mean: float, n: int) -> PValue:
    """Return Hoeffding's bound from the mean gain of n examples."""
    return lambda min_gain: math.exp(-n * max(0.0, mean - min_gain) ** 2 / 2)


def betting(gains: Real[np.ndarray, " example"], level: float) -> PValue:
    """Bet against the null along the examples in the order given (Waudby-Smith & Ramdas 2024).

    For any outcome in [-1, 1]. The p-value is one over the greatest wealth ever reached (Ville),
    at bets tuned to `level`. The order must not depend on the outcomes: shuffle with a seed fixed
    beforehand.
    """
    unit = (1 + np.asarray(gains, float)) / 2
    n, t = len(unit), np.arange(1, len(unit) + 1)
    mean = (0.5 + np.cumsum(unit)) / (t + 1)
    variance = (0.25 + np.cumsum((unit - mean) ** 2)) / (t + 1)
    predictable = np.concatenate(([0.25], variance[:-1]))  # a bet may not see its own outcome
    bets = np.sqrt(2 * math.log(1 / level) / (n * predictable))

    def p_value(min_gain: float) -> float:
        null = max((1 + min_gain) / 2, 1e-12)
        # Capping at .9 / null keeps wealth positive whatever comes, and makes it decrease in
        # `null`.
        wealth = np.cumsum(np.log1p(np.minimum(bets, 0.9 / null) * (unit - null)))
        return math.exp(-max(0.0, float(wealth.max())))

    return p_value


def _of_counts(bound: Callable[[int, int, int, float], PValue]) -> Bound:
    def from_gains(gains: Real[np.ndarray, " example"], level: float) -> PValue:
        if not np.isin(gains, (-1, 0, 1)).all():
            raise ValueError(
                "This bound counts answers and needs gains of -1, 0 or 1; "
                "use the `betting` bound for continuous gains."
            )
        return bound(int(np.sum(gains == 1)), int(np.sum(gains == -1)), len(gains), level)

    return from_gains


BOUNDS: Mapping[str, Bound] = MappingProxyType(
    {
        "unconditional": _of_counts(unconditional),
        "mcnemar": _of_counts(mcnemar),
        "betting": betting,
        "hoeffding": hoeffding,
    }
)


def score(
    recoveries: Real[np.ndarray, "#*table"],
    regressions: Real[np.ndarray, "#*table"],
    n: int,
    gain: Float[np.ndarray, "#*table"],
) -> Float[np.ndarray, " *table"]:
    """Standardise the observed gain, with the variance that fits a mean of `gain` (Tango 1998)."""
    slope = gain * (2 * n - recoveries + regressions) - (recoveries + regressions)
    root = np.sqrt(np.maximum(slope * slope + 8 * n * regressions * gain * (1 - gain), 0))
    variance = n * ((root - slope) / (2 * n) + gain * (1 - gain))
    return (recoveries - regressions - n * gain) / np.sqrt(np.maximum(variance, 1e-12))


def _score_limit(recoveries: int, regressions: int, n: int, level: float) -> tuple[float, float]:
    """Return the gain at which the score falls to the normal quantile of `level`, and the score."""
    quantile = -float(special.ndtri(level))
    counts = np.array(float(recoveries)), np.array(float(regressions))
    low, high = -1.0, 1.0
    for _ in range(4):  # the score falls as the gain rises; cut its range into 1024, four times
        gains = np.linspace(low, high, 1025)
        above = int((score(*counts, n, gains) > quantile).sum())
        low, high = float(gains[max(above, 1) - 1]), float(gains[min(max(above, 1), 1024)])
    return low, float(score(*counts, n, np.array([low]))[0])


def least_recoveries(
    changed: Int[np.ndarray, " changed"], n: int, limit: float, critical: float
) -> Int[np.ndarray, " changed"]:
    """Find, for each number of changed answers, the fewest recoveries with a critical score."""
    low, high = np.zeros_like(changed), changed + 1  # changed + 1: even all of them would not do
    while (low < high).any():
        middle = (low + high) // 2
        # Ties belong to the tail; rounding must not push them out of it.
        enough = score(middle, changed - middle, n, np.array([limit])) >= critical - 1e-9
        enough |= middle > changed
        high = np.where((low < high) & enough, middle, high)
        low = np.where((low < high) & ~enough, middle + 1, low)
    return high


def _churn_grid(
    changed: int, n: int, miss: float
) -> tuple[Float[np.ndarray, " churn"], Int[np.ndarray, " changed"]]:
    """Return churn rates compatible with `changed` of `n`, and the counts these make likely.

    Even in arcsin(sqrt(churn)), where the spread of the observed churn is the same everywhere: a
    grid even in churn is too coarse near 0 and 1 and has let the size exceed the level.
    """
    low, high = _clopper_pearson(changed, n, miss)
    first, last = math.asin(math.sqrt(low)), math.asin(math.sqrt(high))
    steps = max(9, math.ceil((last - first) * 2 * math.sqrt(n) / _CHURN_STEP) + 1)
    churn = np.sin(np.linspace(first, last, steps)) ** 2
    churn[0], churn[-1] = low, high
    below = n * low - _WINDOW * (math.sqrt(n * low * (1 - low)) + 1)
    above = n * high + _WINDOW * (math.sqrt(n * high * (1 - high)) + 2)
    return churn, np.arange(max(0, math.floor(below)), min(n, math.ceil(above)) + 1)


def _clopper_pearson(changed: int, n: int, miss: float) -> tuple[float, float]:
    low = special.betaincinv(changed, n - changed + 1, miss / 2) if changed else 0.0
    high = special.betaincinv(changed + 1, n - changed, 1 - miss / 2) if changed < n else 1.0
    return float(low), float(high)


def chance_of_changed(
    changed: Int[np.ndarray, " changed"], n: int, churn: Float[np.ndarray, " churn"]
) -> Float[np.ndarray, "churn changed"]:
    """Return the binomial probability of each number of changed answers, at each churn."""
    ways = special.gammaln(n + 1) - special.gammaln(changed + 1) - special.gammaln(n - changed + 1)
    rate = churn[:, None]
    return np.exp(ways + special.xlogy(changed, rate) + special.xlog1py(n - changed, -rate))


def exceedance(
    churn: Float[np.ndarray, " churn"],
    chances: Float[np.ndarray, "churn changed"],
    changed: Int[np.ndarray, " changed"],
    least: Int[np.ndarray, " changed"],
    gain: float,
) -> float:
    """Return the greatest probability, over churn, of at least `least` recoveries."""
    share = np.broadcast_to(_share(gain, churn)[:, None], chances.shape)
    tail = np.zeros_like(chances)
    # Most of the rectangle has no weight, and tails are what costs time.
    counts = chances > 1e-14
    rows, columns = np.nonzero(counts)
    tail[counts] = _binomial_tail(least[columns], changed[columns], share[rows, columns])
    inside = (chances * tail).sum(1)
    outside = np.maximum(0.0, 1.0 - (chances * counts).sum(1))
    return float((inside + outside).max())


def _share(gain: float, churn: Float[np.ndarray, " any"]) -> Float[np.ndarray, " any"]:
    """Return the share of recoveries among changed answers at this mean gain and churn."""
    return np.clip(0.5 + gain / np.maximum(2 * churn, 1e-300), 0.0, 1.0)


def _binomial_tail(
    least: Int[np.ndarray, " any"], trials: Int[np.ndarray, " any"], rate: Float[np.ndarray, " any"]
) -> Float[np.ndarray, " any"]:
    """Return P(Bin(trials, rate) >= least)."""
    tail = special.betainc(np.maximum(least, 1), np.maximum(trials - least + 1, 1), rate)
    return np.where(least <= 0, 1.0, np.where(least > trials, 0.0, tail))


def upper_share(count: int, n: int, level: float) -> float:
    """Return the exact (Clopper-Pearson) upper confidence bound of a share, of `count` in `n`.

    The true share exceeds it with probability at most `level`.
    """
    return float(special.betaincinv(count + 1, n - count, 1 - level)) if count < n else 1.0


def check_probability(name: str, value: float | None, *, one: bool = False) -> None:
    """Refuse what is no probability strictly between 0 and 1; `one` allows 1.

    Raises:
        ValueError: naming it.
    """
    if not isinstance(value, numbers.Real) or not (0 < value < 1 or (one and value == 1)):
        raise ValueError(
            f"`{name}={value!r}` is not a probability between 0 and 1; pass one, as 0.05."
        )


def _check_counts(recoveries: int, regressions: int, n: int, level: float) -> None:
    if n < 1 or min(recoveries, regressions) < 0 or recoveries + regressions > n:
        raise ValueError(
            f"{recoveries} recoveries and {regressions} regressions cannot come from n={n}; "
            "pass counts of 0 or more with a sum of at most n, and n of at least 1."
        )
    if not 0 < level < 1:
        raise ValueError(
            f"`level={level}` is not a probability between 0 and 1; pass one, such as 0.05."
        )
