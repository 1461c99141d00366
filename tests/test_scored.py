"""Replies to scored tasks: what is decoded is what is scored, in batches, alone and steered."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_task, random_probe

from mera_tl import ReadSettings, collect, evaluate, evaluate_many, explain, generate, load_task
from mera_tl.inference import Outcomes
from mera_tl.models import resid_post
from mera_tl.steering import Gated, Steering
from mera_tl.tasks import Scorer, Task

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments.steer_free_text import held, short_answers  # noqa: E402

SETTINGS = ReadSettings(reply_tokens=6, batch_size=5)


def scored_task(model, n: int = 18):
    """Random prompts, scored by a word that a random model says in some of its replies."""
    task = make_task(n)
    prompts = [example.prompt for example in task.examples]
    said = [set(reply.text.split()) for reply in generate(model, prompts, max_new_tokens=6)]
    share = {word: sum(word in each for each in said) for word in set().union(*said)}
    word = min(sorted(share), key=lambda word: abs(share[word] - n / 2))
    scorer, options = Scorer("contains", {"text": word}), ("wrong", "right")
    examples = [replace(e, options=options, label=1, scorer=scorer) for e in task.examples]
    return Task("spoken", tuple(examples), "all")


@pytest.fixture(scope="module", params=("llama", "gpt2"))
def asked(request, models):
    model = models[request.param]
    return model, scored_task(model)


def test_what_is_scored_is_what_generate_says(asked):
    model, task = asked
    outcomes = evaluate(model, task, settings=SETTINGS)
    replies = generate(model, [e.prompt for e in task.examples], max_new_tokens=6)
    assert outcomes.replies == tuple(reply.text for reply in replies)
    scores = torch.tensor([e.score(r.text) for e, r in zip(task.examples, replies, strict=True)])
    assert torch.equal(1 - outcomes.error, scores) and torch.equal(outcomes.correct, scores == 1)
    assert 0 < outcomes.accuracy < 1  # a control: there is something to tell apart
    assert outcomes.n_generated.tolist() == [len(r.tokens) + r.is_ended for r in replies]
    assert [f == "stop" for f in outcomes.finishes] == [r.is_ended for r in replies]
    again = Outcomes.from_records(outcomes.to_records(), task.options)
    assert again.finishes == outcomes.finishes
    assert torch.equal(again.n_generated, outcomes.n_generated)


def test_one_at_a_time_is_the_same(asked):
    model, task = asked
    together = evaluate(model, task, settings=SETTINGS)
    alone = evaluate(model, task, settings=replace(SETTINGS, batch_size=1))
    assert alone.replies == together.replies and torch.equal(alone.probs, together.probs)


WHERE = [("final", None), ("last", None), ("last", 2), ("generated", None), ("generated", 2)]


def always(model, positions: str, first_k: int | None) -> Steering:
    """Moves every token in scope far enough to change replies."""
    direction = torch.randn(
        model.n_layers, model.d_model, generator=torch.Generator().manual_seed(1)
    )
    where: dict = {"layers": (1,), "positions": positions, "first_k": first_k}
    return Steering(random_probe(model), 4 * direction, Gated(-torch.inf), **where)


@pytest.mark.parametrize(("positions", "first_k"), [*WHERE, ("all", None)])
def test_many_steerings_at_once_say_what_each_says(asked, positions, first_k):
    model, task = asked
    limits = (-torch.inf, 0.0, torch.inf)
    steerings = [replace(always(model, positions, first_k), rule=Gated(at)) for at in limits]
    base = evaluate(model, task, settings=SETTINGS)
    moved, _, never = runs = evaluate_many(model, task, steerings, settings=SETTINGS)
    for steering, run in zip(steerings, runs, strict=True):
        hooks = steering.reading_hooks() if steering is steerings[2] else steering.fwd_hooks()
        alone = evaluate(model, task, hooks, settings=SETTINGS)
        assert run.replies == alone.replies
        assert torch.equal(run.n_steerable, alone.n_steerable)
        assert torch.equal(run.n_steered, alone.n_steered)
    assert never.replies == base.replies  # nothing above the limit: token for token
    assert moved.replies != base.replies  # a control: the shift is large enough to matter
    prompts, sampled = [e.prompt for e in task.examples], {"max_new_tokens": 6, "temperature": 1.0}
    noise = [generate(model, prompts, steering, **sampled) for steering in (None, steerings[2])]
    assert [r.tokens for r in noise[0]] == [r.tokens for r in noise[1]]


def test_the_first_k_generated_tokens_are_between_none_and_all(asked):
    model, task = asked
    prompts = [example.prompt for example in task.examples]

    def says(positions: str, first_k: int | None, temperature: float = 1.0) -> list:
        some = {"max_new_tokens": 6, "temperature": temperature}
        return [
            r.tokens for r in generate(model, prompts, always(model, positions, first_k), **some)
        ]

    for heat in (0.0, 1.0):
        assert says("last", 99, heat) == says("last", None, heat)
        assert says("last", 0, heat) == says("final", None, heat)
        plain = generate(model, prompts, max_new_tokens=6, temperature=heat)
        assert says("generated", 0, heat) == [reply.tokens for reply in plain]
    # A control: in between lies something else, which begins as all does.
    few, whole = says("last", 2), says("last", None)
    assert whole != few != says("final", None)
    assert [tokens[:3] for tokens in few] == [tokens[:3] for tokens in whole]
    with pytest.raises(ValueError, match="first_k=-1"):
        always(model, "last", -1)
    hooks = always(model, "last", 2).fwd_hooks()
    with pytest.raises(ValueError, match="counts generated tokens"):
        model.hooked.run_with_hooks(torch.tensor([[1, 2, 3]]), fwd_hooks=hooks)


def test_activations_are_the_means_over_the_tokens_of_replies(asked):
    model, task = asked
    activations = collect(model, task, settings=SETTINGS)
    example = next(i for i, n in enumerate(activations.outcomes.n_generated) if n == 6)
    prompt = model.tokenize([task.examples[example].prompt])[0]
    (reply,) = generate(model, [task.examples[example].prompt], max_new_tokens=6)
    tokens, seen = torch.tensor([[*prompt, *reply.tokens]]), []
    hook = (resid_post(1), lambda resid, hook: seen.append(resid[0]))
    with torch.inference_mode(), model.hooked.hooks(fwd_hooks=[hook]):
        model.hooked(tokens, attention_mask=torch.ones_like(tokens))
    kept = activations.resid("generated")[1, example]
    assert torch.allclose(kept, seen[0][len(prompt) :].mean(0), atol=1e-4)
    assert torch.allclose(
        activations.resid("last")[1, example], seen[0][len(prompt) - 1], atol=1e-4
    )


def test_a_scorer_that_fails_is_named_with_its_row(asked, tmp_path):
    model, task = asked
    (tmp_path / "mine.py").write_text("def grade(reply, reference):\n    return float('nan')\n")
    scorer = Scorer("function", {"file": str(tmp_path / "mine.py"), "call": "grade"})
    broken = replace(task.examples[4], scorer=scorer)
    examples = (*task.examples[:4], broken, *task.examples[5:])
    with pytest.raises(ValueError, match="failed on row 4 with the reply .*NaN"):
        evaluate(model, replace(task, examples=examples), settings=SETTINGS)
    with pytest.raises(ValueError, match="has options and no scorer"):
        evaluate(model, make_task(), settings=ReadSettings("reply"))


def test_explain_shows_both_replies(asked):
    model, task = asked
    steering = Steering(random_probe(model), rule=Gated(-torch.inf, 8.0), layers=(1,))
    ledger = explain(model, task.examples[0], steering, settings=SETTINGS)
    one, hooks = task.subset([0]), steering.fwd_hooks()
    runs = [evaluate(model, one, each, settings=SETTINGS) for each in ((), hooks)]
    assert ledger.replies == (runs[0].replies[0], runs[1].replies[0])
    said = [task.options[int(run.predictions[0])] for run in runs]
    assert list(ledger.answers) == said and repr(ledger.replies[0])[:80] in str(ledger)


def test_a_reply_in_form_need_not_hold_the_answer():
    """Of questions with a short answer; the list of answers names each subject that is asked."""
    task = load_task("ifeval_like_words")
    asked = [example.without_instruction().prompt for example in task.examples]
    known = [list(short_answers().get(example.kind, ())) for example in task.examples]
    n = sum(map(bool, known))
    assert n == sum(len(answers) for answers in short_answers().values()) == 225
    for question, subjects in zip(asked, known, strict=True):
        assert not subjects or any(subject in question for subject in subjects)
    capitals = (f"What is the capital of {country}?" for country in ("France", "Japan", "Egypt"))
    three = task.subset([asked.index(question) for question in capitals])
    said = SimpleNamespace(
        replies=("Ascendant.", "Tokyo", "It is Cairo, as everyone knows."),
        correct=torch.tensor([True, True, False]),
    )
    assert held(three, said) == {"n": 3, "answer": 2 / 3, "both": 1 / 3}
