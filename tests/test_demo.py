"""The demo decides as it should, offline, with the network refused."""

import os
import subprocess
import sys

import pytest

from mera_tl import storage

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
    for method in ("optimal_probe", "optimal_logistic_probe", "searched", "flip"):
        assert records["sentiment_noise", method]["decision"] == "ABSTAIN"
        assert records["sentiment_noise", method]["spi"] == 0
    assert all(record["spi"] > -1 and record["n"] == 500 for record in records.values())
    assert "STEER" in printed
    assert "ABSTAIN" in printed
    page = out / "report.html"
    assert str(page) in printed
    assert page.stat().st_size < 6e6
