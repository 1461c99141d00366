"""Laws of the other steering families: what each must do to an activation, and to a model."""

import dataclasses

import pytest
import torch
from conftest import organism
from sklearn.linear_model import LogisticRegression
from test_methods import run_of
from test_race import WIDE, blanked, planted

from mera_tl.certificate import calibrate, load_steering
from mera_tl.inference import evaluate, rows_fitted
from mera_tl.methods import (
    FAMILIES,
    METHODS,
    Choices,
    divide,
    eraser,
    search_family,
    whitened_difference,
)
from mera_tl.steering import ClassSpace, Proportional, TransportSpace, UnitSpace

D = 12
CHOICES = Choices(layers=((2,), (3,)))


def cloud(n=400, seed=0):
    """Activations with a concept along one direction, and much noise along another."""
    g = torch.Generator().manual_seed(seed)
    concept = torch.rand(n, generator=g) < 0.4
    axis, loud = torch.linalg.qr(torch.randn(D, 2, generator=g)).Q.T
    noise = torch.randn(n, generator=g)[:, None] * (3 * loud + 3 * axis)
    h = torch.randn(n, D, generator=g) * 0.5 + noise + 2 * concept[:, None] * axis + 4
    return h, concept, axis, loud


def readable(h, concept):
    return LogisticRegression(C=1e3).fit(h.numpy(), concept.numpy()).score(h, concept)


# --- erasure and whitening ----------------------------------------------------------------------


def leace(h, concept):
    """Belrose et al. (2023), theorem 4.3, by its whitening: the oracle."""
    x = h.double() - h.double().mean(0)
    z = concept.double() - concept.double().mean()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    whiten = vectors @ torch.diag(values**-0.5) @ vectors.T
    u = whiten @ (x.T @ z / len(x))
    project = torch.outer(u, u) / (u @ u)
    return (h.double() - x @ (torch.linalg.inv(whiten) @ project @ whiten).T).float()


def test_erasure_leaves_nothing_to_read_and_is_the_nearest_that_does():
    h, concept, *_ = cloud()
    w, d, b = eraser(h, concept)
    rule = Proportional()
    erased = h + rule.amount(h @ w + b)[:, None] * rule.step(w, d, torch.tensor(1.0))
    majority = float(1 - concept.float().mean())
    assert readable(h, concept) > 0.9  # it was there
    assert readable(erased, concept) <= majority + 0.01
    covariance = (erased - erased.mean(0)).T @ (concept.float() - concept.float().mean()) / len(h)
    assert covariance.abs().max() < 1e-5
    assert torch.allclose(erased, leace(h, concept), atol=1e-3)
    difference = h[concept].mean(0) - h[~concept].mean(0)  # projecting that out erases it, too,
    u = difference / difference.norm()
    projected = h - ((h - h.mean(0)) @ u)[:, None] * u
    assert (erased - h).square().mean() < 0.9 * (projected - h).square().mean()  # but moves more
    assert eraser(h, concept & False)[1].abs().max() == 0


def test_whitening_finds_the_shift_that_changes_least_besides():
    h, concept, *_ = cloud(2000)
    plain = h[concept].mean(0) - h[~concept].mean(0)
    within = torch.cat([h[rows] - h[rows].mean(0) for rows in (concept, ~concept)])
    costs = []
    for d in (whitened_difference(h, concept), plain):
        d = d / (d @ plain)  # moved as far along the difference of means
        costs.append(float((within @ d).square().mean()))
    assert costs[0] < 0.2 * costs[1]
    assert whitened_difference(h, concept | True).abs().max() == 0


# --- spaces -------------------------------------------------------------------------------------


def test_a_rotation_keeps_the_length_and_stays_in_the_plane():
    h, *_ = cloud(30)
    d = torch.nn.functional.normalize(torch.randn(D), dim=-1)
    space = UnitSpace(turns=True)
    for strength in (0.0, 0.5, 3.0):
        after = space.write(h, space.read(h, 0), strength * d.expand_as(h), 0)
        assert torch.allclose(after.norm(dim=-1), h.norm(dim=-1), rtol=1e-5)
        for before, moved in zip(h, after, strict=True):
            plane = torch.linalg.qr(torch.stack([before, d]).T).Q
            assert torch.allclose(plane @ (plane.T @ moved), moved, atol=1e-4)
        assert torch.allclose(after, h, atol=1e-5) == (strength == 0)
    added = UnitSpace().write(h, UnitSpace().read(h, 0), d.expand_as(h), 0)
    assert torch.allclose(added, h + h.norm(dim=-1, keepdim=True) * d, atol=1e-4)


def test_a_full_transport_gives_mean_and_spread_of_the_other_cloud_and_a_half_goes_half_way():
    h, _, *_ = cloud(500)
    other = 3 * torch.randn(500, D) * torch.rand(D) - 2
    start, to = h.mean(0), other.mean(0)
    ratio = other.std(0) / h.std(0)
    space = TransportSpace(start[None], to[None], ratio[None])
    full = space.write(h, h, (to - start).expand_as(h), 0)
    half = space.write(h, h, 0.5 * (to - start).expand_as(h), 0)
    assert torch.allclose(full.mean(0), to, atol=1e-3)
    assert torch.allclose(full.std(0), other.std(0), rtol=1e-3)
    assert torch.allclose(half, (h + full) / 2, atol=1e-4)
    assert torch.allclose(space.write(h, h, 0 * h, 0), h)


def test_a_class_space_reads_log_odds_and_moves_between_means():
    h, *_ = cloud(40)
    weights, means = torch.randn(1, 3, D), torch.randn(1, 3, D)
    space = ClassSpace(weights, torch.zeros(1, 3), means)
    probs = (h @ weights[0].T).softmax(-1)
    features = space.read(h, 0)
    sure = (probs.clamp(1e-5, 1 - 1e-5) == probs).all(-1)
    assert torch.allclose(features[sure], torch.logit(probs[sure]), atol=1e-2)
    for answer in range(3):
        shift = torch.zeros(40, 3)
        shift[:, answer] = -0.5
        moved = space.write(h, features, shift, 0) - h
        wanted = 0.5 * (means[0][probs.argmax(-1)] - means[0][answer])
        assert torch.allclose(moved, wanted, atol=1e-5)


# --- as methods ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_chosen_on_training_data_and_corrects_where_it_can(name):
    splits, activations = planted()
    told = {"choices": CHOICES, "settings": WIDE}
    found = search_family(FAMILIES[name], organism(), splits.train, activations, **told)
    assert found.details["n_search"] == found.table["n"].max() == 120
    fit, _ = divide(splits.train, CHOICES.search_share, CHOICES.seed)
    seen = {splits.train.examples[i].row for i in fit}
    # A certificate must know what it was fitted to, which is no evidence for it.
    assert rows_fitted(found.steering.probe.manifest, splits.train) == seen
    test = splits.test.subset(range(100))
    base = evaluate(organism(), test, settings=WIDE)
    gain = evaluate(organism(), test, found.steering.fwd_hooks(), settings=WIDE).gain(base)
    corrects = {"class_probe_steered", "rotation", "cast_gate", "learned_strength"}
    assert float(gain.mean()) > (0.1 if name in corrects else -0.2), name
    with pytest.raises(ValueError, match="needs the training split"):
        search_family(FAMILIES[name], organism(), splits.test, activations, **told)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("name", ["affine", "class_probe_steered", "cast_gate", "ablation"])
def test_where_all_examples_are_alike_nothing_breaks(name, right):
    """The mean of no example is no number."""
    splits, activations = planted()
    few, base = range(60), activations.outcomes
    labels = base.labels if right else 1 - base.labels
    alike = dataclasses.replace(
        activations, outcomes=dataclasses.replace(base, predictions=labels)
    ).subset(torch.arange(60))
    choices = Choices(layers=((2,),), gate_thresholds=(0.5,))
    found = search_family(
        FAMILIES[name], organism(), splits.train.subset(few), alike, choices=choices, settings=WIDE
    )
    assert found.steering.fwd_hooks()


def test_examples_that_judge_teach_a_family_nothing():
    splits, activations = planted()
    told, found = {"choices": CHOICES, "settings": WIDE}, []
    for seen in blanked(activations, CHOICES):
        taught = search_family(FAMILIES["affine"], organism(), splits.train, seen, **told)
        found.append(taught.steering.space.start)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["class_probe_steered", "rotation", "affine"])
def test_its_own_space_is_saved_with_its_steering(name, tmp_path):
    splits, activations = planted()
    told = {"choices": CHOICES, "settings": WIDE}
    found = search_family(FAMILIES[name], organism(), splits.train, activations, **told)
    calibration = splits.calibration.subset(range(40))
    steering = found.steering.at(0.2)
    decision = calibrate(organism(), calibration, steering, min_gain=-0.99, settings=WIDE)
    loaded = load_steering(decision.save(tmp_path / "steering"), model=organism())
    runs = [
        evaluate(organism(), calibration, steering.fwd_hooks(), settings=WIDE)
        for steering in (steering, loaded)
    ]
    assert torch.equal(runs[0].probs, runs[1].probs) and runs[0].n_steered.sum() > 0


def test_a_family_is_found_again_in_its_run_folder(tmp_path, monkeypatch):
    from mera_tl.methods import methods

    run = run_of(tmp_path)
    first = METHODS["rotation"].treat(run)
    assert first.calibration is not None and not first.calibration.abstained
    monkeypatch.setattr(methods, "search_family", None)  # nothing is searched twice
    again = METHODS["rotation"].treat(run_of(tmp_path))
    assert again.details == first.details and again.calibration == first.calibration
