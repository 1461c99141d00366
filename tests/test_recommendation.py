"""The verdict on a run: certified first, then least harm, then cheapest; calibration only."""

import json
import shutil
from dataclasses import replace

import pytest
from conftest import run_in
from test_trusting import CONFIG

from mera_tl import Calibration, storage
from mera_tl.benchmark import Way, choose_way, recommend
from mera_tl.certificate import promised_points

SIZES = {"train": "300", "calibration": "120", "test": "60"}
METHODS = ["no_steering", "flip", "class_probe", "withhold"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("verdict") / "run", replace(CONFIG, **SIZES), METHODS)


def way(what, gain, regressions=0, *, certified=True, method="", passes=1):
    told = {"gain": gain, "regressions": regressions, "passes": passes}
    return Way(what, method or what, certified, "", **told)


def test_the_best_certified_gain_wins_then_least_harm_then_the_least_cost():
    steer, flip = way("steer", 0.10), way("flip", 0.08)
    assert choose_way([flip, steer]) == steer
    close = way("flip", 0.096)
    assert choose_way([steer, close]) == close  # cheaper, and not told apart
    harmful = replace(close, regressions=2)
    assert choose_way([steer, harmful]) == steer
    twice = way("steer", 0.10, passes=2, method="twice")
    assert choose_way([twice, steer]) == steer
    better = way("steer", 0.3, certified=False)
    assert choose_way([better, flip]) == flip
    assert choose_way([better, flip], "steer") == better
    assert choose_way([better]) is None
    trust = Way("withhold", "withhold", True, "WITHHOLD")
    assert choose_way([better, trust]) == trust
    assert choose_way([flip, trust]) == flip


def test_a_run_comes_to_one_verdict_with_its_evidence(mera, folder):
    found = recommend(folder)
    assert (found.what, found.method) == ("classify", "class_probe")
    assert found.confidence == pytest.approx(0.95)
    chosen, *others = found.ways
    assert chosen.certified and chosen.at_least > 0 and chosen.n == 120
    assert chosen.gain == pytest.approx((chosen.recoveries - chosen.regressions) / 120)
    assert {each.what for each in others} == {"flip", "withhold"}
    assert "list of options" in " ".join(chosen.needs)
    assert "CLASSIFY" in mera("recommend", folder).out
    # What steers nothing does not say that it steers, neither in a table nor in its certificate.
    for format in ("text", "csv"):
        printed = mera("table", folder, "--format", format).out
        assert "CLASSIFY" in printed and "STEER" not in printed
    certificate = str(Calibration.load(folder / "certificates" / "class_probe"))
    assert certificate.startswith("ANSWER OTHERWISE: ")
    assert json.loads(mera("recommend", folder, "--json").out)["method"] == "class_probe"


def test_a_doubtful_baseline_is_said_with_the_verdict(folder, tmp_path):
    decision = Calibration.load(folder / "certificates" / "class_probe")
    assert "Baseline" not in str(recommend(folder))  # the control
    doubt = "On 50 prompts accuracy is 60 %, below the 86 % of always giving one answer."
    setup = {**decision.setup, "warnings": [doubt]}
    replace(decision, setup=setup).save(tmp_path / "certificates" / "class_probe")
    records = storage.read_records(folder / "records.jsonl")
    kept = [record for record in records if record["method"] in ("no_steering", "class_probe")]
    storage.write_records(tmp_path / "records.jsonl", kept)
    found = recommend(tmp_path)
    assert found.what == "classify" and str(found).endswith(f" Baseline: {doubt}")


def test_test_outcomes_have_no_say(mera, folder, tmp_path):
    records = storage.read_records(folder / "records.jsonl")
    for record in records:
        record |= {"accuracy": 1 - record["accuracy"], "spi": -record["spi"], "transitions": {}}
    for name in ("certificates", "config.json"):
        (tmp_path / name).symlink_to(folder / name)
    storage.write_records(tmp_path / "records.jsonl", records)
    assert recommend(tmp_path) == recommend(folder)
    for record in records:  # the control: the certificates have
        record["certificate"] = None
    storage.write_records(tmp_path / "records.jsonl", records)
    alone = recommend(tmp_path)
    assert (alone.what, alone.method) == ("leave alone", None)
    assert "No method with a certificate" in str(alone)
    printed = mera("recommend", tmp_path).out  # nothing is certified: nothing says it is
    assert "certificates hold" not in printed and "yes" not in printed
    assert "All certificates hold at once" in mera("recommend", folder).out


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no records"):
        recommend(tmp_path)


def test_a_grid_has_no_one_verdict_and_names_its_runs(folder, tmp_path):
    """Records of several runs were taken for one run's, by method; one that failed ended it."""
    shutil.copytree(folder, tmp_path / "one")
    records = storage.read_records(folder / "records.jsonl")
    failed = {"method": "flip", "failure": "OSError: disk"}
    storage.write_records(tmp_path / "records.jsonl", [*records, failed])
    with pytest.raises(ValueError, match="is a grid of several runs; pass one of .*/one"):
        recommend(tmp_path)
    assert recommend(tmp_path / "one") == recommend(folder)  # the control


def test_a_promise_is_never_rounded_up():
    assert [promised_points(x) for x in (0.2196, 0.1, -0.0004)] == ["+21.9", "+10.0", "-0.1"]
