"""Laws of withholding: the promise is kept by the whole procedure, and it finds what is there."""

import math

import numpy as np
import pytest
from scipy import stats

from mera_tl.certificate import (
    Withholding,
    certify_withholding,
    least_answered,
    least_withheld,
    withholding_size,
    withholding_thresholds,
)

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def draw(rng, n, base, skill):
    """Predicted errors that rank examples; the risk rises with the rank as `skill` says."""
    rank = rng.random(n)
    return rank, rng.random(n) >= base * (skill + 1) * rank**skill


def risk(share, base, skill):
    """P(wrong | the `share` with least predicted error)."""
    return base * share**skill


@pytest.mark.parametrize(("base", "skill"), [(0.1, 0.0), (0.2, 1.0), (0.15, 3.0)])
def test_more_than_alpha_wrong_is_certified_at_most_delta_of_the_time(base, skill):
    rng, runs, n = np.random.default_rng(int(10 * skill)), 2000, 300
    # As hard as can be: the risk is alpha exactly at one of the thresholds.
    alpha = risk(0.6, base, skill) if skill else base
    wrong = 0
    for _ in range(runs):
        found = certify_withholding(*draw(rng, n, base, skill), alpha=alpha, thresholds=SHARES)
        wrong += found.threshold is not None and risk(found.threshold, base, skill) >= alpha - 1e-9
    delta = 0.05
    assert wrong / runs <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)
    assert wrong > 0 or skill > 0  # not valid only for saying nothing


def test_choosing_the_best_of_all_thresholds_would_break_the_promise():
    """Control: without the fixed order, any threshold that passes is taken."""
    rng, runs, wrong = np.random.default_rng(1), 400, 0
    for _ in range(runs):
        predicted, correct = draw(rng, 300, 0.1, 0.0)
        wrong += any(
            certify_withholding(predicted, correct, alpha=0.1, thresholds=[t]).threshold is not None
            for t in SHARES
        )
    assert wrong / runs > 0.08


def test_power_against_the_oracle_threshold():
    rng, base, skill, alpha = np.random.default_rng(2), 0.25, 2.0, 0.1
    answered = {}
    for n in (250, 1000):
        thresholds = withholding_thresholds(np.linspace(0, 1, 1001), n, alpha=alpha)
        assert len(thresholds) == 10 and thresholds[-1] == 1
        found = [
            certify_withholding(*draw(rng, n, base, skill), alpha=alpha, thresholds=thresholds)
            for _ in range(200)
        ]
        oracle = max(t for t in thresholds if risk(t, base, skill) < alpha)
        answered[n] = np.mean([each.threshold or 0.0 for each in found]) / oracle
    assert answered[1000] > 0.8 > answered[250] > 0.5


def test_bounds_are_clopper_pearsons_and_sentences_say_what_is_promised():
    predicted = np.repeat([0.1, 0.4, 0.9], 100)
    correct = np.concatenate([np.ones(99), [0], np.ones(70), np.zeros(30), np.zeros(100)]) == 1
    found = certify_withholding(predicted, correct, alpha=0.05, thresholds=(0.1, 0.4, 0.9))
    exact = stats.binomtest(1, 100, alternative="less").proportion_ci(0.95).high
    assert found.rows[0].wrong_at_most == pytest.approx(exact)
    assert len(found.rows) == 2 and found.threshold == 0.1
    assert str(found).startswith(
        "WITHHOLD above a predicted error of 0.1: 33 % answered, certified at most 5.0 % of them"
    )
    assert Withholding.from_json(found.to_json()) == found
    first, *_ = found.to_json()["rows"]
    second, third = (
        {"threshold": t, "answered": n, "wrong": 6, "wrong_at_most": 0.0}
        for t, n in ((0.4, 110), (0.9, 300))
    )
    edited = {**found.to_json(), "rows": [first, second, third]}
    assert Withholding.from_json(edited).threshold == 0.1  # the second row ended the sequence
    assert Withholding.from_json({**edited, "rows": [third]}).threshold == 0.9  # control
    for name, value in (("wrong", 0), ("answered", 301), ("threshold", 0.4)):
        rows = [first, second, {**third, name: value}]
        with pytest.raises(ValueError, match="counts are not those"):
            Withholding.from_json({**edited, "rows": rows})
    none = certify_withholding(predicted, correct, alpha=0.01, thresholds=(0.1, 0.4))
    assert none.threshold is None and "at least 299 answers must be tested" in str(none)
    plenty = certify_withholding(predicted, correct, alpha=0.02, thresholds=(1.0,))
    assert plenty.threshold is None and "must be tested" not in str(plenty)  # enough were
    assert certify_withholding(predicted, correct, alpha=0.9, thresholds=(1.0,)).threshold == 1.0


def test_planning_says_what_must_be_withheld_and_how_many_examples_it_takes():
    assert least_withheld(0.2, 0.05) == pytest.approx(0.15 / 0.95)
    assert least_withheld(0.03, 0.05) == 0
    assert least_answered(0.05) == 59  # the rule of three
    n = withholding_size(0.7, 0.02, 0.05)
    rng, passed = np.random.default_rng(3), 0
    for _ in range(400):
        predicted = (rng.random(n) > 0.7).astype(float)
        correct = rng.random(n) >= 0.02
        certified = certify_withholding(predicted, correct, alpha=0.05, thresholds=(0.5,))
        passed += certified.threshold is not None
    assert 0.72 < passed / 400 < 0.92
    assert withholding_size(0.7, 0.05, 0.05) is None
    assert withholding_size(1.0, 0.0, 0.05) == 59


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"delta": 1.0}, "delta=1.0"),
        ({"thresholds": (0.5, 0.2)}, "do not rise"),
        ({"thresholds": ()}, "do not rise"),
        ({"thresholds": (np.nan,)}, "do not rise"),
        ({"predicted_error": np.array([0.1, np.nan, 0.2])}, "not finite"),
    ],
)
def test_bad_questions_are_refused(options, sentence):
    asked = {"predicted_error": np.array([0.1, 0.2, 0.3]), "correct": np.ones(3, bool)}
    with pytest.raises(ValueError, match=sentence):
        certify_withholding(**{**asked, "alpha": 0.1, "thresholds": (0.2,), **options})
    for wrong in ({"base": 2.0, "alpha": 0.1}, {"base": 0.2, "alpha": 1.5}):
        with pytest.raises(ValueError, match="between 0 and 1"):
            least_withheld(**wrong)
