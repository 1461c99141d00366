"""Laws of what all prompts begin with: run once, it changes no number."""

from dataclasses import replace

import pytest
import torch
from conftest import make_task, random_probe

from mera_tl.inference import ReadSettings, collect, evaluate, prefix
from mera_tl.models import load_model
from mera_tl.steering import BACK, Adaptive, Steering, evaluate_many, evaluate_reach

BEGINNING = "this is not a film : one two three four five six . "


def task_that_begins_alike():
    task = make_task(12, options=("blue bird", "tree"))
    examples = [replace(e, prompt=BEGINNING + e.prompt) for e in task.examples]
    return replace(task, examples=tuple(examples))


def columns_run(model, work):
    """Count the (row, column) pairs that the last layer is given."""
    seen, name = [], f"blocks.{model.n_layers - 1}.hook_resid_post"
    point = model.hooked.hook_dict[name]
    real = type(point).__call__

    def counted(self, resid, *rest):
        if self is point:
            seen.append(resid[..., 0].numel())
        return real(self, resid, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(point), "__call__", counted)
        found = work()
    return found, sum(seen)


def check(model, monkeypatch):
    task, probe = task_that_begins_alike(), random_probe(model)
    rule = Adaptive(0.0)
    some = [Steering(probe, rule=rule, positions=where) for where in ("last", "generated", "all")]

    def work():
        read = [ReadSettings(readout, batch_tokens=300) for readout in ("options", "exact")]
        runs = [evaluate(model, task, s.fwd_hooks(), settings=r) for s in some for r in read]
        collected = [collect(model, task, settings=r) for r in read]
        runs += evaluate_many(model, task, some[:2], settings=read[0])
        return [*runs, *(each.outcomes for each in collected)], collected

    (once, activations), n_once = columns_run(model, work)
    monkeypatch.setattr(prefix, "MIN_TOKENS", 1000)
    (anew, plain), n_anew = columns_run(model, work)
    for one, other in zip(once, anew, strict=True):
        assert torch.equal(one.predictions, other.predictions)
        assert torch.equal(one.n_steered, other.n_steered)
        assert (one.probs - other.probs).abs().max() < 1e-5
    for one, other in zip(activations, plain, strict=True):
        assert (one.resid("last") - other.resid("last")).abs().max() < 1e-4
    return n_once, n_anew


def test_what_is_seen_of_a_steering_counts_a_shared_beginning(models, monkeypatch):
    model, task = models["llama"], task_that_begins_alike()
    probe = random_probe(model)
    by_answer = torch.stack([probe.weights, -probe.weights.roll(1, 1)])
    one = Steering(probe, rule=Adaptive(0.0), positions="last")
    some = (one, replace(one, direction=by_answer), replace(one, positions="all"))
    read = [ReadSettings(readout, batch_tokens=300) for readout in ("options", "exact")]

    def work():
        told = [(each.fwd_hooks(), {"settings": r, "title": ""}) for each in some for r in read]
        return [evaluate_reach(model, task, hooks, **rest)[1] for hooks, rest in told]

    once, n_once = columns_run(model, work)
    monkeypatch.setattr(prefix, "MIN_TOKENS", 1000)
    anew, n_anew = columns_run(model, work)
    for one, other in zip(once, anew, strict=True):
        assert torch.equal(one.tokens, other.tokens) and one.tokens[:, :BACK].any()
        assert torch.equal(one.moved, other.moved) and one.moved.any()
        for name in ("before", "after", "length"):
            assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-3), name
    assert n_once < 0.9 * n_anew


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_shared_beginning_is_run_once_and_changes_no_number(family, models, monkeypatch):
    n_once, n_anew = check(models[family], monkeypatch)
    assert n_once < 0.8 * n_anew


def test_so_it_is_in_the_engine_of_transformers(checkpoints, monkeypatch):
    model = load_model(str(checkpoints["llama"]), device="cpu", engine="hugging_face")
    n_once, n_anew = check(model, monkeypatch)
    assert n_once < 0.8 * n_anew


def test_a_window_counts_columns_so_nothing_is_shared_that_exceeds_it(models, monkeypatch):
    model = models["gemma2"]
    window = model.hooked.cfg.window_size
    assert model.allows_gaps(window) and not model.allows_gaps(window + 1)
    n_once, n_anew = check(model, monkeypatch)
    assert n_once == n_anew
