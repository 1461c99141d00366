"""The classifier that every steering is compared with: it learns classes, and those only."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_outcomes, make_task
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_methods import run_of

from mera_tl.inference import Activations
from mera_tl.methods import METHODS, ClassProbe, fit_class_probe, fit_classes

OPTIONS = ("a", "b", "c")


def planted(n=240, seed=0):
    """Layer 1 of three holds the class; the model's own answers are half wrong."""
    task = make_task(n, seed=seed, options=OPTIONS)
    g = torch.Generator().manual_seed(seed)
    labels = torch.tensor(task.labels)
    resid = torch.randn(n, 3, 16, generator=g)
    resid[:, 1] += 3 * torch.eye(3, 16)[labels] + 5
    predictions = torch.where(torch.rand(n, generator=g) < 0.5, labels, (labels + 1) % 3)
    probs = torch.nn.functional.one_hot(predictions, 3).float()
    outcomes = make_outcomes(OPTIONS, labels, predictions, probs)
    return replace(task, role="train"), Activations({"last": resid}, outcomes)


def test_it_finds_the_layer_and_answers_better_than_the_model():
    task, activations = planted()
    probe = fit_class_probe(task, activations)
    fresh = planted(seed=1)[1]
    assert probe.layer == 1 and probe.accuracy[1] > 0.9 and max(probe.accuracy[::2]) < 0.5
    answered = probe.answer(fresh)
    assert answered.accuracy > 0.9 and fresh.outcomes.accuracy < 0.6
    assert torch.allclose(answered.probs.sum(-1), torch.ones(len(answered)))
    order = torch.randperm(240, generator=torch.Generator().manual_seed(2))
    lied = replace(activations.outcomes, labels=activations.labels[order])
    assert max(fit_class_probe(task, replace(activations, outcomes=lied)).accuracy) < 0.5


def test_one_text_is_never_in_two_folds():
    task, activations = planted(60)
    noise = torch.randn(60, 3, 400, generator=torch.Generator().manual_seed(3))
    twice = activations.subset(torch.arange(60).repeat(2))
    twice = replace(twice, by_position={"last": noise.repeat(2, 1, 1)})
    copies = tuple(replace(e, row=e.row + 60) for e in task.examples)
    repeated = replace(task, examples=task.examples + copies)
    assert max(fit_class_probe(repeated, twice).accuracy) < 0.6  # noise known by heart scores 1
    strangers = tuple(replace(e, prompt=f"{e.prompt} {e.row}") for e in repeated.examples)
    assert max(fit_class_probe(replace(task, examples=strangers), twice).accuracy) > 0.6


@pytest.mark.parametrize("n_options", [2, 3])
def test_it_is_scikit_learns_on_standardised_activations(n_options):
    _, activations = planted()
    x, y = activations.resid("last")[1], activations.labels % n_options
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    wanted = oracle.fit(x.double().numpy(), y.numpy()).predict_proba(x.double().numpy())
    probs = fit_classes(x, y.numpy(), n_options, 10.0).probs(x)
    assert np.abs(probs.numpy() - wanted).max() < 1e-3


def test_an_option_that_never_occurred_is_never_answered(tmp_path):
    task, activations = planted()
    seen = (activations.labels != 2).nonzero()[:, 0]
    probe = fit_class_probe(task.subset(seen.tolist()), activations.subset(seen))
    probs = probe.probs(activations.resid("last")[1])
    assert probs[:, 2].max() < 1e-6 and set(probs.argmax(-1).tolist()) == {0, 1}
    only = fit_classes(activations.resid("last")[1], np.ones(240, dtype=int), 3)
    assert set(only.probs(activations.resid("last")[1]).argmax(-1).tolist()) == {1}
    probe.save(tmp_path)
    again = ClassProbe.load(tmp_path)
    assert torch.equal(again.probs(activations.resid("last")[1]), probs)
    assert (again.layers, again.accuracy) == (probe.layers, probe.accuracy)


def test_as_a_method_it_is_certified_by_paired_outcomes_and_steers_nothing(tmp_path):
    run = run_of(tmp_path)
    first = METHODS["class_probe"].treat(run)
    assert first.calibration is not None and not first.calibration.abstained
    assert len(first.calibration.evidence) == 1
    test = run.splits.test.subset(range(80))
    answered = first.apply(run, test)
    assert answered.accuracy > 0.93 and int(answered.n_steered.sum()) == 0
    again = METHODS["class_probe"].treat(run_of(tmp_path))
    assert torch.equal(again.apply(run, test).probs, answered.probs)
    harder = METHODS["class_probe"].treat(run_of(tmp_path / "harder", min_gain=0.9))
    assert harder.calibration.abstained and harder.classifier is None
    assert harder.apply(run, test).accuracy < 0.85
