"""Free text under steering: agrees with Hugging Face, and notices a broken model."""

from dataclasses import replace

import pytest
import torch
from conftest import make_task, mixed_options, original, random_probe

from mera_tl.inference import evaluate, free_text
from mera_tl.steering import Additive, Gated, Steering


def test_perplexity_and_text_agree_with_hugging_face(model, models, checkpoints):
    family = next(name for name, other in models.items() if other is model)
    hf = original(checkpoints[family])
    task, logs, distinct = make_task(6), [], []
    for prompt in model.tokenize([example.prompt for example in task.examples]):
        ids = torch.tensor([prompt])
        whole = hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=list(model.eos_ids),
        )
        text = whole[0, len(prompt) :]
        distinct.append(len(set(text.tolist())) / len(text))
        with torch.no_grad():
            log_probs = hf(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logs += log_probs.gather(1, text[:, None])[:, 0].tolist()
    free = free_text.free_text(model, task, n_new=10)
    assert free.n_tokens == len(logs)
    assert free.distinct_1 == pytest.approx(sum(distinct) / len(distinct))
    assert free.perplexity == pytest.approx(torch.tensor(logs).mean().neg().exp().item(), rel=1e-3)


def test_a_shift_that_breaks_the_model_shows(models):
    model, task = models["qwen2"], make_task(8)
    plain = free_text.free_text(model, task)
    hooks = Steering(random_probe(model), rule=Additive(30.0)).fwd_hooks()
    broken = free_text.free_text(model, task, hooks)
    assert broken.perplexity > 2 * plain.perplexity
    assert broken.distinct_2 < 1


def test_inert_hooks_change_nothing(models):
    model, task = models["llama"], make_task(4)
    inert = Steering(random_probe(model)).fwd_hooks()
    assert free_text.free_text(model, task, inert) == free_text.free_text(model, task)


def test_a_steering_by_the_answer_is_that_of_the_answer(models):
    """As the direction of what each prompt is about to answer; it once went on unsteered."""
    model = models["llama"]
    task = make_task(12, options=mixed_options(model))
    directions = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    steering = Steering(random_probe(model), directions, Gated(-torch.inf, 5.0), positions="last")
    answers = evaluate(model, task).predictions.tolist()
    assert set(answers) == {0, 1}
    for place, answer in enumerate(answers):
        one = task.subset([place])
        given, own, none = (
            free_text.free_text(model, one, hooks, n_new=6)
            for hooks in (
                steering.fwd_hooks(),
                replace(steering, direction=directions[answer]).fwd_hooks(),
                (),
            )
        )
        assert given == own != none
