"""The demo decides as it should, offline, with the network refused."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from mera_tl import storage
from mera_tl.benchmark import recommend
from mera_tl.cli import parsing

# Any attempt to open a connection ends the process: what runs, runs without a network.
REFUSE = """
import socket
def refuse(*args, **kwargs):
    raise SystemExit("the demo asked for the network")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = refuse
socket.getaddrinfo = refuse
"""


def python(script, *arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REFUSE + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=env,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    script = "import sys; sys.argv = ['mera', 'demo', *sys.argv[1:]]\n"
    done = python(script + "from mera_tl.cli import main; main()", "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def test_the_network_really_is_refused():
    done = python("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')")
    assert "asked for the network" in done.stderr


def test_the_demo_corrects_what_can_be_corrected_and_abstains_where_nothing_can(demo):
    out, printed = demo
    records = {
        (record["task"], record["method"]): record
        for path in out.glob("*/records.jsonl")
        for record in storage.read_records(path)
    }
    for task in ("spam_cue", "sentiment_fan"):
        searched = records[task, "searched"]
        assert searched["decision"] == "STEER"
        assert searched["spi"] > 0.3
        assert searched["spi_interval"][0] > 0
        assert ", 1 candidate, " in searched["certificate"]  # one was tested, whatever was searched
    for method in ("optimal_probe", "optimal_logistic_probe", "searched", "flip"):
        assert records["sentiment_noise", method]["decision"] == "ABSTAIN"
        assert records["sentiment_noise", method]["spi"] == 0
    assert all(record["spi"] > -1 and record["n"] == 500 for record in records.values())
    assert "STEER" in printed
    (seen,) = re.findall(r"ABSTAIN \(best seen (.*?) points\)", printed)
    assert f"with {seen} points" in recommend(out / "sentiment_noise-seed0").sentence
    page = out / "report.html"
    assert str(page) in printed
    assert page.stat().st_size < 6.5e6


def test_the_evidence_on_the_page_is_that_of_the_winner(demo):
    """Not the curve of a method that abstained, below the card of a search."""
    text = (demo[0] / "report.html").read_text(encoding="utf-8")
    for task in ("spam_cue", "sentiment_fan"):
        (number,) = re.findall(rf'id="run(\d)_run"><summary>organism on {task}', text)
        start = text.index(f'id="run{number}_verdict"')
        card, _, rest = text[start:].partition(f'id="run{number}_evidence"')
        figures = re.findall(r'class="plot" id="run\d_(\w+)"', rest.partition("_examples")[0])
        assert figures[0] == "search_searched"
        assert all(name.endswith("_searched") for name in figures)
        # What was searched, and what was chosen.
        assert re.search(r"Direction \w+; .*layer \d.*threshold 0\.\d+", card)
        assert re.search(r"Chosen among \d{3} candidates", card)


@pytest.mark.parametrize("method", ["flip", "searched"])
def test_explain_says_what_the_record_says(demo, method, capsys):
    folder = demo[0] / "spam_cue-seed0"
    parsing.parse(["explain", str(folder), "--method", method, "--json"])()
    told = json.loads(capsys.readouterr().out)
    outcomes = storage.read_records(folder / "outcomes" / f"{method}.jsonl")
    (kept,) = [each for each in outcomes if each["row"] == told["row"]]
    assert told["answers"] == ["ham", kept["prediction"]] == ["ham", "spam"]
    assert kept["correct"] and (np.array(told["shift"]).any() == (method == "searched"))
    assert bool(told["instead"]) == (method == "flip")
    page = (folder / "explain" / f"{method}-{told['row']}.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h[1-3]>(.*?) ?<", page)
    assert len(set(headings)) == len(headings) == 3  # nothing is said twice
