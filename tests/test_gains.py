"""The cheap way over a grid of thresholds equals the plain way, and costs what it says."""

from dataclasses import replace

import pytest
import torch
from conftest import random_probe, talking_task

from mera_tl.certificate import Protocol, calibrate, strength_grid, threshold_grid
from mera_tl.inference import ReadSettings, evaluate
from mera_tl.steering import Steering

QUIET = ReadSettings(progress=False)
THRESHOLDS = (0.9, 0.6, 0.5, 0.3, 0.1, 0.01)


@pytest.mark.parametrize("positions", ["all", "last", "generated"])
def test_the_grid_equals_one_plain_run_per_threshold(model, positions):
    task = talking_task(model)
    steering = Steering(random_probe(model), positions=positions)
    base, runs = threshold_grid(model, task, steering, THRESHOLDS, settings=QUIET)
    plain = evaluate(model, task, settings=QUIET)
    assert torch.equal(base.predictions, plain.predictions)
    assert (base.probs - plain.probs).abs().max() < 1e-5
    for threshold, run in zip(THRESHOLDS, runs, strict=True):
        wanted = evaluate(model, task, steering.at(threshold).fwd_hooks(), settings=QUIET)
        assert torch.equal(run.predictions, wanted.predictions)
        assert (run.probs - wanted.probs).abs().max() < 1e-5
        assert torch.equal(run.n_steered, wanted.n_steered)
    shares = [run.steered_share for run in runs]
    assert shares == sorted(shares)  # a lower threshold moves more
    assert shares[-1] > 0


def test_a_grid_after_the_prompt_runs_each_prompt_once(models, monkeypatch):
    from mera_tl.models import Model

    model, widths, real = models["llama"], [], Model.next_token_logits
    task = talking_task(model)

    def counted(self, tokens, mask, cache=None):
        widths.append(tokens.shape)
        return real(self, tokens, mask, cache)

    def prompt_columns():
        found = sum(rows * width for rows, width in widths if width > 1)
        widths.clear()
        return found

    monkeypatch.setattr(Model, "next_token_logits", counted)
    evaluate(model, task, settings=QUIET)
    once = prompt_columns()
    steering = Steering(random_probe(model), positions="last")
    threshold_grid(model, task, steering, THRESHOLDS, settings=QUIET)
    assert prompt_columns() == once
    everywhere = replace(steering, positions="all")
    threshold_grid(model, task, everywhere, THRESHOLDS, settings=QUIET)
    assert prompt_columns() > 2 * once  # control: prompts that are steered are run again


@pytest.mark.parametrize("positions", ["all", "last", "generated"])
def test_strengths_are_steered_one_by_one(models, positions):
    from mera_tl.steering import Additive

    model = models["qwen2"]
    task, steering = talking_task(model), Steering(random_probe(model), positions=positions)
    base, runs = strength_grid(model, task, steering, (0.1, 0.5), settings=QUIET)
    hooks = replace(steering, rule=Additive(0.5)).fwd_hooks()
    wanted = evaluate(model, task, hooks, settings=QUIET)
    assert torch.equal(runs[1].predictions, wanted.predictions)
    assert (runs[1].probs - wanted.probs).abs().max() < 1e-5
    assert torch.equal(runs[1].n_steered, wanted.n_steered)
    assert (base.probs - evaluate(model, task, settings=QUIET).probs).abs().max() < 1e-5
    if positions != "generated":
        assert (runs[0].probs - wanted.probs).abs().max() > 1e-3


def test_only_the_calibration_split_certifies(models):
    model = models["gpt2"]
    task, steering = talking_task(model), Steering(random_probe(model))
    with pytest.raises(ValueError, match="needs the calibration split, got the all split"):
        calibrate(model, task, steering, settings=QUIET)
    split = task.subset(range(20), role="calibration")
    decision = calibrate(model, split, steering, delta=0.1, settings=QUIET)
    assert decision.protocol == Protocol(delta=0.1)
    assert decision.n == 20
    assert decision.base == pytest.approx(evaluate(model, split, settings=QUIET).accuracy)
