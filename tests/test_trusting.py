"""Withholding as a method: what is answered is right as often as promised."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_outcomes, organism, random_probe, run_in

from mera_tl import Terms, load_task, storage
from mera_tl.benchmark import RunConfig, open_run
from mera_tl.certificate import Withholding, withholding_thresholds
from mera_tl.inference import Activations
from mera_tl.methods import (
    Candidate,
    ClassProbe,
    Search,
    certify_class_probe,
    certify_flip,
    certify_trust,
)
from mera_tl.probes import LinearProbe
from mera_tl.report import RunFolder
from mera_tl.steering import Steering

CONFIG = RunConfig(
    model="organism",
    task="spam_cue",
    train="600",
    calibration="300",
    test="300",
    layers="1",
    positions="last",
    max_risk=0.1,
    batch_size=150,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    methods = ("no_steering", "flip", "withhold")
    return run_in(tmp_path_factory.mktemp("trust") / "run", CONFIG, methods)


def test_what_is_answered_is_right_as_often_as_promised(folder):
    run = RunFolder.open(folder)
    record, base = run.record("withhold"), run.record("no_steering")
    assert record["decision"] == "WITHHOLD" and record["delta"] == 0.025  # flip has the other half
    assert base["risk"] > 0.2 and record["risk"] <= 0.1
    details = record["details"]
    assert details["wrong_at_most"] <= 0.1 and 0.2 < details["answered"] < 0.9
    assert 1 - record["unanswered"] / record["n"] == pytest.approx(details["answered"], abs=0.1)
    assert record["transitions"]["0->1"] == 0 and record["steered_share"] == 0
    changes = run.changes("withhold")
    given = changes[changes["prediction_after"].notna()]
    assert (given["prediction_before"] == given["prediction_after"]).all()
    assert run.main_method == "flip" and set(run.certificates) == {"flip"}


def test_it_is_found_again_and_its_decision_follows_from_its_counts(folder):
    path = folder / "withholding" / "withholding.json"
    plain = storage.read_json(path)
    found = Withholding.from_json(plain)
    assert found == Withholding.from_json(found.to_json()) and found.threshold is not None
    for row in plain["rows"]:
        row["wrong"] = row["answered"]
    assert Withholding.from_json(plain).threshold is None  # not by its bounds


def test_it_names_what_it_holds_for_and_refuses_another_model(folder):
    found = Withholding.from_json(storage.read_json(folder / "withholding" / "withholding.json"))
    model, setup = organism(), found.setup
    assert (setup["task"], setup["options"]) == ("spam_cue", ["spam", "ham"])
    assert {"template", "readout", "answers", "data", "tokenizer"} <= set(setup)
    probe = LinearProbe.load(folder / "probes" / "ridge")
    assert setup["reads"]["layers"] == [probe.best_layer] and len(setup["reads"]["probe"]) == 16
    found.check(model)
    changes: list[dict] = [{"fingerprint": "f00d"}, {"system": "Be brief."}, {"eos_ids": (7,)}]
    for other in (replace(model, **change) for change in changes):
        with pytest.raises(ValueError, match="was certified on organism"):
            found.check(other)


def test_every_certificate_needs_the_calibration_split():
    """Whatever else is wrong: it is looked at first, before anything is run."""
    ones = torch.ones(2)
    model, terms = organism(), Terms()
    steering, classes = Steering(random_probe(model)), ClassProbe(torch.zeros(2, 8), ones, 0, 1.0)
    found = Search(Candidate("flip", 3.0, (1,), "final", 0.5), steering, pd.DataFrame(), {})
    learned = Activations({}, make_outcomes("ab", ones.long(), ones.long(), torch.ones(2, 2)))
    for task in load_task("spam_cue").split(train=20, calibration=10, test=10)[::2]:
        for certify in (
            partial(certify_flip, model, task, found),
            partial(certify_class_probe, model, task, classes),
            partial(certify_trust, model, task, steering, learned, alpha=0.1),
        ):
            with pytest.raises(ValueError, match=f"got the {task.role} split"):
                certify(terms=terms)


def test_it_is_said_in_table_report_and_explanation(mera, folder):
    assert "WITHHOLD" in mera("table", folder).out
    mera("report", folder)
    page = (folder / "report.html").read_text("utf-8").replace("\xa0", " ")
    assert RunFolder.open(folder).trust.split("(")[0] in page
    changes = RunFolder.open(folder).changes("withhold")
    silent = changes[changes["prediction_after"].isna()]["row"].iloc[0]
    said = " ".join(mera("explain", folder, "--method", "withhold", "--row", silent).out.split())
    assert "becomes nothing" in said and "no answer is given" in said
    said = " ".join(mera("explain", folder, "--method", "flip").out.split())
    assert "becomes" in said and "second-best option is answered" in said


def test_without_a_trustworthy_answer_nothing_is_promised_and_nothing_changes(tmp_path):
    sizes = {"train": "120", "calibration": "40", "test": "40"}
    with open_run(replace(CONFIG, max_risk=0.001, **sizes), tmp_path) as run:
        record = run.record("withhold")
        assert torch.equal(run.treat("withhold").apply(run, run.splits.test).probs, run.base.probs)
    assert (
        record["decision"] == "ABSTAIN"
        and "no threshold could be certified" in record["certificate"]
    )


def test_a_primary_method_leaves_it_nothing(tmp_path):
    sizes = {"train": "120", "calibration": "40", "test": "40", "primary": "flip"}
    with open_run(replace(CONFIG, **sizes), tmp_path) as run:
        records = list(run.records(["flip", "withhold"]))
    assert records[1]["decision"] is None and records[1]["unanswered"] == 0


def test_thresholds_begin_where_training_says_that_something_can_be_certified():
    rng = np.random.default_rng(0)
    predicted = rng.random(1000)
    correct = rng.random(1000) > (predicted > 0.4) * 0.6  # none wrong among the lowest two fifths
    first = withholding_thresholds(predicted, 240, alpha=0.05, correct=correct)[0]
    assert 0.2 < first < 0.5 < withholding_thresholds(predicted, 240, alpha=0.05)[0]
