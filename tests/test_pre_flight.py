"""The look before a run: it says what is wrong with a baseline, and nothing where all is well."""

from dataclasses import replace

import pytest
from conftest import make_task

from mera_tl.benchmark import Preflight, preflight
from mera_tl.inference import ReadSettings, evaluate
from mera_tl.models import load_model
from mera_tl.tasks import load_task

QUIET = ReadSettings(progress=False)


@pytest.fixture(scope="module")
def sound() -> Preflight:
    return preflight(load_model("organism"), load_task("spam_cue"), QUIET)


def test_a_sound_baseline_has_no_warning(sound):
    assert sound.n == 50 and sound.warnings == () and not sound.degenerate
    assert sum(sound.answers.values()) == pytest.approx(1)
    assert sound.accuracy > sound.majority and sound.unanswered == 0
    assert sound.reading == {"spam": ("spam",), "ham": ("ham",)}
    assert sound.seconds(2000) == pytest.approx(2000 * sound.seconds_per_prompt) and sound.memory


def test_each_kind_of_degenerate_baseline_has_its_sentence(sound):
    one = replace(sound, answers={"spam": 0.96, "ham": 0.04})
    below = replace(sound, accuracy=0.4, majority=0.52)
    silent = replace(sound, unanswered=0.9)
    words = {"'spam'": one, "below 52%": below, "no answer": silent}
    for word, flight in words.items():
        (warning,) = flight.warnings
        assert word in warning and word in " ".join(str(flight).split()) and flight.degenerate
        assert flight.to_json()["warnings"] == [warning]
    assert len(replace(one, accuracy=0.4, unanswered=0.9).warnings) == 3
    assert not replace(sound, accuracy=0.52, majority=0.52).warnings  # equal is not below


def test_what_is_printed_fits_a_terminal(sound):
    long = replace(sound, reading={"an option" * 9: ("a variant",) * 20}, accuracy=0.1)
    for flight in (sound, long):
        assert max(map(len, str(flight).splitlines())) <= 80


@pytest.mark.parametrize("readout", ["options", "exact"])
def test_a_random_model_is_seen_through_and_its_replies_are_shown(models, readout):
    task, settings = make_task(30), replace(QUIET, readout=readout)
    flight = preflight(models["llama"], task, settings, n=20)
    run = evaluate(models["llama"], task, settings=settings)
    assert flight.degenerate and flight.n == 20 and len(flight.shown) == 3
    first = flight.shown[0]
    assert first["said"] == (run.replies[0] if readout == "exact" else flight.shown[0]["answer"])
    assert task.examples[0].prompt.endswith(first["prompt"])
