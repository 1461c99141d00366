"""Laws of certificates that share a calibration split: all hold at once."""

import math
from functools import cache

import numpy as np
import pytest

from mera_tl.certificate import Terms, certify, share_delta, step_down, unconditional

METHODS = [f"method {i}" for i in range(11)]


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


def test_a_primary_method_has_all_of_delta_and_the_others_what_it_hands_on():
    shares = share_delta(["good", "fair"], 0.05, primary="good")
    terms = {name: Terms(delta=share, run_delta=0.05) for name, share in shares.items()}
    before = decisions({"good": (40, 4), "fair": (30, 4)}, terms)
    assert not before["good"].abstained and before["fair"].abstained
    assert "no share of delta" in str(before["fair"])
    assert not step_down(before)["fair"].abstained
    nothing = step_down(decisions({"good": (4, 4), "fair": (30, 4)}, terms))
    assert all(decision.abstained for decision in nothing.values())
