"""Bad input of every kind: exit code 2, one sentence that says what is wrong, nothing written.

The corpus lies in bad_input/, a JSON object a line: `args` of the command line, `words` that the
message must hold, and `files` that lie in the folder where the command is given.
"""

import io
import json
import logging
import os
import sys
from pathlib import Path

import pytest

from mera_tl.cli import app

CORPUS = Path(__file__).parent / "bad_input"
FAMILIES = sorted(path.stem for path in CORPUS.glob("*.jsonl"))


def read(family):
    return [json.loads(line) for line in (CORPUS / f"{family}.jsonl").read_text().splitlines()]


def lay_out(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = content.encode() if isinstance(content, str) else bytes.fromhex(content["bytes"])
        path.write_bytes(plain)


def answer(args, folder, monkeypatch, capsys):
    """Give a command in a folder; return what is wrong with its answer, or an empty string."""
    before = {str(path): path.is_file() and path.read_bytes() for path in folder.rglob("*")}
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["mera", *args])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    logging.getLogger("mera_tl").handlers = []  # of an earlier case, whose stderr is gone
    try:
        app.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        return f"traceback: {type(error).__name__}: {error}", ""
    finally:
        said = capsys.readouterr()
    message = " ".join(said.err.split())
    after = {str(path): path.is_file() and path.read_bytes() for path in folder.rglob("*")}
    faults = [f"exit {code}"] if code != 2 else []
    faults += ["says nothing"] if len(message) < 10 else []
    faults += ["wrote"] if before != after else []
    faults += ["traceback shown"] if "Traceback" in message else []
    return "; ".join(faults), message + " " + " ".join(said.out.split())


@pytest.mark.parametrize("family", FAMILIES)
def test_bad_input_is_one_sentence_and_writes_nothing(family, tmp_path, monkeypatch, capsys):
    failed = []
    for number, case in enumerate(read(family), 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        lay_out(folder, case.get("files", {}))
        fault, message = answer(case["args"], folder, monkeypatch, capsys)
        if not fault and case["words"] not in message:
            fault = f"does not say {case['words']!r}"
        if fault:
            failed.append(f"{family}:{number} {fault}: {case['args']} -> {message[-200:]}")
    report = os.environ.get("MERA_BAD_INPUT_REPORT")
    if report:
        with open(report, "a", encoding="utf-8") as file:
            file.write("\n".join(failed) + "\n")
    assert not failed, "\n".join(failed)


def test_the_corpus_is_large_and_a_good_command_is_not_refused(tmp_path, monkeypatch, capsys):
    cases = [json.dumps(case) for family in FAMILIES for case in read(family)]
    assert len(set(cases)) == len(cases) >= 600
    fault, _ = answer(["plan", "--gain", "0.06"], tmp_path, monkeypatch, capsys)
    assert fault.startswith("exit 0")  # positive control: the runner sees a success
