"""The live panel says what `evaluate` says; the page keeps to itself, and tabs to theirs."""

import threading
import urllib.error
import urllib.request
from dataclasses import replace
from queue import Queue

import pytest
from chromium import BROWSER, Chromium
from conftest import run_in

import mera_tl
from mera_tl.live import Bench, Choices, effects, open_bench, panel, replies, serve
from mera_tl.report import RunFolder
from mera_tl.tasks import Example


@pytest.fixture(scope="module")
def splits():
    return mera_tl.load_task("spam_cue").split(seed=0, train=300, calibration=20, test=40)


@pytest.fixture(scope="module")
def bench(splits):
    model = mera_tl.load_model("organism")
    activations = mera_tl.collect(model, splits.train)
    probe = mera_tl.fit_error_probe(activations, penalty=0.01)
    vectors = mera_tl.fit_direction(activations, probe, "controlled_contrastive").vectors
    way = mera_tl.Steering(probe, vectors, layers=(1,), positions="last")
    prompts = tuple(example.prompt for example in splits.test.examples)
    return Bench(model, {"controlled": way}, splits.test.options, prompts)


def chosen(bench, **changes):
    return replace(bench.start, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": 0.02},
        {"threshold": 0.1, "layers": (0, 1)},
        {"rule": "strength", "strength": 1.0},
    ],
)
def test_a_panel_says_what_evaluate_says(bench, splits, changes):
    choices = chosen(bench, **changes)
    steering = bench.steering(choices)
    some = splits.test.subset(range(6))
    before = mera_tl.evaluate(bench.model, some)
    after = mera_tl.evaluate(bench.model, some, steering.fwd_hooks())
    assert not before.probs.allclose(after.probs)  # the control: it does something
    for i, example in enumerate(some.examples):
        told = panel(bench, example.prompt, choices).ledger
        assert told.probs[0] == pytest.approx(before.probs[i].tolist(), abs=1e-4)
        assert told.probs[1] == pytest.approx(after.probs[i].tolist(), abs=1e-4)


def test_where_no_threshold_can_move_anything_it_says_why(bench):
    (way,) = bench.ways.values()
    against = replace(bench, ways={"against": replace(way, direction=-way.probe.weights)})
    said = panel(against, bench.prompts[0], chosen(against, threshold=0.001)).said
    assert "nothing is moved: in layer 1 the probe's score does not fall" in said
    assert "fall" not in panel(bench, bench.prompts[0], chosen(bench, threshold=0.99)).said


def test_the_unsteered_run_is_kept_and_belongs_to_its_prompt(bench):
    first, second = (panel(bench, prompt, bench.start) for prompt in bench.prompts[:2])
    again = panel(bench, bench.prompts[0], chosen(bench, threshold=0.1))
    assert again.ledger.unsteered is first.ledger.unsteered
    assert second.ledger.unsteered is not first.ledger.unsteered
    assert (again.ledger.before == first.ledger.before).all()


def test_replies_are_those_of_generate(bench):
    choices = chosen(bench, threshold=0.1, max_new_tokens=4)
    for prompt in bench.prompts[:4]:
        wanted = [
            mera_tl.generate(bench.model, [prompt], each, max_new_tokens=4)[0].text
            for each in (None, bench.steering(choices))
        ]
        assert list(replies(bench, prompt, choices)) == wanted


def test_a_reply_in_use_is_not_forgotten_whatever_is_tried_after_it(bench):
    before = {
        replies(bench, bench.prompts[0], chosen(bench, strength=0.01 * i, rule="strength"))[0]
        for i in range(2 * effects.KEPT)
    }
    assert len(before) == 1 and len(effects._REPLIES) == effects.KEPT


def test_what_a_change_leaves_alone_is_not_run_again(bench):
    prompt, low = bench.prompts[7], chosen(bench, threshold=0.02, max_new_tokens=4)
    n, fed = len(bench.model.tokenize([prompt])[0]), []
    embed = bench.model.hooked.embed
    handle = embed.register_forward_pre_hook(lambda _, x: fed.append(tuple(x[0].shape)))
    try:
        first = panel(bench, prompt, low)
        assert fed[0] == (1, n) and (1, n) not in fed[1:]  # steered, only the end is run
        fed.clear()
        said = replies(bench, prompt, low)
        assert fed[0] == (2, 2) and len(fed) <= 4  # both replies in one batch
        fed.clear()
        panel(bench, prompt, chosen(bench, threshold=0.1, max_new_tokens=4))
        replies(bench, prompt, chosen(bench, threshold=0.1, max_new_tokens=4))
        assert fed and max(columns for _, columns in fed) < n
        fed.clear()
        assert replies(bench, prompt, low) == said and panel(bench, prompt, low) is first
        assert not fed
        # Where earlier tokens move, the whole prompt is run.
        panel(bench, prompt, chosen(bench, positions="all"))
        assert (1, n) in fed
    finally:
        handle.remove()
    whole = mera_tl.explain(
        bench.model,
        Example(0, prompt, bench.options, 0),
        bench.steering(low),
        settings=bench.settings,
    )
    assert first.ledger.after == pytest.approx(whole.after, abs=1e-5)
    assert first.ledger.shift == pytest.approx(whole.shift, abs=1e-5)
    assert first.ledger.probs[1] == pytest.approx(whole.probs[1], abs=1e-5)


def test_what_cannot_be_shown_is_said(bench):
    with pytest.raises(ValueError, match="no prompt"):
        panel(bench, "  ", bench.start)
    with pytest.raises(ValueError, match="no way 'other'"):
        panel(bench, "a", chosen(bench, way="other"))
    with pytest.raises(ValueError, match="no model"):
        open_bench()
    bare = open_bench(bench.model)
    assert "replies only" in panel(bare, "question : ?", Choices("")).said


def test_a_run_is_opened_with_what_it_certified_whatever_it_recommends(tmp_path, bench):
    told = {"train": "200", "calibration": "120", "test": "20", "layers": "1", "min_gain": -0.2}
    told |= {"positions": "last", "thresholds": "0.07"}
    config = mera_tl.RunConfig(model="organism", task="spam_cue", **told)
    run_in(tmp_path, config, ["no_steering", "flip", "controlled_contrastive"])
    certificate = mera_tl.Calibration.load(tmp_path / "certificates" / "controlled_contrastive")
    assert RunFolder.open(tmp_path).verdict.method == "flip" and not certificate.abstained
    found = open_bench(bench.model, run=tmp_path)
    first = found.steering(found.start)
    assert found.start.way == "as certified" and first.rule == certificate.steering.rule
    assert found.start.threshold != certificate.threshold  # control: no stop of the slider
    assert first.certificate is not None and panel(found, found.prompts[0], found.start).bars
    moved = found.steering(replace(found.start, positions="all"))
    assert moved.certificate is None and moved.positions == "all"
    with pytest.raises(ValueError, match="changed: the model's weights"):
        open_bench(replace(bench.model, fingerprint="f00d"), run=tmp_path)


def test_replies_to_a_scored_task_are_scored_as_in_its_run(tmp_path, bench):
    told = {"train": "40", "calibration": "12", "test": "12", "reply_tokens": 8}
    config = mera_tl.RunConfig(model="organism", task="ifeval_like_one_word", **told)
    run_in(tmp_path, config, ["no_steering"])
    found = open_bench(bench.model, run=tmp_path)
    kept = mera_tl.storage.read_records(tmp_path / "outcomes" / "no_steering.jsonl")
    for prompt, record in zip(found.prompts, kept, strict=True):
        shown = panel(found, prompt, found.start)
        assert shown.said.startswith("The reply ") and shown.tokens and shown.layers
        assert shown.bars is None  # there is no option
        assert shown.ledger.answers[0] == record["prediction"]
        assert replies(found, prompt, found.start) == shown.ledger.replies
    own = panel(found, "A prompt of my own.", found.start)
    assert "Only a run's own prompts have a scorer" in own.said


def test_a_saved_steering_is_read_as_it_was_certified(bench, splits, tmp_path):
    (way,) = bench.ways.values()
    settings = mera_tl.ReadSettings("exact", max_new_tokens=3)
    decision = mera_tl.calibrate(
        bench.model, splits.calibration, way.at(0.3), min_gain=-0.9, settings=settings
    )
    opened = open_bench(bench.model, steering=decision.save(tmp_path / "s"))
    assert (opened.settings.readout, opened.settings.max_new_tokens) == ("exact", 3)
    assert opened.steering(opened.start).rule == way.at(0.3).rule
    assert opened.start.way == "as certified"
    given = open_bench(bench.model, steering=way.at(0.3))
    assert (given.start.way, given.start.threshold) == ("as given, not certified", 0.3)
    # Without a threshold it is moved at the slider's.
    open_ended = open_bench(bench.model, steering=way)
    assert open_ended.steering(open_ended.start).rule == way.at(0.5).rule


@pytest.fixture(scope="module")
def address(bench):
    told: Queue[str] = Queue()
    threading.Thread(target=serve, args=(bench,), kwargs={"ready": told.put}, daemon=True).start()
    return told.get(timeout=30)


def status(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_only_this_machine_with_the_token_is_answered(address):
    bare = address.partition("?")[0]
    assert bare.startswith("http://127.0.0.1:")
    assert status(address) == 200
    assert status(bare) == status(bare + "?token=guess") == status(bare + "_dash-layout") == 403
    # A name that some page on the web resolves to this machine.
    assert status(address, Host="evil.example:80") == 403


SAID = "document.querySelector('#said')?.textContent || ''"
DONE = "document.querySelector('#after')?.textContent.length > 0"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_two_tabs_in_a_browser_do_not_mix(bench, address):
    with Chromium() as browser:
        one, two = browser.tab(address), browser.tab(address)
        for tab in (one, two):
            tab.wait(f"{DONE} && {SAID}.length > 10")
        told = panel(bench, bench.prompts[0], chosen(bench, threshold=0.5))
        assert one.run(SAID) == two.run(SAID) == told.said
        # A fixed length at every token, in one tab only.
        one.click("#rule label:nth-of-type(2) input")
        one.click("#positions label:nth-of-type(3) input")
        two.click("#next")
        everywhere = chosen(bench, rule="strength", strength=0.1, positions="all")
        fixed = panel(bench, bench.prompts[0], everywhere)
        other = panel(bench, bench.prompts[1], chosen(bench, threshold=0.5))
        assert len({told.said, fixed.said, other.said}) == 3
        for tab, wanted, idle in ((one, fixed.said, "threshold"), (two, other.said, "strength")):
            tab.wait(f"{SAID} === {wanted!r}", seconds=20)
            assert tab.run(f"document.querySelectorAll('#{idle} [data-disabled]').length")
        two.run("document.querySelector('#threshold [role=slider]').focus()")
        for _ in range(10):
            two.press("ArrowLeft")
        two.wait("document.querySelector('#at').textContent === '0.02'", seconds=20)
        low = panel(bench, bench.prompts[1], chosen(bench, threshold=0.02))
        two.wait(f"{SAID} === {low.said!r}", seconds=20)
        assert one.run(SAID) == fixed.said
        assert two.run("document.querySelectorAll('.js-plotly-plot').length") == 3


def test_the_panel_of_a_notebook_follows_its_controls(bench, monkeypatch):
    pytest.importorskip("ipywidgets")
    from mera_tl.live import notebook

    monkeypatch.setattr(notebook, "open_bench", lambda *_, **__: bench)
    box = mera_tl.explore()
    names = [getattr(child, "description", "") for child in box.children]
    threshold = box.children[names.index("threshold")]

    def said():
        return "".join(each.get("text", "") for each in box.children[-1].outputs)

    first = said()
    threshold.value = 0
    assert said() != first
