"""Laws of the certificate: rarely wrong, useful, and bound to what it certified."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
from conftest import organism, random_probe, talking_task

from mera_tl.certificate import (
    DEFAULT_THRESHOLDS,
    PAPER_THRESHOLDS,
    Calibration,
    Decision,
    Terms,
    calibrate,
    certify,
    distinct,
    unconditional,
)
from mera_tl.inference import ReadSettings, collect, evaluate, rows_fitted
from mera_tl.methods import certify_class_probe, fit_class_probe
from mera_tl.probes import fit_error_probe
from mera_tl.steering import Additive, Steering, fit_direction
from mera_tl.tasks import Task, load_task

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
    for _ in range(6):
        sample = draw(rng, HUMP, LOST, 150)
        steers = not certify(sample, min_gain=0.0).abstained
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


@pytest.mark.parametrize(("n_candidates", "control"), [(1, 0.12), (10, 0.35)])
def test_copies_of_a_text_are_no_evidence(n_candidates, control):
    """True gain 0, every text three times: with one example per text the promise is kept."""
    rng, runs, texts = (
        np.random.default_rng(n_candidates),
        600,
        [f"text {i // 3}" for i in range(240)],
    )
    wrong, naive, level = [], [], 0.05 / n_candidates
    for run in range(runs):
        counted = draw(rng, np.zeros(n_candidates), np.full(n_candidates, 0.06), 80, nested=0.0)
        copied = np.repeat(counted, 3, axis=1)
        wrong.append(certified(copied[:, distinct(texts, seed=run)], level, 0.0))
        naive.append(certified(copied, level, 0.0))
    assert np.mean(wrong) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
    assert np.mean(naive) > control
    with pytest.raises(ValueError, match="text of example 'text 0' is there more than once"):
        certify(copied, texts=texts)
    cased = [text.upper() if i % 2 else text for i, text in enumerate(texts)]
    assert distinct(cased, seed=1) == distinct(texts, seed=1)


def test_gain_and_limited_harm_are_promised_together():
    rng, runs, n = np.random.default_rng(9), 50, 150
    terms = Terms(max_regressions=0.05)

    def share(gain, lost):
        tables = rng.multinomial(n, [gain + lost, lost, 1 - gain - 2 * lost], runs)
        draws = [np.repeat([1.0, -1.0, 0.0], table)[None] for table in tables]
        return np.mean([not certify(gains, terms=terms).abstained for gains in draws])

    assert share(0.0, 0.01) <= 0.14  # no gain, whatever the harm
    assert share(0.2, 0.05) <= 0.14  # harm as great as is not allowed any more, whatever the gain
    assert share(0.2, 0.002) > 0.8
    harmful = certify(np.repeat([1.0, -1.0, 0.0], (60, 12, 78))[None], terms=terms)
    assert harmful.abstained and "of answers may turn wrong; allowed 5.0 %" in str(harmful)
    assert not certify(np.repeat([1.0, -1.0, 0.0], (60, 12, 78))[None]).abstained  # control
    safe = certify(np.repeat([1.0, -1.0, 0.0], (60, 0, 90))[None], terms=terms)
    assert "at least +0.0 points and at most 5.0 % of answers turned wrong" in str(safe)
    assert safe.best.regressed_at_most == pytest.approx(1 - 0.05 ** (1 / 150))
    with pytest.raises(ValueError, match="fixed beforehand and no other"):
        safe.at(min_gain=0.1)
    assert Calibration.from_json(json.loads(json.dumps(safe.to_json()))) == safe


def test_six_points_are_certified_at_250_examples_where_hoeffding_certifies_none():
    rng, runs = np.random.default_rng(3), 300
    samples = [draw(rng, HUMP, LOST, 250) for _ in range(runs)]
    assert np.mean([certified(sample, 0.005, 0.0) for sample in samples]) >= 0.6
    by_range = Terms(bound="hoeffding")
    assert all(certify(s, terms=by_range).abstained for s in samples[:20])


def test_lower_bounds_of_all_thresholds_hold_at_once():
    rng, runs, delta = np.random.default_rng(4), 100, 0.2
    few = Terms(delta=delta)
    gain, lost = np.array([0.0, 0.04, 0.1]), np.full(3, 0.03)
    missed = 0
    for _ in range(runs):
        rows = certify(draw(rng, gain, lost, 40), terms=few).evidence
        missed += any(row.lower > true for row, true in zip(rows, gain, strict=True))
    assert 0 < missed / runs <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)


def test_the_best_certified_gain_is_chosen_and_ties_go_to_the_mildest():
    helps = np.repeat([1.0, -1.0, 0.0], (40, 0, 160))
    churns = np.repeat([1.0, -1.0, 0.0], (60, 20, 120))
    less = np.repeat([1.0, -1.0, 0.0], (35, 0, 165))
    gains = np.stack((helps, helps, churns, less))
    chosen = certify(gains, candidates=(0.1, 0.2, 0.3, 0.4))
    assert chosen.decision is Decision.STEER and chosen.threshold == 0.2
    assert chosen.best.gain == 0.2 and chosen.best.recoveries == 40


def test_a_gain_may_be_asked_for_afterwards(gains):
    asked = certify(gains, candidates=DEFAULT_THRESHOLDS)
    lower = asked.best.lower
    assert not asked.at(min_gain=lower - 1e-3).abstained
    more = asked.at(min_gain=max(row.lower for row in asked.evidence) + 1e-3)
    assert more.abstained and more.threshold is None and more.fwd_hooks() == []
    again = certify(gains, candidates=DEFAULT_THRESHOLDS, min_gain=more.min_gain)
    assert [r.p for r in more.evidence] == pytest.approx([r.p for r in again.evidence])
    assert more.decision == again.decision and "ABSTAIN" in str(more)


@pytest.mark.parametrize("bound", ["mcnemar", "betting", "hoeffding"])
def test_every_bound_certifies_a_great_gain(bound):
    great = draw(np.random.default_rng(5), np.full(10, 0.5), np.full(10, 0.01), 250)
    steered = certify(great, terms=Terms(bound=bound))
    assert not steered.abstained and 0.1 < steered.best.lower < 0.5
    assert all((row.p <= row.level) == (row.lower >= 0) for row in steered.evidence)


def test_a_fall_of_the_error_is_certified_by_betting():
    rng = np.random.default_rng(6)
    falls = np.clip(rng.normal(0.06, 0.15, (10, 250)), -1, 1)
    terms = Terms(metric="error")
    steered = certify(falls, terms=terms)
    assert not steered.abstained and "points less error" in str(steered)
    none = certify(falls - falls.mean(), terms=terms)
    assert none.abstained and none.at(min_gain=-0.5).decision is Decision.STEER


def test_sentences_say_what_is_promised_why_not_and_how_many_examples_it_takes(gains):
    known = dataclasses.replace(certify(gains, candidates=DEFAULT_THRESHOLDS), base=0.7)
    first, second = str(known).split("\n")
    after = 70 + 100 * known.best.gain
    assert first.startswith(f"STEER: 70 % -> {after:.0f} %, certified at least +")
    assert float(first.split("+")[1].split()[0]) <= 100 * known.best.lower
    for part in ("Confidence 0.95", "250 calibration", "10 candidates", "subgroup"):
        assert part in second
    weak = certify(gains[:, :40], terms=Terms(delta=0.01), candidates=DEFAULT_THRESHOLDS)
    assert weak.abstained and weak.needed > 40
    best = f"{100 * weak.best.gain:+.1f} points at threshold {weak.best.threshold:.4g}"
    assert str(weak).startswith(f"ABSTAIN. Best observed gain {best} (")
    assert f"required +0.0. About {weak.needed} examples would certify this gain" in str(weak)
    assert "Confidence 0.99" in str(weak)
    harm = certify(-np.abs(gains))
    assert harm.needed is None and "unless chance hid a gain" in str(harm)
    assert "<table>" in weak._repr_html_() and len(repr(weak)) < 60


def test_a_decision_follows_from_its_evidence_also_when_it_is_read(gains):
    issued = certify(gains, candidates=DEFAULT_THRESHOLDS, examples=range(250))
    kept = json.loads(json.dumps(issued.to_json()))
    assert Calibration.from_json(kept) == issued
    errors = certify(gains * 0.5, terms=Terms(metric="error"))
    assert Calibration.from_json(json.loads(json.dumps(errors.to_json()))) == errors
    with pytest.raises(dataclasses.FrozenInstanceError):
        issued.n = 5

    def edited(**changes):
        content = json.loads(json.dumps(kept))
        row = content["evidence"][issued.chosen]
        for name, value in changes.items():
            (row if name in row else content)[name] = value
        return content

    assert Calibration.from_json(edited(n=250)) == issued  # control
    best = issued.best
    for change in (
        {"n": 500},
        {"lower": 0.2},
        {"p": best.p / 2},
        {"recoveries": best.recoveries + 5},
        {"recoveries": 251},
        {"gain": 0.5},
        {"level": 0.05},
        {"chosen": (issued.chosen + 1) % 10},
        {"decision": "ABSTAIN"},
        {"decision": "ABSTAIN", "chosen": None},
        {"min_gain": 0.2},
        {"examples": [*range(249), 7]},
        {"examples": [*range(100)]},
    ):
        with pytest.raises(ValueError, match="does not follow from its own evidence"):
            Calibration.from_json(edited(**change))
    for wrong in ({}, {**kept, "evidence": [{}]}, {**kept, "terms": {"delta": 0.05}}):
        with pytest.raises(ValueError, match="no certificate, or one of another version"):
            Calibration.from_json(wrong)


def test_a_favourite_candidate_may_have_half_of_delta(gains):
    terms = Terms(weights=tuple(0.5 if i == 5 else 0.5 / 9 for i in range(10)))
    rows = certify(gains, terms=terms).evidence
    assert rows[5].level == pytest.approx(0.025)
    assert rows[5].lower > certify(gains).evidence[5].lower
    only = Terms(weights=(1.0, 0.0))
    assert certify(gains[:2], terms=only).evidence[1].lower == -1


def test_grids_are_those_of_the_design():
    logits = np.log(np.array(DEFAULT_THRESHOLDS) / (1 - np.array(DEFAULT_THRESHOLDS)))
    assert np.diff(logits) == pytest.approx(np.full(9, np.diff(logits)[0]), abs=1e-3)
    assert (DEFAULT_THRESHOLDS[0], DEFAULT_THRESHOLDS[-1]) == (0.001, 0.7)
    assert pytest.approx(np.linspace(1e-3, 0.99, 10)) == PAPER_THRESHOLDS


BAD_GAINS = {
    r"\(10, 0\)": np.zeros((10, 0)),
    "not finite": np.full((10, 5), np.nan),
    r"in \[-1, 1\]": np.full((10, 5), 2.0),
    "not -1, 0 or 1": np.full((10, 5), 0.5),
    "do not fit": np.zeros((0, 5)),
}


@pytest.mark.parametrize("sentence", BAD_GAINS)
def test_bad_gains_are_refused(sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        certify(BAD_GAINS[sentence])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"min_gain": 1.0}, "not a gain between"),
        ({"min_gain": math.nan}, "not a gain between"),
        ({"examples": [*range(249), 7]}, "Example 7 is there more than once"),
        ({"examples": range(9)}, "9 values came with 250 examples"),
        ({"texts": ["a", *map(str, range(248)), "a"]}, "text of example 'a' is there more than"),
        ({"texts": ["A b", *map(str, range(248)), "a\u00a0 B"]}, "'a b' is there more than"),
        ({"candidates": PAPER_THRESHOLDS[:9]}, "9 candidates were named but the gains have 10"),
        ({"candidates": [0.1] * 10}, "there more than once"),
        ({"terms": Terms(weights=(0.5, 0.5))}, "2 weights came with 10 candidates"),
    ],
)
def test_bad_questions_are_refused(gains, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        certify(gains, **options)


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        ({"delta": 0.0}, "probability"),
        ({"delta": math.nan}, "probability"),
        ({"run_delta": 2.0}, "run_delta=2.0"),
        ({"delta": 0.1, "run_delta": 0.05}, "more than all certificates of the run may spend"),
        ({"max_regressions": 0.0}, "probability"),
        ({"weights": (0.5,)}, "do not share delta"),
        ({"bound": "bootstrap"}, "no metric"),
        ({"metric": "error", "bound": "mcnemar"}, "pass bound='betting'"),
        ({"metric": "error", "max_regressions": 0.1}, "pass metric='correct'"),
    ],
)
def test_bad_terms_are_refused(terms, sentence):
    with pytest.raises(ValueError, match=sentence):
        Terms(**terms)


# --- calibrating a model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(models):
    """A model, the calibration split of a task whose options it says, and a steering."""
    model = models["gpt2"]
    split = talking_task(model).subset(range(20), role="calibration")
    return model, split, Steering(random_probe(model))


def test_only_the_calibration_split_certifies(spoken):
    model, split, steering = spoken
    with pytest.raises(ValueError, match="needs the calibration split, got the test split"):
        calibrate(model, split.subset(range(20), role="test"), steering)
    decision = calibrate(model, split, steering, delta=0.1)
    assert decision.terms == Terms(delta=0.1)
    assert decision.n == 20 and decision.unused == 0
    assert decision.base == pytest.approx(evaluate(model, split).accuracy)
    assert [row.threshold for row in decision.evidence] == pytest.approx(DEFAULT_THRESHOLDS)
    assert decision.setup["data"] == split.data_hash and decision.setup["task"] == "toy"


def test_texts_of_which_only_what_differs_is_cut_off_are_one(spoken):
    model, split, steering = spoken
    long = " ".join(["red"] * 200)
    texts = [f"{long} {word}" for word in ("one", "two", "three")]
    copies = (
        dataclasses.replace(split.examples[i], prompt=f"question : {text} ? answer :", text=text)
        for i, text in enumerate(texts)
    )
    mixed = dataclasses.replace(split, examples=(*copies, *split.examples[3:]))
    settings = ReadSettings(truncate=True)
    decision = calibrate(model, mixed, steering.at(0.3), settings=settings)
    assert (decision.n, decision.unused) == (18, 2)
    assert calibrate(model, split, steering.at(0.3), settings=settings).n == 20  # control


def test_hooks_are_those_of_the_certified_candidate_and_of_no_other(spoken):
    model, split, steering = spoken
    candidates = [
        dataclasses.replace(steering, rule=Additive(0.3)),
        dataclasses.replace(steering, rule=Additive(0.6)),
        dataclasses.replace(steering.at(0.3), layers=(1,)),
    ]
    decision = calibrate(model, split, candidates, min_gain=-0.99)
    assert not decision.abstained and decision.steering.certificate is decision
    wanted = dict(candidates[decision.chosen].fwd_hooks())
    hooks = dict(decision.fwd_hooks())
    assert hooks.keys() == wanted.keys()
    for name, hook in hooks.items():
        assert hook.rule == wanted[name].rule and torch.equal(hook.step, wanted[name].step)
    # control: a certificate does not survive a change of what it certified
    assert dataclasses.replace(decision.steering, positions="last").certificate is None
    assert decision.at(min_gain=0.99).fwd_hooks() == []
    alone = certify(np.ones((1, 50)))
    with pytest.raises(ValueError, match="made from gains alone"):
        alone.fwd_hooks()


def test_candidates_that_cannot_be_certified_are_refused(spoken):
    model, split, steering = spoken
    with pytest.raises(ValueError, match="Candidate 1 has no threshold"):
        calibrate(model, split, [steering.at(0.3), steering])
    with pytest.raises(ValueError, match="there more than once"):
        calibrate(model, split, [steering.at(0.3)] * 2)
    with pytest.raises(ValueError, match="neither a Steering nor"):
        calibrate(model, split, [])
    with pytest.raises(ValueError, match="contradicts"):
        calibrate(model, split, steering, terms=Terms(), delta=0.1)


def test_what_a_direction_was_fitted_to_is_no_evidence_for_it():
    """It passed where the probe beside it was fitted to other examples, or by hand."""
    model, settings = organism(), ReadSettings(progress=False)
    splits = load_task("yesno_bias").split(0, train=60, calibration=30, test=20)
    probe = random_probe(model)
    found = {}
    for name, task in {"train": splits.train, "calibration": splits.calibration}.items():
        activations = collect(model, task, settings=settings)
        vectors = fit_direction(activations, probe, "pattern").vectors
        found[name] = Steering(probe, vectors, positions="last").at(0.4)
    with pytest.raises(ValueError, match="direction was fitted to 30 of the 30 calibration"):
        calibrate(model, splits.calibration, found["calibration"], settings=settings)
    calibrate(model, splits.calibration, found["train"], settings=settings)  # the control


def test_what_a_probe_was_fitted_to_is_no_evidence_for_it():
    """Another seed's training split, the whole task, a mixture: the rows are what counts."""
    model, task = organism(), load_task("spam_cue")
    sizes = {"train": 60, "calibration": 30, "test": 30}
    here, there = task.split(0, **sizes), task.split(1, train=2000, calibration=30, test=30)
    some = [collect(model, each) for each in (here.train, there.train.subset(range(60)))]
    elsewhere = collect(model, load_task("yesno_bias").subset(range(60)))

    def certify(activations):
        steering = Steering(fit_error_probe(activations), layers="best", positions="last")
        return calibrate(model, here.calibration, steering.at(0.5))

    assert certify(some[0]).n == certify([some[0], elsewhere]).n == 30  # controls
    shared = {e.row for e in here.calibration.examples} & set(some[1].outcomes.rows.tolist())
    whole = collect(model, here.calibration)
    for activations, n in ((whole, 30), ([some[0], whole], 30), (some[1], len(shared))):
        if n:
            with pytest.raises(ValueError, match=f"fitted to {n} of the 30 calibration"):
                certify(activations)
    probe = fit_error_probe(some[0])
    fitted = {example.row for example in here.train.examples}
    assert rows_fitted(probe.manifest, here.test) == fitted
    assert rows_fitted(probe.manifest, load_task("yesno_bias")) == set()  # rows of other data
    # The classifier has a certificate of its own.
    for part, activations in ((here.train, some[0]), (here.calibration, whole)):
        learned = fit_class_probe(part.subset(range(len(part)), role="train"), activations)
        certify_classes = functools.partial(certify_class_probe, model, here.calibration, learned)
        if part is here.train:
            assert certify_classes(terms=Terms()).n == 30  # control
            continue
        with pytest.raises(ValueError, match="fitted to 30 of the 30 calibration"):
            certify_classes(terms=Terms())


def test_one_example_per_text_is_evidence(spoken):
    model, split, steering = spoken
    examples = [
        dataclasses.replace(example, row=example.row + 100 * copy, prompt=prompt)
        for example in split.examples
        for copy, prompt in enumerate((example.prompt, example.prompt.upper(), example.prompt))
    ]
    thrice = Task("toy", tuple(examples), "calibration")
    decision = calibrate(model, thrice, steering)
    texts = {example.key for example in split.examples}
    assert decision.n == len(texts) and decision.unused == len(thrice) - len(texts)
    assert f"{decision.unused} repeated texts unused" in str(decision)
    other = calibrate(model, thrice, steering, terms=Terms(seed=1))
    assert decision.examples != other.examples  # the choice is the seed's
    again = calibrate(model, thrice, steering)
    assert decision.examples == again.examples
