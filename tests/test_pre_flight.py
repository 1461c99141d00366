"""The look before a run: it says what is wrong with a baseline, and nothing where all is well."""

import html
from dataclasses import replace

import pytest
from conftest import arguments, make_task, organism, write_task

from mera_tl.benchmark import Preflight, RunConfig, duration, open_run, preflight, run
from mera_tl.inference import ReadSettings, evaluate, tokenize_task
from mera_tl.methods import Choices
from mera_tl.report import RunFolder
from mera_tl.tasks import load_task


@pytest.fixture(scope="module")
def sound() -> Preflight:
    return preflight(organism(), load_task("spam_cue"))


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
    words = {"'spam'": one, "below the 52 %": below, "no answer": silent}
    for word, flight in words.items():
        (warning,) = flight.warnings
        assert word in warning and word in " ".join(str(flight).split()) and flight.degenerate
        assert flight.to_json()["warnings"] == [warning]
    assert len(replace(one, accuracy=0.4, unanswered=0.9).warnings) == 3
    assert not replace(sound, accuracy=0.52, majority=0.52).warnings  # equal is not below


def test_control_tokens_in_the_data_of_plain_prompts_are_counted():
    task = load_task("spam_cue").subset(range(20))
    typed = replace(task.examples[3], prompt=f"{task.examples[3].prompt} <eos>")
    mixed = replace(task, examples=(*task.examples[:3], typed, *task.examples[4:]))
    assert preflight(organism(), task, n=4).typed_controls == 0
    flight = preflight(organism(), mixed, n=4)
    assert flight.typed_controls == 1 and "in the text of 1 training prompt," in flight.warnings[0]
    # A template that is written by hand has them in every prompt: that is meant.
    everywhere = [replace(each, prompt=f"{each.prompt} <eos>") for each in task.examples]
    meant = replace(task, examples=tuple(everywhere))
    assert preflight(organism(), meant, n=4).typed_controls == 0
    old = {name: value for name, value in flight.to_json().items() if name != "typed_controls"}
    assert Preflight.from_json(old).typed_controls == 0


def test_what_is_printed_fits_a_terminal(sound):
    long = replace(sound, reading={"an option" * 9: ("a variant",) * 20}, accuracy=0.1)
    for flight in (sound, long):
        assert max(map(len, str(flight).splitlines())) <= 80


@pytest.mark.parametrize("readout", ["options", "exact"])
def test_a_random_model_is_seen_through_and_its_replies_are_shown(models, readout):
    task, settings = make_task(30), ReadSettings(readout)
    flight = preflight(models["llama"], task, settings, n=20)
    answers = evaluate(models["llama"], task, settings=settings)
    assert flight.degenerate and flight.n == 20 and len(flight.shown) == 3
    first = flight.shown[0]
    assert first["reply"] == (answers.replies[0] if readout == "exact" else None)
    assert first["prompt"] and first["prompt"] in task.examples[0].prompt
    words = " ".join(str(flight).split())
    assert ("replies '" in words) == (readout == "exact") and f"asked {first['prompt']!r}" in words


def test_the_text_is_shown_and_not_the_question_around_it(models):
    task, asked = make_task(2), "which of the two is it ? answer :"
    texts = [f"{row} {'a longish text ' * 12}".strip() for row in range(2)]
    shown = [
        replace(example, prompt=f"{text} {asked}", text=text)
        for example, text in zip(task.examples, texts, strict=True)
    ]
    flight = preflight(models["llama"], replace(task, examples=tuple(shown)))
    for one, text in zip(flight.shown, texts, strict=True):
        assert one["prompt"].endswith("...") and len(one["prompt"]) == 150 < len(text)
        assert text.startswith(one["prompt"][:-3])
    assert "which of the two" not in str(flight)
    assert Preflight.from_json(flight.to_json()) == flight


def test_a_run_says_what_is_wrong_wherever_it_is_shown(mera, checkpoints, tmp_path, monkeypatch):
    task = write_task(tmp_path)
    told = arguments(checkpoints, task, tmp_path / "run", methods="no_steering,optimal_probe")
    said = mera("run", *told, "--strict", code=2).err
    assert "--strict" in said and not (tmp_path / "run" / "activations").exists()
    monkeypatch.setattr(run, "preflight", None)  # what is kept is not repeated
    printed = " ".join(mera("run", *told).out.split())
    opened = RunFolder.open(tmp_path / "run")
    for warning in opened.warnings:
        assert warning in said and printed.count(f"WARNING: {warning}") == 1
        assert f"WARNING, toy: {warning}" in printed  # again beside the verdict
        assert f"Baseline: {warning}" in str(opened.certificates["optimal_probe"])
        page = html.unescape((tmp_path / "run" / "report.html").read_text("utf-8")).replace(
            "\xa0", " "
        )
        assert "Read this with care" in page and f"<p>{warning}</p>" in page
        assert all(warning in record["warnings"] for record in opened.records)
        for kind in ("csv", "markdown", "text"):
            table = mera("table", tmp_path / "run", "--format", kind).out
            assert warning in " ".join(table.split())
    assert opened.warnings and "estimate: about " in printed and "unsteered" in printed
    assert opened.warnings[0] in " ".join(mera("run", *told, "--quiet").err.split())


def test_the_estimate_is_made_of_what_each_method_runs(tmp_path):
    sizes = {"train": "300", "calibration": "100", "test": "50"}
    asked = ["no_steering", "optimal_probe", "flip", "searched", "affine", "rotation"]
    prompts = {}
    for positions in ("all", "last"):
        config = RunConfig(
            model="organism", task="spam_cue", positions=positions, search_budget="1s", **sizes
        )
        with open_run(config, tmp_path / positions) as opened:
            rate, seconds = opened.preflight.seconds_per_prompt, opened.seconds(asked)
            assert seconds["unsteered"] == pytest.approx((300 + 50) * rate)
            assert seconds["flip"] == pytest.approx((100 + 50) * rate)
            assert not seconds["no_steering"]
            unsteered = 100 if positions == "all" else 0  # the first to need that run has paid
            assert 1 >= seconds["searched"] - (unsteered + 100 + 50) * rate > 0
            tokens = tokenize_task(opened.model, opened.splits.train, opened.read)
            share = duration.TRIAL_TOKENS * 300 / sum(map(len, tokens))
            judged = round(Choices().search_share * 300)
            asked_once, trials = (share * 100 + 50) * rate, share * duration.FAMILY_TRIALS * judged
            for name, more in ("rotation", 0), ("affine", duration.FAMILY_PASSES * judged):
                looking = min(1, (trials + more) * rate)  # no more than its budget
                assert seconds[name] == pytest.approx(asked_once + looking)
            prompts[positions] = seconds["optimal_probe"] / rate
    assert prompts["all"] > 11 * 100 + 50 > 3 * prompts["last"] > 3 * 150


def test_every_task_is_checked_before_the_first_one_runs(mera, checkpoints, tmp_path):
    good, bad = write_task(tmp_path), write_task(tmp_path, name="one", rows=5)
    told = arguments(checkpoints, f"{good},{bad}", tmp_path / "runs", methods="no_steering")
    assert "one" in mera("run", *told, code=2).err
    assert not (tmp_path / "runs").exists()
    told[told.index(f"{good},{bad}")] = f"{good},{good}"
    assert "each task once" in mera("run", *told, code=2).err
