"""The ledger shows what happened: the answers of `evaluate`, the shifts of the rule, no others."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_task, mixed_options, random_probe

from mera_tl.inference import ReadSettings, evaluate
from mera_tl.steering import Additive, Steering, explain

SETTINGS = ReadSettings(readout="last")
THRESHOLD = 0.3


@pytest.fixture(scope="module")
def case(models):
    """A model, a task on which it is of two minds, and a steering that changes answers."""
    model = models["llama"]
    task = make_task(16, options=mixed_options(model))
    probe = random_probe(model, scale=6.0)
    steering = Steering(probe, layers=(1,), positions="last").at(THRESHOLD)
    return model, task, steering


def ledgers(case):
    model, task, steering = case
    return [explain(model, example, steering, settings=SETTINGS) for example in task.examples]


def test_answers_are_those_of_evaluate_before_and_after(case):
    model, task, steering = case
    runs = [evaluate(model, task, hooks, settings=SETTINGS) for hooks in ([], steering.fwd_hooks())]
    assert (runs[0].probs - runs[1].probs).abs().max() > 1e-3  # the steering does something
    for i, ledger in enumerate(ledgers(case)):
        for run, answer, probs in zip(runs, ledger.answers, ledger.probs, strict=True):
            assert answer == task.options[int(run.predictions[i])]
            assert torch.tensor(probs) == pytest.approx(run.probs[i], abs=1e-5)


def test_it_fires_where_the_unsteered_score_exceeds_the_limit_and_only_there(case):
    fired = []
    for ledger in ledgers(case):
        moved = ledger.shift > 0
        last = len(ledger.tokens) - 1
        assert {(i, j) for i, j in zip(*np.nonzero(moved), strict=True)} <= {(1, last)}
        assert moved[1, last] == (ledger.before[1, last] > THRESHOLD)
        if moved[1, last]:
            assert ledger.after[1, last] == pytest.approx(THRESHOLD, abs=1e-3)
        fired.append(ledger.fired)
    assert 0 < sum(fired) < len(fired)  # both cases occur


def test_layers_below_the_steered_one_and_earlier_tokens_do_not_change(case):
    changed = 0
    for ledger in ledgers(case):
        assert np.array_equal(ledger.before[0], ledger.after[0])
        assert np.array_equal(ledger.before[:, :-1], ledger.after[:, :-1])
        changed += not np.array_equal(ledger.before[2], ledger.after[2])
    assert changed  # layers above do


def test_the_shift_is_measured_in_residual_norms(case):
    model, task, _ = case
    probe = random_probe(model)
    steering = Steering(probe, rule=Additive(0.5), layers=(1,), positions="all")
    ledger = explain(model, task.examples[0], steering, settings=SETTINGS)
    _, cache = model.hooked.run_with_cache(torch.tensor(model.tokenize([task.examples[0].prompt])))
    norm = cache["blocks.1.hook_resid_post"][0].norm(dim=-1)
    wanted = 0.5 * float(probe.resid_norm[1]) / norm
    assert ledger.shift[1] == pytest.approx(wanted.numpy(), rel=1e-4)


def test_predictions_are_valid_where_the_probe_was_fitted_and_nowhere_else(case):
    ledger = ledgers(case)[0]
    rows = ledger.frame()
    assert set(rows.loc[rows["valid"], "pos"]) == {ledger.n_prompt - 1}
    at_answers = replace(ledger, position="exact", n_prompt=2)
    assert [at_answers.is_valid(pos) for pos in range(4)] == [False, True, True, True]


def test_a_prompt_of_ones_own_has_no_row_and_no_true_answer(case):
    ledger = ledgers(case)[0]
    own = replace(ledger, row=-1, label="")
    assert "true is" in str(ledger) and "true is" not in str(own)
    assert str(own).startswith("Your prompt: ") and own.figure().layout.title.text in str(own)


def test_an_unlimited_steering_moves_nothing(case):
    model, task, steering = case
    ledger = explain(model, task.examples[0], Steering(steering.probe), settings=SETTINGS)
    assert ledger.fired == 0
    assert np.array_equal(ledger.before, ledger.after)
    assert ledger.probs[0] == ledger.probs[1]
    assert "Nothing was moved" in str(ledger)


def test_a_direction_per_answer_replaces_the_last_token_not_appends_it(case):
    model, task, steering = case
    direction = torch.stack([steering.probe.weights, steering.probe.weights])
    by_answer = replace(steering, direction=direction)
    for example in task.examples[:4]:
        plain = explain(model, example, steering, settings=SETTINGS)
        ledger = explain(model, example, by_answer, settings=SETTINGS)
        assert ledger.tokens == plain.tokens
        assert ledger.after == pytest.approx(plain.after, abs=1e-4)


def test_generated_tokens_are_shown_when_they_are_steered(case):
    model, task, steering = case
    said = ReadSettings(readout="exact", max_new_tokens=3)
    generated = replace(steering, positions="generated")
    lengths = set()
    for example in make_task(8).examples:
        ledger = explain(model, example, generated, settings=said)
        n_prompt = len(model.tokenize([example.prompt])[0])
        assert not ledger.shift[:, :n_prompt].any()
        lengths.add(len(ledger.tokens) - n_prompt)
    assert max(lengths) == 2  # the third token is emitted, not fed


def test_generated_tokens_are_shown_as_text_and_as_both_where_steering_changed_them(case):
    model, _, steering = case
    said = ReadSettings(readout="exact", max_new_tokens=3)
    strong = replace(steering, rule=Additive(2.0), positions="last")
    n_words = n_changed = 0
    for example in make_task(8).examples:
        still = explain(model, example, Steering(steering.probe), settings=said)
        tokens = model.tokenize([example.prompt])[0]
        assert still.n_prompt == len(tokens)
        for word in still.tokens[still.n_prompt :]:  # by the model itself, without a cache
            ids = torch.tensor([tokens])
            tokens.append(int(model.next_token_logits(ids, torch.ones_like(ids)).argmax()))
            assert word == (model.tokenizer.decode(tokens[-1:]).strip() or "␣")
            n_words += 1
        changed = explain(model, example, strong, settings=said)
        n_changed += any(" → " in word for word in changed.tokens[changed.n_prompt :])
    assert n_words and n_changed


def test_hooks_alone_read_the_steered_layers(case):
    model, task, steering = case
    example = task.examples[0]
    ledger = explain(model, example, steering.fwd_hooks(), settings=SETTINGS)
    assert ledger.layers == (1,)
    whole = explain(model, example, steering.fwd_hooks(), probe=steering.probe, settings=SETTINGS)
    assert np.array_equal(whole.after[1], ledger.after[0])


def test_nothing_to_read_is_said(case):
    model, task, _ = case
    with pytest.raises(ValueError, match="nothing to read"):
        explain(model, task.examples[0], [], settings=SETTINGS)


def test_it_is_json_a_figure_and_html(case):
    ledger = ledgers(case)[0]
    plain = json.loads(json.dumps(ledger.to_json()))
    assert np.array(plain["before"]).shape == (3, len(plain["tokens"]))
    assert len(ledger.figure().data) == 3
    assert len(ledger.frame()) == 3 * len(ledger.tokens)
    assert isinstance(ledger._repr_mimebundle_(), dict)  # as plotly shows it where it is shown
