"""Laws of the certificate: wrong at most delta of the time, useful, honest about a second look."""

import dataclasses
import functools
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from mera_tl.certificate import (
    DEFAULT_THRESHOLDS,
    PAPER_THRESHOLDS,
    Calibration,
    Decision,
    Protocol,
    certify,
    certify_groups,
    favourite_weights,
    unconditional,
)

# Mild to strong: the gain rises to six points at the sixth threshold, then over-steering sets in;
# regressions grow throughout, to 5 % at the peak.
RISE = np.sin(np.pi / 2 * np.arange(1, 7) / 6)
HUMP = 0.06 * np.concatenate((RISE, [0.85, 0.5, 0.0, -0.5]))
LOST = 0.05 * np.arange(1, 11) / 6


def draw(rng, gain, lost, n, *, nested=0.8):
    """Draw gains over a grid: mild and strong steering mostly change the same examples."""
    shared = rng.random((1, n))
    own = rng.random((len(gain), n))
    u = np.where(rng.random((1, n)) < nested, shared, own)
    recovered, regressed = u < (gain + lost)[:, None], u > 1 - np.asarray(lost)[:, None]
    return recovered.astype(float) - regressed


@functools.cache
def rejected(recoveries, regressions, n, level, min_gain):
    return unconditional(recoveries, regressions, n, level)(min_gain) <= level


def certified(gains, level, min_gain):
    """Return whether any threshold is certified, by counts alone: there are few distinct ones."""
    n = gains.shape[1]
    counts = {(int((row == 1).sum()), int((row == -1).sum())) for row in gains}
    return any(rejected(*pair, n, level, min_gain) for pair in counts)


@pytest.fixture
def gains():
    return draw(np.random.default_rng(0), 2 * HUMP, LOST, 250)


def test_certify_does_what_the_counts_say():
    rng = np.random.default_rng(1)
    agree = []
    for _ in range(12):
        sample = draw(rng, HUMP, LOST, 150)
        steers = not certify(sample, DEFAULT_THRESHOLDS, min_gain=0.0).abstained
        agree.append(steers == certified(sample, 0.005, 0.0))
    assert all(agree)


@pytest.mark.parametrize("nested", [1.0, 0.0])
@pytest.mark.parametrize("min_gain", [0.0, 0.02])
def test_useless_steering_is_certified_at_most_delta_of_the_time(nested, min_gain):
    rng, runs, delta = np.random.default_rng(2), 1500, 0.1
    lost = np.full(10, 0.05)
    wrong = np.mean(
        [
            certified(
                draw(rng, np.full(10, min_gain), lost, 120, nested=nested), delta / 10, min_gain
            )
            for _ in range(runs)
        ]
    )
    assert wrong <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)
    if nested == 0.0:  # control: undivided, delta would be far exceeded
        undivided = [
            certified(draw(rng, np.full(10, min_gain), lost, 120, nested=0.0), delta, min_gain)
            for _ in range(100)
        ]
        assert np.mean(undivided) > 0.3


def test_six_points_are_certified_at_250_examples_where_hoeffding_certifies_none():
    rng, runs = np.random.default_rng(3), 600
    samples = [draw(rng, HUMP, LOST, 250) for _ in range(runs)]
    assert np.mean([certified(sample, 0.005, 0.0) for sample in samples]) >= 0.6
    by_range = Protocol(bound="hoeffding")
    assert all(certify(s, DEFAULT_THRESHOLDS, protocol=by_range).abstained for s in samples[:50])


def test_lower_bounds_of_all_thresholds_hold_at_once():
    rng, runs, delta = np.random.default_rng(4), 100, 0.2
    few = Protocol(thresholds=(0.2, 0.4, 0.6), delta=delta)
    gain, lost = np.array([0.0, 0.04, 0.1]), np.full(3, 0.03)
    missed = 0
    for _ in range(runs):
        rows = certify(draw(rng, gain, lost, 40), few.thresholds, protocol=few).evidence
        missed += any(row.lower > true for row, true in zip(rows, gain, strict=True))
    assert 0 < missed / runs <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)


def test_the_best_certified_gain_is_chosen_and_ties_go_to_the_mildest():
    helps = np.repeat([1.0, -1.0, 0.0], (40, 0, 160))
    churns = np.repeat([1.0, -1.0, 0.0], (60, 20, 120))
    less = np.repeat([1.0, -1.0, 0.0], (35, 0, 165))
    terms = Protocol(thresholds=(0.1, 0.2, 0.3, 0.4))
    chosen = certify(np.stack((helps, helps, churns, less)), terms.thresholds, protocol=terms)
    assert chosen.decision is Decision.STEER and chosen.threshold == 0.2
    assert chosen.best.gain == 0.2 and chosen.best.recoveries == 40


def test_a_gain_may_be_asked_for_afterwards(gains):
    asked = certify(gains, DEFAULT_THRESHOLDS)
    lower = asked.best.lower
    assert not asked.at(min_gain=lower - 1e-3).abstained
    more = asked.at(min_gain=max(row.lower for row in asked.evidence) + 1e-3)
    assert more.abstained and more.threshold is None and more.fwd_hooks(None) == []
    again = certify(gains, DEFAULT_THRESHOLDS, min_gain=more.min_gain)
    assert [r.p for r in more.evidence] == pytest.approx([r.p for r in again.evidence])
    assert more.decision == again.decision and "ABSTAIN" in str(more)


@pytest.mark.parametrize("bound", ["mcnemar", "betting", "hoeffding"])
def test_every_bound_certifies_a_great_gain(bound):
    great = draw(np.random.default_rng(5), np.full(10, 0.5), np.full(10, 0.01), 250)
    steered = certify(great, DEFAULT_THRESHOLDS, protocol=Protocol(bound=bound))
    assert not steered.abstained and 0.1 < steered.best.lower < 0.5
    assert all((row.p <= row.level) == (row.lower >= 0) for row in steered.evidence)


def test_a_fall_of_the_error_is_certified_by_betting():
    rng = np.random.default_rng(6)
    falls = np.clip(rng.normal(0.06, 0.15, (10, 250)), -1, 1)
    terms = Protocol(metric="error")
    steered = certify(falls, DEFAULT_THRESHOLDS, protocol=terms)
    assert not steered.abstained and "lowers the error" in str(steered)
    none = certify(falls - falls.mean(), DEFAULT_THRESHOLDS, protocol=terms)
    assert none.abstained and none.at(min_gain=-0.5).decision is Decision.STEER


def test_sentences_name_confidence_scope_reason_and_size(gains):
    steer = str(certify(gains, DEFAULT_THRESHOLDS))
    for part in ("STEER at threshold", "confidence 0.95", "250 calibration", "subgroup"):
        assert part in steer
    known = dataclasses.replace(certify(gains, DEFAULT_THRESHOLDS), base=0.7)
    assert f"from 0.700 to {0.7 + known.best.gain:.3f}" in str(known)
    weak = certify(gains[:, :40], DEFAULT_THRESHOLDS, protocol=Protocol(delta=0.01))
    assert weak.abstained and weak.needed > 40
    assert f"about {weak.needed} examples" in str(weak) and "confidence 0.99" in str(weak)
    harm = certify(-np.abs(gains), DEFAULT_THRESHOLDS)
    assert harm.needed is None and "unless chance hid a gain" in str(harm)
    assert harm.decision.advice != Decision.STEER.advice
    assert "<table>" in weak._repr_html_() and steer.count("\n") == 0


def test_a_certificate_survives_its_file_and_notices_a_change(gains, tmp_path):
    issued = certify(gains, DEFAULT_THRESHOLDS, examples=range(250))
    issued.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == issued
    text = (tmp_path / "calibration.json").read_text()
    assert '"n": 250' in text
    (tmp_path / "calibration.json").write_text(text.replace('"n": 250', '"n": 500'))
    with pytest.raises(ValueError, match="changed after it was issued"):
        Calibration.load(tmp_path / "calibration.json")
    json.dumps(issued.to_json())
    with pytest.raises(dataclasses.FrozenInstanceError):
        issued.n = 5


def test_hooks_are_those_of_the_certified_threshold(gains):
    class Steering:
        def at(self, threshold):
            self.threshold = threshold
            return self

        def fwd_hooks(self):
            return (("blocks.0.hook_resid_post", self.threshold),)

    steered = certify(gains, DEFAULT_THRESHOLDS)
    assert steered.fwd_hooks(Steering()) == [("blocks.0.hook_resid_post", steered.threshold)]


def test_a_second_look_pays(gains, tmp_path):
    first = certify(gains[:, :60], DEFAULT_THRESHOLDS, min_gain=0.2, examples=range(60))
    fresh = {"examples": range(60, 250), "after": first}
    assert first.abstained and first.spent == 0.05
    with pytest.raises(ValueError, match="nothing is left for look 2"):
        certify(gains[:, 60:], DEFAULT_THRESHOLDS, **fresh)
    both = Protocol(delta=0.1)
    second = certify(gains[:, 60:], DEFAULT_THRESHOLDS, protocol=both, **fresh)
    assert second.delta == pytest.approx(0.05) and second.spent == pytest.approx(0.1)
    assert second.look == 2 and "confidence 0.9 " in str(second)
    with pytest.raises(ValueError, match="60 of these examples were already looked at"):
        certify(gains, DEFAULT_THRESHOLDS, protocol=both, examples=range(250), after=first)
    with pytest.raises(ValueError, match="pass `examples`"):
        certify(gains, DEFAULT_THRESHOLDS, protocol=both, after=first)
    first.save(tmp_path / "c.json")
    first.save(tmp_path / "c.json")  # the same certificate is no second look
    with pytest.raises(ValueError, match="second look with the whole delta"):
        certify(gains, DEFAULT_THRESHOLDS, examples=range(250)).save(tmp_path / "c.json")
    second.save(tmp_path / "c.json")


def test_announced_looks_share_delta_and_may_keep_their_examples(gains):
    terms = Protocol(sizes=(60, 250))
    first = certify(
        gains[:, :60], DEFAULT_THRESHOLDS, protocol=terms, min_gain=0.2, examples=range(60)
    )
    assert first.delta == 0.025 and first.evidence[0].level == pytest.approx(0.0025)
    second = certify(gains, DEFAULT_THRESHOLDS, protocol=terms, examples=range(250), after=first)
    assert second.delta == 0.025 and second.spent == pytest.approx(0.05)
    with pytest.raises(ValueError, match="announced looks at"):
        certify(gains[:, :90], DEFAULT_THRESHOLDS, protocol=terms)
    assert not second.abstained
    with pytest.raises(ValueError, match="did not abstain"):
        certify(gains, DEFAULT_THRESHOLDS, protocol=terms, after=second)


def test_groups_share_delta_and_decide_alone():
    rng = np.random.default_rng(8)
    good = draw(rng, np.full(10, 0.25), np.full(10, 0.02), 150)
    bad = draw(rng, np.full(10, -0.1), np.full(10, 0.2), 150)
    names = ["good"] * 150 + ["bad"] * 150
    both = certify_groups(np.hstack((good, bad)), DEFAULT_THRESHOLDS, names)
    assert not both["good"].abstained and both["bad"].abstained
    assert both["good"].evidence[0].level == pytest.approx(0.05 / 2 / 10)
    assert "group 'good' (one of 2 at once)" in str(both["good"])
    assert "confidence 0.95" in str(both["bad"])
    with pytest.raises(ValueError, match="group names"):
        certify_groups(good, DEFAULT_THRESHOLDS, names)


def test_a_favourite_threshold_may_have_half_of_delta(gains):
    terms = Protocol(weights=favourite_weights(10, 5))
    rows = certify(gains, DEFAULT_THRESHOLDS, protocol=terms).evidence
    assert rows[5].level == pytest.approx(0.025)
    assert rows[5].lower > certify(gains, DEFAULT_THRESHOLDS).evidence[5].lower
    only = Protocol(thresholds=(0.1, 0.2), weights=(1.0, 0.0))
    assert certify(gains[:2], (0.1, 0.2), protocol=only).evidence[1].lower == -1


def test_grids_are_those_of_the_design():
    logits = np.log(np.array(DEFAULT_THRESHOLDS) / (1 - np.array(DEFAULT_THRESHOLDS)))
    assert np.diff(logits) == pytest.approx(np.full(9, np.diff(logits)[0]), abs=1e-3)
    assert (DEFAULT_THRESHOLDS[0], DEFAULT_THRESHOLDS[-1]) == (0.001, 0.7)
    assert pytest.approx(np.linspace(1e-3, 0.99, 10)) == PAPER_THRESHOLDS


BAD_GAINS = {
    "n=0": np.zeros((10, 0)),
    "not finite": np.full((10, 5), np.nan),
    r"in \[-1, 1\]": np.full((10, 5), 2.0),
    "not -1, 0 or 1": np.full((10, 5), 0.5),
    "do not fit": np.zeros((9, 5)),
}


@pytest.mark.parametrize("sentence", BAD_GAINS)
def test_bad_gains_are_refused(sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        certify(BAD_GAINS[sentence], DEFAULT_THRESHOLDS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_gain": 1.0}, "not a gain between"),
        ({"min_gain": math.nan}, "not a gain between"),
        ({"examples": [*range(249), 7]}, "Example 7 is there more than once"),
        ({"examples": range(9)}, "identities"),
        ({"thresholds": PAPER_THRESHOLDS}, "but the protocol fixed"),
    ],
)
def test_bad_questions_are_refused(gains, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        certify(gains, **{"thresholds": DEFAULT_THRESHOLDS, **options})


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        ({"delta": 0.0}, "probability"),
        ({"delta": math.nan}, "probability"),
        ({"thresholds": (0.1, 0.1)}, "distinct"),
        ({"thresholds": ()}, "distinct"),
        ({"weights": (0.5,)}, "do not share delta"),
        ({"bound": "bootstrap"}, "no metric"),
        ({"metric": "error", "bound": "mcnemar"}, "pass bound='betting'"),
        ({"sizes": (600, 250)}, "increasing"),
    ],
)
def test_bad_terms_are_refused(terms, sentence):
    with pytest.raises(ValueError, match=sentence):
        Protocol(**terms)


def test_planning_and_monitoring_load_neither_torch_nor_pandas():
    code = (
        "import sys, mera_tl.planning, mera_tl.monitor, mera_tl.certificate;"
        "print([m for m in ('torch', 'pandas', 'plotly', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
