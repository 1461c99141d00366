"""Directions for free replies, the search over them, and the baselines that draw again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_task
from test_scored import SETTINGS, scored_task

import mera_tl
from mera_tl import ReadSettings, calibrate, collect, evaluate, generate, storage
from mera_tl.benchmark import Run, RunConfig, open_run, some_prompts
from mera_tl.inference import prompt_activations, reply_activations, spi
from mera_tl.methods import (
    METHODS,
    ReplyChoices,
    draw_replies,
    fit_reply_directions,
    search_replies,
)
from mera_tl.probes import auroc, auroc_within, fit_error_probe
from mera_tl.report import write_report
from mera_tl.steering import Gated, Steering, fit_direction, instruction, prompt_controlled
from mera_tl.tasks import Scorer, load_task


@pytest.fixture(scope="module")
def asked(models):
    """A model, a scored task to learn from, and its activations."""
    model = models["llama"]
    train = replace(scored_task(model), role="train")
    return model, train, collect(model, train, settings=SETTINGS)


def test_what_a_prompt_adds_to_all_its_replies_does_not_count():
    generator = torch.Generator().manual_seed(0)
    prompt = torch.arange(30).repeat_interleave(4)
    wrong = torch.rand(120, generator=generator) < 0.2 + 0.6 * (prompt < 15)
    planted = torch.randn(2, 1, 8, generator=generator)
    noise = 0.01 * torch.randn(2, 120, 8, generator=generator)
    topic = 9 * torch.randn(2, 30, 8, generator=generator)[:, prompt] * (prompt < 15)[:, None]
    resid = noise + planted * wrong[:, None]
    found = prompt_controlled(resid + topic, prompt, wrong)
    assert torch.allclose(found, planted[:, 0], atol=0.05)
    # A control: the plain difference of means is misled by what the failing prompts share.
    plain = [(resid + topic)[:, rows].mean(1) for rows in (wrong, ~wrong)]
    assert not torch.allclose(plain[0] - plain[1], planted[:, 0], atol=0.5)


def test_prompts_with_one_outcome_weigh_nothing():
    resid, prompt = torch.randn(1, 4, 3), torch.tensor([0, 0, 1, 1])
    found = prompt_controlled(resid, prompt, torch.tensor([True, False, True, True]))
    assert torch.allclose(found, resid[:, 0] - resid[:, 1])
    assert not prompt_controlled(resid, prompt, torch.tensor([True, True, False, False])).any()


def test_moving_against_the_instruction_direction_moves_toward_it():
    without, given = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    assert torch.allclose(without.mean(1) - instruction(without, given), given.mean(1), atol=1e-6)


def test_a_probe_of_the_kind_of_question_reads_nothing_within_kinds():
    kinds = ["a"] * 50 + ["b"] * 50
    wrong = torch.arange(100) % 50 < torch.tensor([40] * 50 + [10] * 50)
    of_the_kind = torch.tensor([1.0] * 50 + [0.0] * 50)
    assert auroc(of_the_kind, wrong) > 0.75
    assert auroc_within(of_the_kind, wrong, kinds) == 0.5
    assert auroc_within(wrong.double(), wrong, kinds) == 1.0


def test_given_replies_are_read_as_they_were_when_they_were_made(asked):
    model, task, activations = asked
    prompts = [e.prompt for e in task.examples]
    replies = [r.tokens for r in generate(model, prompts, max_new_tokens=6)]
    read = reply_activations(model, model.tokenize(prompts), replies, settings=SETTINGS)
    assert torch.allclose(read, activations.resid("generated"), atol=1e-4)
    last = prompt_activations(model, task, settings=SETTINGS)
    assert torch.allclose(last, activations.resid("last"), atol=1e-4)


def test_drawing_again_pays_for_what_it_draws(asked):
    model, task, learned = asked
    probe = fit_error_probe(learned, position="generated")
    draws = draw_replies(model, task, probe, 3, settings=SETTINGS)
    tokens = torch.stack([each.n_generated for each in draws.outcomes])
    assert torch.equal(draws.best().n_generated, tokens.sum(0))
    assert draws.best_scored().accuracy >= max(each.accuracy for each in draws.outcomes)
    never, always = draws.retried(1.0), draws.retried(0.0)
    assert never.replies == learned.outcomes.replies
    assert torch.equal(never.n_generated, tokens[0])
    assert always.replies == draws.outcomes[1].replies != never.replies
    assert torch.equal(always.n_generated, tokens[:2].sum(0))
    best = draws.best()
    for i, draw in enumerate(draws.predicted.argmin(0).tolist()):
        assert best.replies[i] == draws.outcomes[draw].replies[i]


def test_a_reply_without_a_token_has_no_activation(asked):
    """It is kept as zeros, which are no activation: nothing is learned from them."""
    model, task, _ = asked
    replies = generate(model, [e.prompt for e in task.examples], max_new_tokens=6)
    first = [reply.tokens[0] for reply in replies]
    silent = replace(model, eos_ids=(max(set(first), key=first.count),))
    read = collect(silent, task, settings=SETTINGS)
    empty = torch.tensor([token in silent.eos_ids for token in first])
    assert not read.resid("generated")[:, empty].any() and 0 < empty.sum() < 8
    spoken = read.subset((~empty).nonzero()[:, 0])
    whole, part = (fit_error_probe(each, position="generated") for each in (read, spoken))
    assert torch.equal(whole.weights, part.weights)
    both = [fit_direction(each, whole, "contrastive").vectors for each in (read, spoken)]
    assert torch.equal(*both)
    draws = draw_replies(silent, task, whole, 2, settings=SETTINGS)
    assert torch.equal(draws.predicted[0] == 1, empty)
    assert (draws.best().n_generated.sum() > 0) and (draws.retried(0.9).replies != ("",) * 18)
    prompt, wrong = torch.tensor([0, 0, 0]), torch.tensor([True, True, False])
    resid = torch.randn(2, 3, 4)
    with_silence = torch.cat([resid, torch.zeros(2, 1, 4)], dim=1)
    found = prompt_controlled(
        with_silence, torch.cat([prompt, prompt[:1]]), torch.cat([wrong, wrong[:1]])
    )
    assert torch.equal(found, prompt_controlled(resid, prompt, wrong))


def test_where_hardly_any_reply_has_a_token_the_rest_goes_on(asked, tmp_path):
    model, task, _ = asked
    replies = generate(model, [e.prompt for e in task.examples], max_new_tokens=6)
    first = [reply.tokens[0] for reply in replies]
    often = sorted(set(first), key=first.count)[::-1]
    n = next(n for n in range(len(often)) if sum(token in often[:n] for token in first) > 12)
    mute = replace(model, eos_ids=tuple(often[:n]))
    graders = [Scorer(name, {"text": "never said"}) for name in ("lacks", "contains")]
    pairs = enumerate(task.examples)
    train = replace(task, examples=tuple(replace(e, scorer=graders[i % 2]) for i, e in pairs))
    read = collect(mute, train, settings=SETTINGS)
    with pytest.raises(ValueError, match="at least 10 examples"):
        fit_error_probe(read, position="generated")
    few: dict = {"strengths": (2.0,), "layers": (1,), "rounds": ((9, 2), (2, 99))}
    choices = ReplyChoices(("contrastive",), **few)
    found = search_replies(mute, train, read, choices=choices, settings=SETTINGS)
    assert "generated" not in set(found.table["positions"])
    run = Run(RunConfig(model="organism", task="spam_sentence"), tmp_path)
    vars(run)["activations"] = read
    assert "hardly any reply" in METHODS["retry"].treat(run).lacks


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_gate_may_open_at_every_generated_token(asked, temperature):
    model, task, learned = asked
    probe = fit_error_probe(learned, position="generated")
    steering = Steering(probe, 9 * probe.weights, Gated(), layers=(1,), positions="generated")
    prompts, sampled = [e.prompt for e in task.examples], {"temperature": temperature}
    plain, read = (
        generate(model, prompts, each, max_new_tokens=6, **sampled) for each in (None, steering)
    )
    errors = [reply.trace.predicted_error[0, reply.trace.n_prompt :] for reply in read]
    # A score is linear: on average over the tokens of a reply it is that of their mean.
    fed = [each[np.isfinite(each)] for each in errors]  # a last token is never fed back
    texts = [reply.tokens[: len(each)] for reply, each in zip(plain, fed, strict=True)]
    mean = probe.score(reply_activations(model, model.tokenize(prompts), texts))[1].sigmoid()
    for each, wanted in zip(fed, mean.tolist(), strict=True):
        if len(each):
            scores = torch.logit(torch.tensor(each))
            assert scores.mean().sigmoid().item() == pytest.approx(wanted, abs=1e-4)
    # Nothing above the limit is the unsteered reply, token for token; below the highest, it opens.
    highest = max(each.max() for each in fed if len(each))
    shut, opens = (
        generate(model, prompts, steering.at(at), max_new_tokens=6, **sampled)
        for at in (highest + 1e-4, highest - 1e-4)
    )
    assert [r.tokens for r in shut] == [r.tokens for r in plain] == [r.tokens for r in read]
    moved = [i for i, reply in enumerate(opens) if np.nansum(reply.trace.shift) > 0]
    assert len(moved) == sum((each > highest - 1e-4).any() for each in fed) > 0


def test_what_cannot_be_learned_is_said_or_left_out(asked):
    model, train, activations = asked
    choices = ReplyChoices(("instruction",))
    with pytest.raises(ValueError, match="its prompts have no instruction"):
        fit_reply_directions(model, train, activations, choices, SETTINGS)
    both = ReplyChoices(("instruction", "contrastive"))
    assert fit_reply_directions(model, train, activations, both, SETTINGS).keys() == {"contrastive"}
    plain = replace(make_task(), role="train")
    with pytest.raises(ValueError, match="use `search`"):
        search_replies(model, plain, collect(model, plain))


def test_where_no_reply_is_right_only_the_instruction_has_a_direction(asked, tmp_path):
    model, task, _ = asked
    never = Scorer("contains", {"text": "never said"})
    train = replace(task, examples=tuple(replace(e, scorer=never) for e in task.examples))
    activations = collect(model, train, settings=SETTINGS)
    with pytest.raises(ValueError, match="0 right examples are too few .*; 0 of 11 prompts have"):
        search_replies(model, train, activations, settings=SETTINGS)
    rows = "\n".join(f'{{"t": "spam ham {i}"}}' for i in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    keys = 'data = "rows.jsonl"\ntemplate = "{t} Reply in a sentence:"\nscorer = "contains"\n'
    keys += 'text = "never said"\ninstruction = "Reply in a sentence:"\n'
    (tmp_path / "task.toml").write_text(keys)
    config = RunConfig(model="organism", task=str(tmp_path / "task.toml"), reply_tokens=4)
    with open_run(config, tmp_path / "run") as run:
        without, taught = run.records(("reply_contrast", "instruction"))
    assert without["decision"] is None
    assert any(said.startswith("reply_contrast: No direction") for said in without["warnings"])
    assert taught["decision"] == "ABSTAIN" and taught["details"]["direction"] == "instruction"
    assert "are too few" in write_report(tmp_path / "run").read_text()


def test_what_moves_generated_tokens_alone_reads_a_probe_of_these(asked):
    model, train, activations = asked
    few: dict = {"strengths": (2.0,), "layers": (1,), "rounds": ((99, 2), (4, 99))}
    for positions in ("generated", "final"):
        choices = ReplyChoices(("contrastive",), positions=(positions,), **few)
        found = search_replies(model, train, activations, choices=choices, settings=SETTINGS)
        read = "generated" if positions == "generated" else "last"
        assert found.steering.probe.position == read
    choices = ReplyChoices(("contrastive",), positions=("last",), first_k=(2,), **few)
    tried = search_replies(model, train, activations, choices=choices, settings=SETTINGS).table
    assert {"last", "generated"} == set(tried["positions"]) and 2 in set(tried["first_k"])


def test_a_search_that_was_killed_ends_as_if_undisturbed(asked, tmp_path, monkeypatch):
    model, train, activations = asked
    # With this seed the best on few prompts are not the best of those that have seen more.
    some: dict = {"strengths": (2.0, 8.0), "search_share": 0.44, "seed": 4}
    choices = ReplyChoices(("contrastive",), rounds=((99, 2), (2, 99)), **some)

    def look(folder: str):
        told: dict = {"choices": choices, "settings": SETTINGS, "folder": tmp_path / folder}
        return search_replies(model, train, activations, **told)

    whole, write, calls = look("whole"), storage.write_json, []

    def dies(path, value):
        write(path, value)
        calls.append(path)
        raise KeyboardInterrupt

    for _ in range(9):  # after everything that it keeps
        monkeypatch.setattr(storage, "write_json", dies)
        try:
            found = look("killed")
            break
        except KeyboardInterrupt:
            continue
    assert len(calls) == 3  # all on few; the best on all; their variants
    assert found.chosen == whole.chosen
    assert found.table.astype(str).equals(whole.table.astype(str))


def test_the_planted_failure_is_corrected_in_sentences_and_certified():
    model = mera_tl.load_model("organism")
    settings = ReadSettings(reply_tokens=6)
    splits = load_task("spam_sentence").split(seed=0, train=400, calibration=200, test=200)
    learned = collect(model, splits.train, settings=settings)
    tried: dict = {"strengths": (1.0, 2.0, 4.0), "positions": ("last",)}
    choices = ReplyChoices(("kind_controlled",), rounds=((99, 40), (4, 999)), **tried)
    found = search_replies(model, splits.train, learned, choices=choices, settings=settings)
    decision = calibrate(model, splits.calibration, found.steering, settings=settings)
    assert str(decision).startswith("STEER")
    before = evaluate(model, splits.test, settings=settings)
    after = evaluate(model, splits.test, decision.fwd_hooks(), settings=settings)
    assert before.accuracy < 0.8 and spi(after.accuracy, before.accuracy) > 0.8
    # A control: the probe reads the kind of question, and hardly the failure within a kind.
    assert found.details["probe_auroc"] > 0.9 > 0.7 > found.details["probe_auroc_within_kind"]
    assert after.replies[0].startswith("I would say")


def test_a_run_compares_what_suits_its_task(tmp_path):
    from mera_tl.benchmark import DEFAULT_METHODS

    run = Run(RunConfig(model="organism", task="spam_sentence"), tmp_path)
    assert "best_of_k" in run.suited(DEFAULT_METHODS)
    assert run.suited(("flip",)) == ("flip",)
    with pytest.raises(ValueError, match="flip needs options .* on spam_sentence there are no_st"):
        run.announce(("flip",))
    with pytest.raises(ValueError, match="retry needs replies that are scored"):
        Run(RunConfig(model="organism", task="spam_cue"), tmp_path).announce(("retry",))
    assert METHODS["searched"].on == "both"


def test_a_run_of_replies_ends_in_a_report_that_shows_them(tmp_path):
    sizes: dict = {"train": "60", "calibration": "30", "test": "30"}
    sizes["other_tasks"] = "spam_cue,yesno_bias"
    sizes |= {"min_gain": -0.9, "reply_tokens": 6}  # whatever is found is certified
    config = RunConfig(model="organism", task="spam_sentence", **sizes)
    with pytest.raises(ValueError, match="no task"):
        Run(replace(config, other_tasks="spam_que"), tmp_path).announce(("no_steering",))
    methods = ("no_steering", "kind_controlled", "retry", "best_of_k", "best_of_k_scorer")
    with open_run(config, tmp_path / "run") as run:
        records = {record["method"]: record for record in run.records(methods)}
    tokens = {name: record["tokens_generated"] for name, record in records.items()}
    assert tokens["no_steering"] <= tokens["retry"] < tokens["best_of_k"]
    best = records["best_of_k_scorer"]
    assert best["accuracy"] >= max(records[m]["accuracy"] for m in ("no_steering", "best_of_k"))
    for name, text in ((name, record["free_text"]) for name, record in records.items()):
        odd = text["perplexity"] > 2 * records["no_steering"]["free_text"]["perplexity"]
        assert odd == any(f"Replies under {name} are odd" in w for w in records[name]["warnings"])
    assert records["kind_controlled"]["decision"] == "STEER"
    assert {name for name, record in records.items() if record["elsewhere"]} == {"kind_controlled"}
    model, hooks = run.model, run.treat("kind_controlled").fwd_hooks
    for name, told in records["kind_controlled"]["elsewhere"].items():
        some = some_prompts(load_task(name), seed=0)
        before, after = (evaluate(model, some, each).correct for each in ((), hooks))
        assert told["better"] == (after & ~before).sum() and told["n"] == 30
        assert told["worse"] == (before & ~after).sum()
    page = write_report(tmp_path / "run").read_text()
    assert "I would say ham" in page and "tokens per reply" in page
    assert "spam_cue, better / worse" in page
    # What is read of failures stands within kinds first: over all it is the kind of question.
    assert page.index("AUROC within kinds") < page.index("over all</th>")
    assert "has fitted no probe" not in page
    assert 'always "right"' not in page
