"""The command line: the main job end to end, and every mistake one sentence."""

import csv
import json
import sys

import pytest
import torch
from conftest import make_task

from mera_tl import storage
from mera_tl.benchmark import RunConfig, open_run
from mera_tl.certificate import Calibration
from mera_tl.cli import app as cli

METHODS = ("no_steering", "prompt_steering", "additive_probe", "optimal_probe")


def write_task(folder, *, labels=None, name="toy", extra="", rows=60):
    """A user's own task: a CSV and a TOML file."""
    task = make_task(60)
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["text", "label"])
        for i, example in enumerate(task.examples[:rows]):
            label = (labels or example.options)[example.label] if labels != "one" else "yes"
            writer.writerow([f"{example.text} {'red ' * (i % 5)}{i}", label])
    (folder / f"{name}.toml").write_text(
        f'options = ["yes", "no"]\ndata = "{name}.csv"\ntext = "text"\n'
        f'template = "question : {{text}} ? answer :"\n{extra}',
        encoding="utf-8",
    )
    return str(folder / f"{name}.toml")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("toy"))


def mera(monkeypatch, *arguments):
    """Run the command in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["mera", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def arguments(checkpoints, toy, out, **changes):
    options = {"model": checkpoints["llama"], "task": toy, "train": 30, "calibration": 15}
    options |= {"test": 15, "out": out} | changes
    return [x for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value)]


def without_times(path):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in storage.read_records(path)]


def test_the_main_job_writes_records_certificates_and_a_table(
    monkeypatch, capsys, checkpoints, toy, tmp_path
):
    out = tmp_path / "run"
    told = arguments(checkpoints, toy, out)
    assert mera(monkeypatch, "run", *told, "--methods", *METHODS) == 0
    printed = capsys.readouterr().out
    records = storage.read_records(out / "records.jsonl")
    assert [record["method"] for record in records] == list(METHODS)
    for record in records:
        assert record["method"] in printed
        assert record["n"] == 15
        assert sum(record["transitions"].values()) == 15
        for name in ("model", "task", "space", "seed", "accuracy", "error", "spi", "threshold"):
            assert name in record
        assert {"config", "model", "data"} <= set(record["hashes"])
        assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]
    assert [r["decision"] is not None for r in records] == [False, False, False, True]
    certificate = Calibration.load(out / "certificates" / "optimal_probe.json")
    assert str(certificate) in printed
    assert not list(out.rglob("*.tmp"))

    # A second start finds everything; the steps, one by one, give the same records.
    before = (out / "records.jsonl").read_bytes()
    assert mera(monkeypatch, "run", *told, "--methods", *METHODS) == 0
    assert (out / "records.jsonl").read_bytes() == before
    steps = arguments(checkpoints, toy, tmp_path / "steps")
    for step in ("collect", "fit", "calibrate", "evaluate"):
        assert mera(monkeypatch, step, *steps, "--methods", *METHODS) == 0
    assert without_times(tmp_path / "steps" / "records.jsonl") == without_times(
        out / "records.jsonl"
    )
    assert mera(monkeypatch, "table", out, "--format", "markdown") == 0
    assert "| model | task | method |" in capsys.readouterr().out


def test_abstaining_equals_the_unsteered_run_bit_for_bit(checkpoints, toy, tmp_path):
    config = RunConfig(
        model=str(checkpoints["llama"]), task=toy, train="30", calibration="15", test="15"
    )
    with open_run(config, tmp_path / "run", progress=False) as run:
        records = list(run.records(["no_steering", "optimal_probe"]))
    assert records[1]["decision"] == "ABSTAIN"  # a random model cannot be certified at n = 15
    lines = [
        (tmp_path / "run" / "outcomes" / f"{name}.jsonl").read_bytes()
        for name in ("no_steering", "optimal_probe")
    ]
    assert lines[0] == lines[1]


MISTAKES = {
    "model": ({"model": "google/gemma-2-2"}, "google/gemma-2-2b"),
    "task": ({"task": "sms_spem"}, "sms_spam"),
    "layers": ({"layers": "7"}, "numbered 0 to 2"),
    "layer words": ({"layers": "first"}, "numbers such as"),
    "too few": ({"train": 400}, "400"),
    "overlap": ({"train": "0-29", "calibration": "20-39", "test": "40-50"}, "20"),
    "missing data": ({"task": "boolq.toml"}, "boolq.toml"),
    "template": ({"template": "nowhere.txt"}, "nowhere.txt"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    name, monkeypatch, capsys, checkpoints, toy, tmp_path
):
    changes, words = MISTAKES[name]
    code = mera(monkeypatch, "run", *arguments(checkpoints, toy, tmp_path / "run", **changes))
    error = capsys.readouterr().err
    assert code == 2
    assert words in error
    assert error.splitlines()[-1].startswith("mera: ")
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "config.json").exists()  # nothing half-written


def test_an_unknown_method_costs_nothing_and_names_the_nearest(
    monkeypatch, capsys, checkpoints, toy, tmp_path
):
    told = arguments(checkpoints, toy, tmp_path / "run")
    assert mera(monkeypatch, "run", *told, "--methods", "no_steering", "optimal_prob") == 2
    assert "optimal_probe" in capsys.readouterr().err
    assert not (tmp_path / "run" / "activations").exists()


DATA_MISTAKES = {
    "label outside the options": ({"labels": ("yes", "maybe")}, "maybe"),
    "one class only": ({"labels": "one"}, "'yes'"),
    "options that share their token": ({"extra": ""}, "cannot be told apart"),
    "a missing column": ({"extra": 'label = "answer"\n'}, "answer"),
    "empty data": ({"rows": 0}, "toy.csv"),
}


@pytest.mark.parametrize("name", DATA_MISTAKES)
def test_bad_data_is_one_sentence(name, monkeypatch, capsys, checkpoints, tmp_path):
    changes, words = DATA_MISTAKES[name]
    path = write_task(tmp_path, **changes)
    if "share" in name:
        from pathlib import Path

        text = (
            Path(path).read_text(encoding="utf-8").replace('["yes", "no"]', '["no bad", "no good"]')
        )
        Path(path).write_text(text, "utf-8")
        data = tmp_path / "toy.csv"
        data.write_text(
            data.read_text("utf-8").replace(",yes", ",no bad").replace(",no\n", ",no good\n")
        )
    assert mera(monkeypatch, "run", *arguments(checkpoints, path, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_another_configuration_in_the_folder_is_refused(
    monkeypatch, capsys, checkpoints, toy, tmp_path
):
    out = tmp_path / "run"
    assert mera(monkeypatch, "collect", *arguments(checkpoints, toy, out)) == 0
    assert mera(monkeypatch, "run", *arguments(checkpoints, toy, out, seed=1)) == 2
    assert "another configuration (seed" in capsys.readouterr().err


def test_a_folder_in_use_is_refused(monkeypatch, capsys, checkpoints, toy, tmp_path):
    out = tmp_path / "run"
    with storage.lock(out):
        assert mera(monkeypatch, "run", *arguments(checkpoints, toy, out)) == 2
    assert "in use by process" in capsys.readouterr().err


def test_activations_with_nan_are_refused(checkpoints, toy, tmp_path):
    config = RunConfig(
        model=str(checkpoints["llama"]), task=toy, train="30", calibration="15", test="15"
    )
    with open_run(config, tmp_path / "run", progress=False) as run:
        run.model.hooked.blocks[1].mlp.W_out.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinity"):
            list(run.records(["optimal_probe"]))


def test_lists_name_what_there_is(monkeypatch, capsys):
    assert mera(monkeypatch, "methods") == 0
    assert mera(monkeypatch, "tasks") == 0
    assert mera(monkeypatch, "models", "--search", "gemma-2-2b") == 0
    printed = capsys.readouterr().out
    for name in (*METHODS, "sms_spam", "mmlu_high_school", "google/gemma-2-2b-it"):
        assert name in printed


def test_config_json_is_what_was_asked(monkeypatch, checkpoints, toy, tmp_path):
    out = tmp_path / "run"
    assert mera(monkeypatch, "collect", *arguments(checkpoints, toy, out, min_gain=0.02)) == 0
    assert json.loads((out / "config.json").read_text())["min_gain"] == 0.02
