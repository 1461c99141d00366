"""Laws of evaluating many steerings at once: each as if alone; rows that do not move are free."""

from dataclasses import replace

import pytest
import torch
from conftest import make_task, random_probe, talking_task

from mera_tl.inference import ReadSettings, evaluate
from mera_tl.models import load_model
from mera_tl.probes import LinearProbe
from mera_tl.steering import Adaptive, Additive, Gated, Steering, evaluate_many

QUIET = ReadSettings(progress=False)
COUNTS = ("n_steered", "n_steerable", "n_tokens", "n_layers")


def many(model):
    """Every rule, scope, set of layers; directions and probes per answer."""
    probe, other = random_probe(model), random_probe(model, seed=1)
    directions = torch.stack([0.5 * probe.weights, -2 * other.weights])
    told = LinearProbe.of_answers(probe, (probe, other))
    mera = Steering(probe, positions="last")
    found = {f"mera at {limit}": replace(mera, rule=Adaptive(limit)) for limit in (-0.5, 0.3, 2.5)}
    found |= {
        f"{positions}, layers {layers}": Steering(
            other, rule=Adaptive(0.2), layers=layers, positions=positions
        )
        for positions in ("last", "final", "generated", "all")
        for layers in ((2,), (0, 1))
    }
    found |= {
        "direction per answer": Steering(
            probe, directions, layers=(1,), positions="last", rule=Adaptive(-0.5)
        ),
        "gate, probe per answer": Steering(
            told, directions, layers=(1, 2), positions="last", rule=Gated(-0.5, 1.5)
        ),
        "probe per answer, whole prompt": Steering(told, rule=Gated(0.5, 0.5)),
        "fixed": Steering(other, layers=(1,), positions="last", rule=Additive(0.3)),
        "fixed, all": Steering(probe, layers=(0,), rule=Additive(0.1)),
        "nothing": Steering(probe, positions="last"),
    }
    return found


def assert_same(cheap, whole, name, tolerance=1e-5):
    assert torch.equal(cheap.predictions, whole.predictions), name
    assert (cheap.probs - whole.probs).abs().max() < tolerance, name
    for count in COUNTS:
        assert torch.equal(getattr(cheap, count), getattr(whole, count)), (name, count)
    assert (cheap.shift - whole.shift).abs().max() < 1e-3, name
    finite = whole.peak > -torch.inf
    assert torch.equal(finite, cheap.peak > -torch.inf), name
    assert torch.allclose(cheap.peak[finite], whole.peak[finite], atol=1e-4), name


def hooks_of(steering):
    return steering.reading_hooks() if steering.limit == float("inf") else steering.fwd_hooks()


@pytest.mark.parametrize("readout", ["options", "last", "exact"])
def test_each_of_many_equals_itself_alone(model, readout):
    check_each(model, readout)


def test_each_equals_itself_under_the_other_engine(checkpoints):
    check_each(load_model(str(checkpoints["gemma2"]), device="cpu", engine="hugging_face"), "exact")


def check_each(model, readout):
    words = ("very good film", "blue bird")
    task = make_task(14, options=words) if readout == "options" else talking_task(model, 14)
    settings = replace(QUIET, readout=readout, batch_tokens=140)
    steerings = many(model)
    roomy = replace(settings, batch_tokens=2048)
    plain = evaluate(model, task, settings=roomy)
    outcomes = evaluate_many(model, task, list(steerings.values()), settings=settings)
    moved = 0
    for (name, steering), cheap in zip(steerings.items(), outcomes, strict=True):
        whole = evaluate(model, task, hooks_of(steering), settings=roomy)
        assert_same(cheap, whole, name)
        moved += int((whole.probs - plain.probs).abs().max() > 1e-3)
    assert moved >= 9  # most of them do something
