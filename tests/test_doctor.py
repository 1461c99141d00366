"""The doctor reports and never breaks; what does not work comes with advice."""

import socket
import tomllib
from pathlib import Path

import pytest

from mera_tl.benchmark import doctor


def names(checks) -> dict:
    return {check.name: check for check in checks}


def test_everything_needed_works_here():
    checks = names(doctor.examine())
    assert {"python", "torch", "device", "model", "batching", "hub"} <= set(checks)
    assert not [check for check in checks.values() if check.works is False]


def test_every_extra_is_looked_for():
    told = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    extras = {*told["project"]["optional-dependencies"]} - {"dev"}
    advice = " ".join(doctor.EXTRAS.values())
    assert {name for name in extras if f"mera-tl[{name}]" in advice} == extras
    assert set(doctor.EXTRAS) <= {*names(doctor._extras())}


def test_whatever_is_missing_comes_with_advice():
    for check in doctor.examine():
        assert check.works or check.advice


def test_a_check_that_breaks_is_reported_and_the_others_go_on(monkeypatch):
    def broken():
        raise RuntimeError("no luck")

    broken.__name__ = "_model"
    monkeypatch.setattr(doctor, "_model", broken)
    checks = names(doctor.examine())
    assert checks["model"].works is False and "no luck" in checks["model"].found
    assert "hub" in checks


def test_a_hub_out_of_reach_is_no_failure(monkeypatch):
    def refuse(*_, **__):
        raise TimeoutError("timed out")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    (check,) = doctor._hub()
    assert check.works is None and "folders" in check.advice


@pytest.mark.parametrize(
    ("works", "mark"), [(True, "ok  a: b"), (False, "NO  a: b"), (None, "--  a: b")]
)
def test_a_check_prints_as_a_line_and_its_advice_below(works, mark):
    assert str(doctor.Check("a", works, "b")) == mark
    assert str(doctor.Check("a", works, "b", "Do.")).splitlines()[1].strip() == "Do."
    long = str(doctor.Check("a", works, "word " * 40, "Do this. " * 20)).splitlines()
    assert max(map(len, long)) <= 80 and all(line.startswith(" " * 6) for line in long[1:])
