"""Methods: the table is whole, a user's own joins it, and each finds its work again."""

import os
from dataclasses import replace

import pytest
import torch
from conftest import organism, python
from test_race import SMALL, WIDE, planted

import mera_tl.methods
from mera_tl.benchmark import Run, RunConfig
from mera_tl.certificate import DEFAULT_THRESHOLDS, PAPER_THRESHOLDS
from mera_tl.inference import evaluate
from mera_tl.methods import METHODS, Treatment, find_method, find_methods, method, methods
from mera_tl.probes import fit_ranked_probe

CONFIG = RunConfig(model="organism", task="spam_cue")


def run_of(folder, **options):
    """A run on the planted failure, whose activations are at hand."""
    run = Run(replace(CONFIG, **options), folder, load=lambda _: organism())
    run.splits, run.activations = planted()
    run.read = WIDE
    return run


def refuse(*_, **__):
    raise AssertionError("this was done before")


@pytest.mark.parametrize("name", ["searched", "flip"])
def test_a_method_is_found_again_in_its_run_folder(name, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "Choices", lambda **_: SMALL)
    run = run_of(tmp_path)
    first = METHODS[name].treat(run)
    assert first.calibration is not None
    assert len(first.calibration.evidence) == 1
    for searching in ("search", "search_flip", "certify_flip"):
        monkeypatch.setattr(methods, searching, refuse)  # nothing is searched or certified twice
    again = METHODS[name].treat(run_of(tmp_path))
    test = run.splits.test.subset(range(60))
    runs = [treatment.apply(run, test) for treatment in (first, again)]
    assert torch.equal(runs[0].probs, runs[1].probs)
    base = evaluate(organism(), test, settings=WIDE)
    assert runs[0].accuracy > base.accuracy + 0.1


@pytest.mark.parametrize(
    "name", ["pattern_probe", "controlled_pattern", "controlled_contrastive", "answer_controlled"]
)
def test_a_direction_goes_through_the_same_calibration_as_the_papers(name, tmp_path):
    run = run_of(tmp_path, layers="1", positions="last")
    run.splits = run.splits._replace(calibration=run.splits.calibration.subset(range(60)))
    treatment = METHODS[name].treat(run)
    assert treatment.calibration is not None
    assert treatment.calibration.terms == run.terms(name)
    thresholds = [row.threshold for row in treatment.calibration.evidence]
    assert thresholds == pytest.approx(DEFAULT_THRESHOLDS)
    assert treatment.details["direction"] == name.removesuffix("_probe")


def test_the_table_is_whole_whatever_is_imported_first():
    printed = python("from mera_tl.methods import METHODS; print(*METHODS)").stdout
    assert printed.split() == [name for name in METHODS if name in methods.BUILT_IN]
    assert len(methods.BUILT_IN) == 37 and {"searched", "flip"} <= methods.BUILT_IN


OWN = """
from mera_tl.methods import Treatment, method

@method
def louder(run):
    "Say it louder."
    return Treatment(instruction="LOUDER.", details={"strength": run.config.strength})
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my_method.py"
    path.write_text(OWN)
    yield path
    METHODS.pop("louder", None)


def test_a_users_method_is_loaded_from_its_file_and_joins_the_others(own, tmp_path):
    found = find_method(f"{own}:louder")
    assert (found.name, found.about) == ("louder", "Say it louder.")
    treatment = found.treat(run_of(tmp_path, strength=0.3))
    assert treatment.instruction == "LOUDER." and treatment.details == {"strength": 0.3}
    assert find_methods(["louder", "flip"])[0].name == "louder"


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere.py:louder", "no file nowhere.py"), ("{own}:quieter", "defines no function")],
)
def test_a_users_method_that_is_not_there_is_one_sentence(own, name, words):
    with pytest.raises(ValueError, match=words):
        find_method(name.format(own=own))
    own.write_text("1 / 0")
    with pytest.raises(ValueError, match="does not run .ZeroDivisionError"):
        find_method(f"{own}:louder")


def test_no_users_method_takes_a_name_of_the_table():
    def flip(run):
        return Treatment()

    with pytest.raises(ValueError, match="flip is a method of mera_tl"):
        method(flip)
    assert mera_tl.methods.METHODS["flip"].treat is not flip


def test_records_of_methods_unknown_here_survive(own, tmp_path):
    run = run_of(tmp_path / "run", train="30", calibration="15", test="15")
    run.splits = run.splits._replace(test=run.splits.test.subset(range(15)))
    names = ["prompt_steering", f"{own}:louder"]
    assert [r["method"] for r in run.records(names)] == ["prompt_steering", "louder"]
    del METHODS["louder"]  # as in a process that has not loaded it
    list(run.records(["no_steering"]))
    kept = (tmp_path / "run" / "records.jsonl").read_text()
    assert '"method": "louder"' in kept and kept.index("no_steering") < kept.index("louder")


def test_what_a_users_method_did_before_it_was_edited_is_no_result_of_it(own, tmp_path):
    run, name = run_of(tmp_path, train="30", calibration="15", test="15"), f"{own}:louder"
    run.splits = run.splits._replace(test=run.splits.test.subset(range(15)))
    first, before = run.record(name), own.stat()
    assert run.record(name) == first
    own.write_text(OWN.replace("LOUDER", "FASTER"))
    # Of the same size, within the same second: an import would take the code of before.
    os.utime(own, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert find_method(name).treat(run).instruction == "FASTER."
    for ask in (run.record, run.treat, lambda name: list(run.records([name]))):
        with pytest.raises(ValueError, match="what louder did before its code was changed"):
            ask(name)
    own.write_text(OWN)  # control
    assert run.record(name) == first


def test_a_method_named_twice_or_nowhere_is_refused():
    with pytest.raises(ValueError, match="flip is named twice"):
        find_methods(["flip", "no_steering", "flip"])
    with pytest.raises(ValueError, match="name at least one"):
        find_methods([])


def test_the_papers_methods_have_the_papers_thresholds_and_its_best_regression(tmp_path):
    run = run_of(tmp_path, layers="1", positions="last")
    run.splits = run.splits._replace(calibration=run.splits.calibration.subset(range(40)))
    treatment = METHODS["optimal_probe"].treat(run)
    thresholds = [row.threshold for row in treatment.calibration.evidence]
    assert thresholds == pytest.approx(PAPER_THRESHOLDS, abs=1e-6)
    wanted = fit_ranked_probe(run.activations, "best")
    assert torch.equal(treatment.probe.weights, wanted.weights) and treatment.probe.kind != "ridge"
    asked = run_of(tmp_path / "asked", layers="1", positions="last", thresholds="0.2,0.4")
    asked.splits = run.splits
    evidence = METHODS["optimal_probe"].treat(asked).calibration.evidence
    assert [row.threshold for row in evidence] == pytest.approx([0.2, 0.4])
    own = METHODS["ridge_probe"].treat(run)
    assert own.probe.kind == "ridge"
    assert own.calibration.evidence[-1].threshold == pytest.approx(DEFAULT_THRESHOLDS[-1])
