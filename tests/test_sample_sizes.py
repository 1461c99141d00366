"""Planned numbers are those of the test itself, and of the table they were derived from."""

import numpy as np
import pytest
from scipy import stats

from mera_tl.certificate import (
    Effect,
    betting,
    continuous_sample_size,
    likely_effects,
    power,
    sample_size,
    sample_size_table,
    unconditional,
)

# Least n for 80 % power at min_gain 0 and delta .05 / 10, by gain: churn low, mid, high, found by
# independent code with another search.
EXPECTED = {0.03: (637, 1301, 2629), 0.06: (283, 515, 845), 0.1: (162, 277, 404)}


def true_power(effect, n, min_gain, level):
    """Sum the chances of every table that the test itself rejects."""
    total, a = 0.0, 0
    for changed in range(n + 1):
        chance = stats.binom.pmf(changed, n, effect.churn)
        if chance < 1e-8:
            continue
        a = min(a, changed)
        while a <= changed and unconditional(a, changed - a, n, level)(min_gain) > level:
            a += 1
        share = effect.recovery / effect.churn
        total += chance * stats.binom.sf(a - 1, changed, share)
    return total


@pytest.mark.parametrize("level", [0.05, 0.005])
def test_a_steering_that_puts_everything_right_needs_a_few_examples_too(level):
    fewest = next(n for n in range(1, 50) if unconditional(n, 0, n, level)(0.0) <= level)
    found = sample_size(Effect(1.0, 0.0), level=level)
    assert found is not None and fewest <= found <= fewest + 2
    gains = [np.ones(n) for n in range(1, 50)]
    fewest = next(len(each) for each in gains if betting(each, level)(0.0) <= level)
    found = continuous_sample_size(1.0, 0.0, level=level)
    assert found is not None and fewest - 2 <= found <= fewest


@pytest.mark.parametrize(("gain", "min_gain", "n"), [(0.1, 0.0, 160), (0.15, 0.02, 130)])
def test_planned_power_is_the_power_of_the_test(gain, min_gain, n):
    effect = Effect.of_gain(gain)
    planned = power(effect, n, min_gain=min_gain)
    assert planned == pytest.approx(true_power(effect, n, min_gain, 0.005), abs=0.012)
    assert 0.2 < planned < 0.8


@pytest.mark.parametrize("gain", EXPECTED)
def test_sizes_agree_with_independent_ones(gain):
    sizes = [sample_size(Effect.of_gain(gain, churn=churn)) for churn in ("low", "mid", "high")]
    assert sizes == pytest.approx(EXPECTED[gain], rel=0.03)


def test_the_size_reaches_its_target_and_much_less_does_not():
    effect = Effect.of_gain(0.08, churn="low")
    n = sample_size(effect, min_gain=0.01, level=0.01)
    assert power(effect, n, min_gain=0.01, level=0.01) >= 0.8
    assert power(effect, int(0.93 * n), min_gain=0.01, level=0.01) < 0.8


def test_more_is_needed_for_less_gain_more_churn_more_confidence():
    base = sample_size(Effect.of_gain(0.06))
    assert sample_size(Effect.of_gain(0.05)) > base
    assert sample_size(Effect.of_gain(0.06, churn=0.3)) > base
    assert sample_size(Effect.of_gain(0.06), level=0.001) > base
    assert sample_size(Effect.of_gain(0.06), min_gain=0.02) > 2 * base
    assert sample_size(Effect.of_gain(0.02), min_gain=0.02) is None
    assert sample_size(Effect.of_gain(0.001)) is None  # no practical number


def test_betting_reaches_its_target_at_the_planned_size():
    rng, gain, spread = np.random.default_rng(0), 0.05, 0.2
    n = continuous_sample_size(gain, spread, level=0.05)
    draws = np.clip(rng.normal(gain, spread, (300, n)), -1, 1)
    reached = np.mean([betting(draw, 0.05)(0.0) <= 0.05 for draw in draws])
    assert 0.7 < reached < 0.97
    assert continuous_sample_size(gain, spread, by_range=True) > 5 * n
    assert continuous_sample_size(0.0, spread) is None


def test_effects_respect_the_base_accuracy():
    pilot = Effect.of_pilot(25, 10, 250)
    assert (pilot.gain, pilot.churn) == (pytest.approx(0.06), pytest.approx(0.14))
    gains = {round(effect.gain, 3) for effect in likely_effects(base=0.9)}
    assert 0.2 not in gains and 0.06 in gains
    with pytest.raises(ValueError, match="leaves no room"):
        Effect.of_gain(0.2, base=0.9)
    for wrong in ({"base": 2.0}, {"base": -0.1}, {"base": 0.5, "gain": 6.0}):
        with pytest.raises(ValueError, match="between"):
            Effect.of_gain(**{"gain": 0.06, **wrong})
    with pytest.raises(ValueError, match="base=2"):
        likely_effects(base=2.0)
    with pytest.raises(ValueError, match="no churn level"):
        Effect.of_gain(0.2, churn="much")
    with pytest.raises(ValueError, match="cannot both hold"):
        Effect(0.7, 0.4)
    with pytest.raises(ValueError, match="gain of 0.5 and churn 'mid' cannot both hold: 0.77 of"):
        Effect.of_gain(0.5)
    with pytest.raises(ValueError, match="n=0"):
        Effect.of_pilot(0, 0, 0)


def test_the_table_has_a_row_per_effect():
    rows = sample_size_table(likely_effects((0.06, 0.1)), min_gain=0.07)
    assert len(rows) == 6 and rows[0]["n"] is None and rows[-1]["n"] > 1000
    assert rows[-1]["n_hoeffding"] > 3 * rows[-1]["n"]
    with pytest.raises(ValueError, match="not both probabilities"):
        sample_size_table(likely_effects(), delta=2.0)
    with pytest.raises(ValueError, match="cannot be planned for"):
        sample_size_table(likely_effects(), n_thresholds=0)
