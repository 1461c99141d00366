"""The command line: the main job end to end, and every mistake one sentence."""

import contextlib
import importlib
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import SMALL, arguments, timeless, write_task
from rich.console import Console

from mera_tl import methods, storage
from mera_tl.benchmark import DEFAULT_METHODS, RunConfig, memory, open_run, run
from mera_tl.certificate import Calibration
from mera_tl.cli import app, parsing, terminal
from mera_tl.models import loading
from mera_tl.report import RunFolder

METHODS = ("no_steering", "prompt_steering", "additive_probe", "optimal_probe")


def config_of(checkpoints, toy):
    return RunConfig(model=str(checkpoints["llama"]), task=toy, **SMALL)


def without_times(path):
    return timeless(storage.read_records(path))


def test_the_main_job_writes_records_certificates_and_a_table(mera, checkpoints, toy, tmp_path):
    out = tmp_path / "run"
    told = arguments(checkpoints, toy, out)
    printed = " ".join(mera("run", *told, "--verbose", "--methods", *METHODS).out.split())
    assert "toy" in printed and "Report: " in printed and (out / "report.html").exists()
    records = storage.read_records(out / "records.jsonl")
    assert [record["method"] for record in records] == list(METHODS)
    for record in records:
        assert record["n"] == 15
        assert sum(record["transitions"].values()) == 15
        for name in ("model", "task", "space", "seed", "accuracy", "error", "spi", "threshold"):
            assert name in record
        assert {"config", "model", "data"} <= set(record["hashes"])
        assert record["versions"]["torch"] == version("torch")
    assert [r["decision"] is not None for r in records] == [False, False, False, True]
    certificate = Calibration.load(out / "certificates" / "optimal_probe")
    words = " ".join(str(certificate).split())
    assert printed.partition("toy, optimal_probe ")[2].startswith(words)
    assert not list(out.rglob("*.tmp"))

    # A second start finds everything; the steps, one by one, give the same records.
    before = (out / "records.jsonl").read_bytes()
    mera("run", *told, "--methods", *METHODS)
    assert (out / "records.jsonl").read_bytes() == before
    steps = arguments(checkpoints, toy, tmp_path / "steps")
    for step in ("collect", "fit", "calibrate", "evaluate"):
        mera(step, *steps, "--methods", *METHODS)
    assert without_times(tmp_path / "steps" / "records.jsonl") == without_times(
        out / "records.jsonl"
    )
    assert "| model | task | method |" in mera("table", out, "--format", "markdown").out


def test_abstaining_equals_the_unsteered_run_bit_for_bit(checkpoints, toy, tmp_path):
    config = config_of(checkpoints, toy)
    with open_run(config, tmp_path / "run") as run:
        records = list(run.records(["no_steering", "optimal_probe"]))
    assert records[1]["decision"] == "ABSTAIN"  # a random model cannot be certified at n = 15
    lines = [
        (tmp_path / "run" / "outcomes" / f"{name}.jsonl").read_bytes()
        for name in ("no_steering", "optimal_probe")
    ]
    assert lines[0] == lines[1]


def test_an_unknown_method_costs_nothing_and_names_the_nearest(mera, checkpoints, toy, tmp_path):
    told = arguments(checkpoints, toy, tmp_path / "run")
    said = mera("run", *told, "--methods", "no_steering", "optimal_prob", code=2).err
    assert "optimal_probe" in said
    assert not (tmp_path / "run" / "activations").exists()


DATA_MISTAKES = {
    "label outside the options": ({"labels": ("yes", "maybe")}, "maybe"),
    "one class only": ({"labels": "one"}, "'yes'"),
    "options that share their token": ({"options": ("no bad", "no good")}, "cannot be told apart"),
    "a missing column": ({"extra": 'label = "answer"\n'}, "answer"),
    "empty data": ({"rows": 0}, "toy.csv"),
}


@pytest.mark.parametrize("name", DATA_MISTAKES)
def test_bad_data_is_one_sentence(mera, name, checkpoints, tmp_path):
    changes, words = DATA_MISTAKES[name]
    path = write_task(tmp_path, **changes)
    # Options that begin alike are told apart where they are scored whole, the default.
    readout = {"readout": "last"} if "share" in name else {}
    told = arguments(checkpoints, path, tmp_path / "run", **readout)
    error = mera("run", *told, code=2).err
    assert words in error
    assert "Traceback" not in error
    # Found before anything was answered but the prompts of the pre-flight.
    assert not {"activations", "outcomes"} & {each.name for each in tmp_path.glob("run/*")}


def test_without_a_method_that_learns_one_class_is_enough_and_blank_rows_are_counted(
    mera, checkpoints, tmp_path
):
    path = write_task(tmp_path, labels="one")
    with (tmp_path / "toy.csv").open("a", encoding="utf-8") as file:
        file.write(" ,yes\n ,no\n")
    told = arguments(checkpoints, path, tmp_path / "run", methods="no_steering")
    assert "; 2 rows with a blank text are left out" in " ".join(mera("run", *told).out.split())


@pytest.mark.parametrize("split", ["train", "calibration", "test"])
def test_a_prompt_that_is_too_long_is_named_before_anything_is_written(
    mera, split, checkpoints, tmp_path
):
    rows = {"train": "0-29", "calibration": "30-44", "test": "45-59"}
    path, data = write_task(tmp_path), tmp_path / "toy.csv"
    lines, long = data.read_text("utf-8").split("\n"), int(rows[split].split("-")[1])
    lines[long + 1] = "red " * 500 + lines[long + 1]
    data.write_text("\n".join(lines), "utf-8")
    told = arguments(checkpoints, path, tmp_path / "run", methods="no_steering", **rows)
    assert f"toy has 1 prompt (row {long}) of more than the " in mera("run", *told, code=2).err
    assert not (tmp_path / "run" / "config.json").exists()
    mera("run", *told, "--truncate")


def test_another_configuration_in_the_folder_is_refused(mera, checkpoints, toy, tmp_path):
    out = tmp_path / "run"
    mera("collect", *arguments(checkpoints, toy, out))
    said = mera("run", *arguments(checkpoints, toy, out, seed=1), code=2).err
    assert "another configuration (seed" in said


def test_an_interrupted_run_says_so_and_ends_as_an_undisturbed_one(
    mera, monkeypatch, checkpoints, toy, tmp_path
):
    methods = {"methods": "no_steering,optimal_probe"}
    told, whole = (arguments(checkpoints, toy, tmp_path / name, **methods) for name in ("a", "b"))
    with monkeypatch.context() as patched:
        patched.setattr(run, "collect", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
        try:
            said = mera("run", *told, code=130)
        finally:
            signal.signal(signal.SIGINT, ours)
    assert said.err.splitlines()[-1] == "mera: stopped; start it again to resume."
    assert "Traceback" not in said.err + said.out and not (tmp_path / "a" / "activations").exists()
    for arguments_ in (told, whole):
        mera("run", *arguments_)
    first, second = (without_times(tmp_path / name / "records.jsonl") for name in ("a", "b"))
    assert [record.pop("hashes")["data"] for record in first] == [
        record.pop("hashes")["data"] for record in second
    ]
    assert first == second


def test_a_folder_in_use_is_refused(mera, checkpoints, toy, tmp_path):
    out = tmp_path / "run"
    with storage.lock(out):
        said = mera("run", *arguments(checkpoints, toy, out), code=2).err
    assert "in use by another process" in said


def test_activations_with_nan_are_refused(checkpoints, toy, tmp_path):
    config = config_of(checkpoints, toy)
    with open_run(config, tmp_path / "run") as run:
        run.model.hooked.blocks[1].mlp.W_out.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinity"):
            list(run.records(["optimal_probe"]))


def test_only_what_resumes_says_so_when_interrupted(mera, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(terminal, "rich_table", lambda _: signal.raise_signal(signal.SIGINT))
        ours = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            assert mera("plan", code=130).err == "mera: stopped.\n"
        finally:
            signal.signal(signal.SIGINT, ours)


def test_what_is_not_installed_is_a_sentence_and_what_is_broken_a_traceback():
    with pytest.raises(ImportError) as broken:
        importlib.import_module("mera_tl.nowhere")
    assert app._sentence(broken.value) is None
    assert app._sentence(ImportError("pip install x")) == "pip install x"


def test_help_may_be_a_word(mera, capsys):
    assert "Exit codes" in mera("help").out
    with pytest.raises(SystemExit):
        parsed("help", "plan")
    assert "$ mera plan --gain 0.06" in capsys.readouterr().out
    told = parsed("eval", "-m", "a", "--steering", "s", "--tasks", "x,y", "--num_fewshot", 3)
    assert (told.tasks, told.shots) == (("x", "y"), 3)


def test_an_unknown_command_names_the_nearest_and_the_overview_all(mera):
    assert "did you mean `mera table`?" in mera("tabel", code=2).err
    printed = mera(code=2).out  # as with a missing option; but it says what there is
    for command in parsing.COMMANDS:
        assert re.search(rf"^  {command.__name__.lower()} ", printed, re.M)
    assert max(map(len, printed.splitlines())) <= 80


def test_lists_name_what_there_is(mera):
    lists = (("methods",), ("tasks",), ("models", "--search", "gemma-2-2b"))
    printed = "".join(mera(*told).out for told in lists)
    for name in (*METHODS, "sms_spam", "mmlu_high_school", "google/gemma-2-2b-it"):
        assert name in printed
    known, tasks, models = (json.loads(mera(*told, "--json").out) for told in lists)
    assert {*METHODS} <= {each["name"] for each in known}
    assert {"name": "sms_spam", "options": ["ham", "spam"]}.items() <= tasks[0].items()
    assert re.search(r"^flip +options +Answer", printed, re.M)
    assert re.search(r"^retry +replies +Draw", printed, re.M)
    assert re.search(r"^searched +any +Search", printed, re.M)
    assert re.search(r"^gsm8k +scored replies +openai/gsm8k", printed, re.M)
    assert re.search(r"^spam_cue +spam, ham +organism", printed, re.M)
    assert "google/gemma-2-2b-it" in [each["name"] for each in models]


def test_a_run_of_several_models_points_to_the_benchmark(mera, tmp_path):
    told = ("-m", "organism,organism", "-t", "spam_cue", "-o", tmp_path / "run")
    for command in ("run", "collect"):
        said = mera(command, *told, code=2).err
        assert "mera benchmark -m organism,organism" in " ".join(said.split())
    assert not (tmp_path / "run").exists()


def test_config_json_is_what_was_asked(mera, checkpoints, toy, tmp_path):
    out = tmp_path / "run"
    mera("collect", *arguments(checkpoints, toy, out, min_gain=0.02))
    assert json.loads((out / "config.json").read_text())["min_gain"] == 0.02


# --- options ------------------------------------------------------------------------------------


def parsed(*arguments):
    return parsing.parse([str(each) for each in arguments])


def test_what_users_of_lm_evaluation_harness_type_is_understood():
    told = parsed(
        *("run", "--model", "organism", "--tasks", "spam_cue,yesno_bias", "--batch_size", "auto"),
        *("--output_path", "there", "--apply_chat_template", "--limit", 500),
    )
    assert (told.batch_size, told.out, told.chat) == (None, Path("there"), True)
    (first, where), (second, _) = told.each_task()
    assert (first.task, second.task, where) == ("spam_cue", "yesno_bias", Path("there/spam_cue"))
    assert (first.train, first.calibration, first.test) == ("300", "100", "100")
    short = parsed("run", "-m", "organism", "-t", "spam_cue", "-o", "there", "-v")
    assert (short.model, short.verbose, short.each_task()[0][1]) == (
        "organism",
        True,
        Path("there"),
    )
    assert short.methods == DEFAULT_METHODS
    assert parsed("benchmark", "-m", "a,b", "-t", "c").models == ("a", "b")


def test_the_usual_ways_to_write_an_option_mean_the_same():
    grid = ("benchmark", "-m", "a", "-t", "b")
    for words in (("--seeds", "0,1"), ("--seed", "0", "1"), ("--seeds", "0", "1")):
        assert parsed(*grid, *words).seeds == (0, 1)
    assert parsed(*grid, "--space", "raw,sae", "--method", "flip").spaces == ("raw", "sae")
    assert parsed("fit", "-m", "a", "-t", "b", "--kinds", "ridge,lasso").kinds == ("ridge", "lasso")
    assert parsed("plan", "--pilot", "18,2,288").pilot == (18, 2, 288)
    for words in (("runs/x",), ("--run", "runs/x")):
        assert parsed("explore", *words).run == parsed("explain", *words).run == Path("runs/x")
        assert parsed("report", *words).runs == (Path("runs/x"),)
    told = parsed("generate", "hi", "--steering", "s", "-m", "a", "--no-chat")
    assert told.prompts == ("hi",) and not told.chat


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.toml", 'model = "organism"\ntask = "spam_cue"\nmin_gain = 0.02\nchat = true\n'),
        ("run.yaml", "model: organism\ntask: spam_cue\nmin-gain: 0.02\nchat: true\nseed: null\n"),
        ("run.json", '{"model": "organism", "task": "spam_cue", "min_gain": 0.02, "chat": true}'),
    ],
)
def test_a_file_of_options_is_overridden_by_the_command_line(tmp_path, name, text):
    # With the byte order mark of some editors, which is no text.
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    told = parsed("run", "--config", tmp_path / name)
    assert (told.model, told.min_gain, told.chat) == ("organism", 0.02, True)
    again = parsed("run", f"--config={tmp_path / name}", "--min-gain", 0.05)
    assert (again.model, again.min_gain) == ("organism", 0.05)


def test_every_option_is_explained_and_fits_80_columns(capsys):
    for command in parsing.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            parsed(command.__name__.lower(), "--help")
        assert stop.value.code == 0
        page = capsys.readouterr().out
        assert "usage: mera" in page and max(map(len, page.splitlines())) <= 80
    help_of_run = texts(capsys, "run")
    for title in ("required", "data", "model", "steering", "certificate", "speed", "output"):
        assert f" {title} options " in help_of_run
    assert "more options" not in help_of_run and "$ mera run" in help_of_run
    assert help_of_run.index("--model") < help_of_run.index("--layers")
    for command in parsing.COMMANDS:  # no line ends early, no default is told twice
        page = " ".join(texts(capsys, command.__name__.lower()).replace("│", " ").split())
        assert not re.search(r"\bNone\b|True\)|Default: [^.]*\. \(default", page), command
        assert all("\n" not in text for text in parsing._help_texts(command).values())
    # What means nothing to a step is not shown, though a folder's configuration may hold it.
    assert "--min-gain" not in texts(capsys, "collect") + texts(capsys, "sae")
    assert parsed("collect", "-m", "a", "-t", "b", "--min-gain", 0.1).min_gain == 0.1


def texts(capsys, command):
    with pytest.raises(SystemExit):
        parsed(command, "--help")
    return capsys.readouterr().out


def test_help_answers_at_once_and_the_version_is_there():
    started = time.perf_counter()
    done = python("--help")
    assert time.perf_counter() - started < 2.5  # usually 0.3 s; torch alone would take more
    assert "Exit codes" in done.stdout and "explain" in done.stdout
    code = "import sys; from mera_tl.cli import parsing; parsing.parse(['plan'])\n"
    code += "assert not {'torch', 'pandas', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert re.fullmatch(r"mera \d+\.\d+\.\d+\S*\n", python("--version").stdout)


def test_what_means_nothing_to_a_step_is_not_in_its_help(capsys):
    told = {name: texts(capsys, name) for name in ("run", "collect", "fit", "calibrate")}
    for name, text in told.items():
        assert ("--other-tasks" in text) is ("--free-text" in text) is (name == "run")
        assert "--truncate" in text  # the control


def test_a_first_word_is_what_is_looked_for(mera):
    assert (
        parsed("models", "llama").search == "llama" == parsed("models", "--search", "llama").search
    )
    assert parsed("explore", "runs/x").run == Path("runs/x")
    assert mera("version").out == mera("--version").out
    assert (
        "nearest"
        not in mera("run", "-m", "organism", "-t", "spam_cue", "--methods", "zzz", code=2).err
    )


def python(*arguments, **more):
    command = [sys.executable, "-m", "mera_tl.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **more)


def test_a_reader_that_has_enough_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "mera_tl", "plan"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


# --- what is printed ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    """A run that certifies something, with its report; made once, as the command makes it."""
    out = tmp_path_factory.mktemp("organism") / "run"
    told = ["run", "-m", "organism", "-t", "spam_cue", "--limit", "700", "--layers", "1"]
    told += [
        "--positions",
        "last",
        "-o",
        str(out),
        "--methods",
        "no_steering,controlled_contrastive",
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        parsing.parse(told)()
    return out, printed.getvalue()


def test_a_run_ends_in_a_line_per_task_the_report_and_what_to_do_next(organism):
    out, printed = organism
    (verdict,) = re.findall(r"^spam_cue +(.*)$", printed, re.M)
    run = RunFolder.open(out)
    lower = run.certificates["controlled_contrastive"].best.lower
    assert run.verdict.change in verdict and "-> " in verdict
    assert f"STEER (certified >= +{math.floor(100 * lower)} points)" in verdict
    assert 100 * lower >= float(re.findall(r">= \+(\d+)", verdict)[0])  # never rounded up
    assert f"Report: {out / 'report.html'}" in "".join(printed.splitlines())
    for command in ("explain", "recommend"):
        assert f"mera {command} {out}" in "".join(printed.splitlines())
    assert "\x1b" not in printed
    # A path is one word, however long.
    assert not [line for line in printed.splitlines() if len(line) > 80 and "/" not in line]


def test_tables_fit_and_leave_blank_what_is_not_there(mera, organism):
    out, _ = organism
    printed = mera("table", out).out
    assert max(map(len, printed.splitlines())) <= 80
    assert "controlled_contrastive" in printed and "STEER" in printed
    assert "hold together with probability 0.95 or more" in " ".join(printed.split())
    for kind in ("markdown", "csv", "latex"):
        assert not re.search(r"\b(None|nan)\b", mera("table", out, "--format", kind).out)
    assert json.loads(mera("table", out, "--json").out) == list(RunFolder.open(out).records)
    assert "There is no run to print" in mera("table", code=2).err
    assert "There is no run to report on" in mera("report", code=2).err
    assert "contradict" in mera("table", out, "--json", "--format", "csv", code=2).err
    assert len(repr(RunFolder.open(out))) < 200


def test_no_word_of_a_table_is_cut():
    rows = [{"method": "optimal_logistic_probe", "gain": 0.1, "needs": "labels to find it, " * 4}]
    printed = io.StringIO()
    Console(file=printed, width=60).print(terminal.rich_table(rows))
    assert "optimal_logistic_probe" in printed.getvalue() and "it," in printed.getvalue()
    assert max(map(len, printed.getvalue().splitlines())) <= 60
    rows = [{"task": "t" * 25, "options": "positive, neutral, negative", "from": "f" * 36}]
    printed = io.StringIO()
    Console(file=printed, width=80).print(terminal.rich_table(rows))
    assert "f" * 36 in printed.getvalue() and "negative" in printed.getvalue()
    names = "layer explained_variance l0 dead n_tokens unsteered_accuracy accuracy same_answer"
    printed = io.StringIO()
    rows = [dict.fromkeys([*names.split(), "recovered"], 0.5)]
    Console(file=printed, width=80).print(terminal.rich_table(rows))
    assert {*names.replace("_", " ").split()} <= {*printed.getvalue().split()}


def test_json_is_all_that_a_script_reads(mera, organism):
    out, _ = organism
    told = ("-m", "organism", "-t", "spam_cue", "--limit", 700, "--layers", 1)
    told += ("--positions", "last", "-o", out, "--methods", "no_steering")
    assert json.loads(mera("run", *told, "--json").out)[0]["method"] == "no_steering"
    assert json.loads(mera("plan", "--gain", 0.1, "--json").out)[0]["gain"] == 0.1


def test_what_is_the_same_in_all_rows_of_a_plan_is_said_once_above(mera):
    for told in ((), ("--max-risk", 0.05, "--base-risk", 0.2)):
        printed = mera("plan", *told).out
        assert max(map(len, printed.splitlines())) <= 80
    printed = mera("plan", "--gain", 0.1, "--delta", 0.1, "--min-gain", 0.02).out
    assert "at least 0.02 with probability 0.8" in printed and "delta 0.1" in printed
    assert "churn: share of answers that change" in printed and "0.020" not in printed


def test_explain_takes_a_row_or_a_text_of_your_own(mera, monkeypatch, organism, tmp_path):
    out, _ = organism
    assert "becomes" in mera("explain", out).out  # a recovered example of the run's winner
    example = RunFolder.open(out).test_task().examples[3]
    told = []
    for which in (("--row", example.row), ("--prompt", example.prompt)):
        told.append(json.loads(mera("explain", out, *which, "--json").out))
    assert told[0]["tokens"] == told[1]["tokens"] and told[0]["probs"] == told[1]["probs"]
    page = (out / "explain" / "controlled_contrastive-prompt.html").read_text()
    assert "<h1>One prompt, organism on spam_cue, steered by controlled_contrastive</h1>" in page
    said = mera("explain", out, "--method", "no_steering", code=2).err
    assert "pass --method controlled_contrastive" in said
    assert "is in no split" in mera("explain", out, "--row", 10**6, code=2).err
    # Another method would be calibrated here, outside the delta that the run shares.
    said = mera("explain", out, "--method", "withhold", code=2).err
    assert "no method of this run, which has no_steering, controlled" in " ".join(said.split())
    assert not (out / "withholding").exists()
    (tmp_path / "own.py").write_text("def mine(run):\n    'Mine.'\n")
    said = mera("explain", out, "--method", f"{tmp_path / 'own.py'}:mine", code=2).err
    assert said.startswith("mera: mine is no method of this run")  # by the name in its records
    methods.METHODS.pop("mine")
    with monkeypatch.context() as patched:  # where nothing is certified, one that the run has
        patched.setattr(RunFolder, "main_method", None)
        assert "becomes" in mera("explain", out).out


def test_dry_runs_write_nothing_and_overwriting_spares_other_folders(
    mera, monkeypatch, checkpoints, toy, tmp_path
):
    out = tmp_path / "run"
    told = arguments(checkpoints, toy, out)
    told = [*told, "--methods", "no_steering"]
    with monkeypatch.context() as patched:
        patched.setattr(loading, "read_model", None)  # no weights are loaded
        assert "memory in all" in mera("run", *told, "--dry-run").out
        (found,) = json.loads(mera("run", *told, "--dry-run", "--json").out)
        assert found["estimate"]["fits"] and (found["n_train"], found["n_test"]) == (30, 15)
        assert mera("run", *told, "--dry-run", "--quiet").out == ""
        patched.setattr(memory, "free_memory", lambda *_: 0)
        assert "do not fit" in mera("run", *told, "--dry-run", code=1).out
    assert "this task has options" in mera("run", *told, "retry", "--dry-run", code=2).err
    assert "this task has options" in mera("run", *told, "retry", code=2).err
    assert not out.exists()
    told = told[:-2]
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    said = mera("run", *told, "--methods", "no_steering", "--overwrite", code=2).err
    assert "not the folder of a run" in said and (out / "thesis.tex").exists()
    (out / "thesis.tex").rename(tmp_path / "thesis.tex")
    other = arguments(checkpoints, toy, out, seed=1)
    for one in (told, other):
        mera("run", *one, "--methods", "no_steering", "--overwrite")
    assert json.loads((out / "config.json").read_text())["seed"] == 1


def test_damaged_files_and_file_systems_are_one_sentence(mera, monkeypatch, organism, tmp_path):
    (tmp_path / "file").write_text("x")
    shutil.copytree(organism[0], tmp_path / "run")
    for path in (tmp_path / "run").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    for told in (
        ("run", "-m", "organism", "-t", "spam_cue", "--limit", 50, "-o", tmp_path / "file" / "a"),
        ("report", tmp_path / "run"),
        ("run", "--config", tmp_path / "nowhere.toml"),
    ):
        error = mera(*told, code=2).err.splitlines()[-1]
        assert error.startswith("mera: ") and len(error) > 20
    monkeypatch.setenv("MERA_DEBUG", "1")
    with pytest.raises(ValueError, match="nowhere.toml"):
        mera("run", "--config", tmp_path / "nowhere.toml")


def test_a_log_file_has_a_line_per_stage_and_no_control_codes(organism, tmp_path):
    code = (
        "from mera_tl.cli import terminal; import logging; terminal.start_logging()\n"
        "logging.getLogger('mera_tl.benchmark.run').info('searched: %s', 'STEER')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.fullmatch(r" +\d+ s  searched: STEER\n", done.stderr)


def test_what_every_method_finds_of_the_same_examples_is_said_once(capsys):
    terminal.start_logging(verbose=True)
    for name in ("probes.fitting", "probes.fitting", "inference.evaluation"):
        logging.getLogger(f"mera_tl.{name}").warning("Nothing could be read.")
    assert capsys.readouterr().err.count("Nothing could be read.") == 2


def test_in_a_terminal_no_word_of_a_log_line_is_cut(monkeypatch):
    told = {"name": "mera_tl", "msg": "Nothing could be read in layers 0, 1 of this-model. " * 3}
    record = logging.makeLogRecord(told | {"seconds": 3})
    lines = terminal._Stages("{seconds:>6.0f} s  {message}", style="{")
    assert "\n" not in lines.format(record)  # in a file, one each
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    shown = lines.format(record).split("\n")
    assert max(map(len, shown)) <= 40 and " ".join(shown).split()[2:] == record.msg.split()
