"""What is seen of a steering is what it did: same answers, same tokens, the shifts of the rule."""

from dataclasses import replace

import pytest
import torch
from conftest import random_probe, talking_task

from mera_tl.inference import ReadSettings, evaluate
from mera_tl.steering import BACK, Additive, Reach, Steering, evaluate_reach

SETTINGS = ReadSettings("exact_anywhere", batch_size=7, max_new_tokens=4)
LIMIT = 0.4


def steerings(model):
    """One of every scope, fixed or by rule, with one direction or one per answer."""
    probe = random_probe(model, scale=3.0)
    by_answer = torch.stack([probe.weights, -probe.weights.roll(1, 1)])
    one = Steering(probe, layers=(0, 1), positions="last").at(LIMIT)
    return {
        "last": one,
        "all": replace(one, positions="all"),
        "generated": replace(one, positions="generated"),
        "fixed": replace(one, rule=Additive(0.3)),
        "per answer": replace(one, direction=by_answer, rule=Additive(0.3)),
        "per answer, all": replace(one, direction=by_answer, rule=Additive(0.3), positions="all"),
    }


@pytest.fixture(scope="module")
def seen(models):
    model = models["llama"]
    task = talking_task(model)
    return {
        name: (
            evaluate(model, task, steering.fwd_hooks(), settings=SETTINGS),
            *evaluate_reach(model, task, steering.fwd_hooks(), settings=SETTINGS, title="test"),
        )
        for name, steering in steerings(model).items()
    }


NAMES = ("last", "all", "generated", "fixed", "per answer", "per answer, all")


@pytest.mark.parametrize("name", NAMES)
def test_looking_changes_nothing_and_counts_what_was_moved(seen, name):
    plain, outcomes, reach = seen[name]
    assert torch.equal(plain.probs, outcomes.probs)
    assert torch.equal(plain.predictions, outcomes.predictions)
    assert int(reach.moved.sum()) == int(plain.n_steered.sum()) > 0
    assert (reach.moved <= reach.tokens).all()
    assert (reach.length > 0).equal(reach.moved > 0)


def test_only_the_scope_is_moved(seen):
    moved = {name: seen[name][2].moved.sum(0) for name in NAMES}
    assert moved["all"][:BACK].any()
    assert not moved["last"][:BACK].any() and moved["last"][BACK].any()
    assert not moved["generated"][: BACK + 1].any() and moved["generated"].any()
    assert not moved["per answer"][:BACK].any() and moved["per answer"][BACK].any()
    assert moved["per answer, all"][:BACK].any()


def test_every_final_token_is_seen_once(seen):
    for name in NAMES:
        plain, _, reach = seen[name]
        assert (reach.tokens[:, BACK] == len(plain)).all(), name


def test_the_rule_brings_predictions_down_to_the_limit_and_a_fixed_shift_does_not(seen):
    reach = seen["last"][2]
    assert (reach.before > LIMIT).any() and (reach.before < LIMIT).any()
    assert reach.after == pytest.approx(reach.before.clamp(max=LIMIT), abs=1e-4)
    fixed = seen["fixed"][2]
    assert not torch.allclose(fixed.after, fixed.before.clamp(max=LIMIT), atol=0.05)


def test_examples_and_positions_say_what_the_tensors_say(seen, tmp_path):
    reach = seen["all"][2]
    reach.save(tmp_path / "reach.safetensors")
    again = Reach.load(tmp_path / "reach.safetensors")
    assert again.positions().equals(reach.positions())
    assert again.examples(1)["after"].tolist() == reach.after[:, 1].tolist()
    rows = again.positions()
    assert (rows["share"] * rows["n"]).sum() == pytest.approx(int(reach.moved.sum()))
    assert rows["position"].min() < 0 < rows["position"].max()


def test_hooks_that_steer_nothing_are_refused(models):
    model = models["llama"]
    with pytest.raises(ValueError, match="no steering hook"):
        evaluate_reach(model, talking_task(model, 4), [], settings=SETTINGS, title="test")
    twice = 2 * steerings(model)["last"].fwd_hooks()
    with pytest.raises(ValueError, match="of two steerings"):
        evaluate_reach(model, talking_task(model, 4), twice, settings=SETTINGS, title="test")
