"""Laws of certificates that share a calibration split: all hold at once."""

import math
from functools import cache

import numpy as np
import pytest
from scipy import stats

from mera_tl.certificate import Terms, certify, mcnemar, share_delta, step_down, unconditional

METHODS = [f"method {i}" for i in range(11)]


def test_a_delta_that_is_no_probability_is_not_shared():
    for delta in (5.0, float("nan"), 0.0):
        with pytest.raises(ValueError, match="delta"):
            share_delta(["flip", "searched"], delta)
    with pytest.raises(ValueError, match="seed=-1"):
        Terms(seed=-1)


def test_shares_sum_to_delta_and_are_fixed_by_names_alone():
    for methods in (METHODS, [*METHODS, "searched"], ["searched"]):
        assert math.fsum(share_delta(methods).values()) == pytest.approx(0.05)
    halves = share_delta(["optimal_probe", "searched", "flip"], 0.1)
    assert halves == {"optimal_probe": 0.025, "searched": 0.05, "flip": 0.025}
    assert share_delta(["a", "b"], primary="b") == {"a": 0.0, "b": 0.05}
    for wrong in ({"methods": []}, {"methods": ["a"], "primary": "b"}):
        with pytest.raises(ValueError, match="none of the methods"):
            share_delta(**wrong)


@cache
def certified(better, worse, n, level):
    return unconditional(better, worse, n, level)(0.0) <= level


def one_run(rng, n, true, levels):
    """Whether each of some methods is certified, by one candidate each: independent outcomes."""
    churn = 0.16
    rates = [((churn + gain) / 2, (churn - gain) / 2) for gain in true]
    counts = [rng.multinomial(n, [up, down, 1 - up - down])[:2] for up, down in rates]
    return [
        certified(int(a), int(b), n, level) for (a, b), level in zip(counts, levels, strict=True)
    ]


@pytest.mark.parametrize("n_methods", [3, 11])
def test_a_run_of_useless_methods_is_wrong_at_most_delta_of_the_time(n_methods):
    rng, runs, delta = np.random.default_rng(n_methods), 2000, 0.05
    levels = list(share_delta(METHODS[:n_methods], delta).values())
    null = [0.0] * n_methods
    wrong = np.mean([any(one_run(rng, 100, null, levels)) for _ in range(runs)])
    assert wrong <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)
    # Control: each at full delta, as before, the run is wrong far more often.
    alone = [any(one_run(rng, 100, null, [delta] * n_methods)) for _ in range(500)]
    assert np.mean(alone) > 0.1


def decisions(rows, terms):
    return {
        name: certify(np.repeat([1.0, -1.0, 0.0], (a, b, 250 - a - b))[None], terms=terms[name])
        for name, (a, b) in rows.items()
    }


def test_stepping_down_hands_shares_on_and_promises_no_bound_beyond_min_gain():
    shares = share_delta(["good", "fair", "none"], 0.05)
    terms = {name: Terms(delta=share, run_delta=0.05) for name, share in shares.items()}
    rows = {"good": (40, 4), "fair": (25, 12), "none": (12, 12)}
    before = decisions(rows, terms)
    assert [d.abstained for d in before.values()] == [False, True, True]
    after = step_down(before)
    assert [d.abstained for d in after.values()] == [False, False, True]
    assert after["fair"].terms.delta == pytest.approx(0.025)
    assert after["none"].terms.delta == pytest.approx(0.05)
    assert "at least +0.0 points" in str(after["fair"])
    with pytest.raises(ValueError, match="fixed beforehand and no other"):
        after["good"].at(min_gain=0.01)
    before["good"].at(min_gain=0.01)  # control
    assert "0.95 for all certificates of the run" in str(before["good"])
    with pytest.raises(ValueError, match="not those of one run"):
        step_down(decisions(rows, dict.fromkeys(rows, Terms())))


def test_candidates_that_are_not_certified_hand_nothing_on():
    """The worst case, exactly: one candidate helps, 19 beside it and another method's 20 are coins.

    Helping a little it is certified, but a coin that falls well looks better, and is deployed.
    """
    n, k, delta = 2000, 20, 0.05
    coin, good = np.repeat([1.0, -1.0], n // 2), np.repeat([1.0, 0.0], (60, n - 60))
    terms = Terms(delta / 2, run_delta=delta, bound="mcnemar")
    rows = {"one helps": [good, *[coin] * (k - 1)], "none does": [coin] * k}
    before = {name: certify(np.stack(gains), terms=terms) for name, gains in rows.items()}
    assert [row.level for row in before["one helps"].evidence] == pytest.approx([0.00125] * k)
    handed = step_down(before)["none does"].terms.delta
    assert handed == pytest.approx(delta / 2 + delta / 2 / k)

    def certified_coin(level):
        p_values = (mcnemar(up, n - up, n, level)(0.0) for up in range(n // 2, n))
        least = next(up for up, p in enumerate(p_values, n // 2) if p <= level)
        return stats.binom.sf(least - 1, n, 0.5)

    def wrong(handed):
        ways = certified_coin(delta / 2 / k), certified_coin(handed / k)
        return 1 - (1 - ways[0]) ** (k - 1) * (1 - ways[1]) ** k

    assert wrong(handed) <= delta
    assert wrong(delta) > 1.2 * delta  # control: all of a certified method's share handed on


def test_a_primary_method_has_all_of_delta_and_the_others_what_it_hands_on():
    shares = share_delta(["good", "fair"], 0.05, primary="good")
    terms = {name: Terms(delta=share, run_delta=0.05) for name, share in shares.items()}
    before = decisions({"good": (40, 4), "fair": (30, 4)}, terms)
    assert not before["good"].abstained and before["fair"].abstained
    assert "no share of delta" in str(before["fair"])
    assert not step_down(before)["fair"].abstained
    nothing = step_down(decisions({"good": (4, 4), "fair": (30, 4)}, terms))
    assert all(decision.abstained for decision in nothing.values())
