"""The laws of directions, on activations whose error direction is planted."""

import logging
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import make_outcomes

from mera_tl.steering import (
    KINDS,
    Adaptive,
    Statistics,
    answer_controlled,
    contrastive,
    controlled_contrastive,
    controlled_pattern,
    direction,
    euclidean,
    fit_direction,
    fit_directions,
    pattern,
)

D = 24
CONTROLLED = (controlled_pattern, controlled_contrastive)
PLAIN = (pattern, contrastive)


@dataclass
class Planted:
    """Two layers of activations: class, error and noise in known directions."""

    h: torch.Tensor
    labels: torch.Tensor
    predictions: torch.Tensor
    error_direction: torch.Tensor
    class_direction: torch.Tensor

    @property
    def wrong(self):
        return self.labels != self.predictions

    def weights(self, penalty: float = 1e-3):
        """A ridge probe of wrongness, per layer, on double precision."""
        y = self.wrong.double() - self.wrong.double().mean()
        rows = []
        for h in self.h.double():
            x = h - h.mean(0)
            s = x.T @ x / len(x)
            rows.append(torch.linalg.solve(s + penalty * torch.eye(D), x.T @ y / len(x)))
        return torch.stack(rows)

    def statistics(self, weights=None):
        weights = self.weights() if weights is None else weights
        k = int(self.labels.max()) + 1
        return Statistics.of(self.h, self.labels, self.predictions, weights, n_options=k)

    def pick(self, index):
        return replace(
            self,
            h=self.h[:, index],
            labels=self.labels[index],
            predictions=self.predictions[index],
        )


def one_sided(n=6000, seed=0) -> Planted:
    """Class 1 is mostly taken for class 0, class 0 seldom for class 1."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (n,), generator=g)
    p_wrong = torch.where(labels == 1, 0.7, 0.1)
    wrong = torch.rand(n, generator=g) < p_wrong
    u, a = torch.linalg.qr(torch.randn(D, 2, generator=g)).Q.T
    noise = 0.5 * torch.randn(2, n, D, generator=g)
    h = wrong[:, None] * u + 2.0 * labels[:, None] * a + noise + 3.0
    return Planted(h, labels, torch.where(wrong, 1 - labels, labels), u, a)


def two_sided(n=6000, k=3, seed=0) -> Planted:
    """A hint pulls to its option, in one direction per option that sum to zero."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, k, (n,), generator=g)
    hinted = torch.randint(0, k, (n,), generator=g)
    q = torch.linalg.qr(torch.randn(D, 2 * k, generator=g)).Q.T
    hints = q[:k] - q[:k].mean(0)
    wrong = hinted != labels
    noise = 0.3 * torch.randn(2, n, D, generator=g)
    h = wrong[:, None] * hints[hinted] + 2.0 * q[k:][labels] + noise
    return Planted(h, labels, hinted, hints, q[k:])


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


# --- what they find -----------------------------------------------------------------------------


def test_controlled_directions_find_the_error_and_plain_ones_the_class():
    planted = one_sided()
    s = planted.statistics()
    for formula in CONTROLLED:
        assert (cosine(formula(s), planted.error_direction) > 0.95).all(), formula
        assert (cosine(formula(s), planted.class_direction).abs() < 0.3).all(), formula
    for formula in PLAIN:  # the trap is there: without control the class leaks in
        assert (cosine(formula(s), planted.error_direction) < 0.8).all(), formula
        assert (cosine(formula(s), planted.class_direction) > 0.6).all(), formula


def test_shuffled_classes_control_nothing():
    planted = one_sided()
    shuffled = planted.labels[torch.randperm(6000, generator=torch.Generator().manual_seed(1))]
    wrong = planted.wrong
    lied = replace(planted, labels=shuffled, predictions=torch.where(wrong, 1 - shuffled, shuffled))
    s = lied.statistics(planted.weights())
    for formula in CONTROLLED:
        assert (cosine(formula(s), planted.error_direction) < 0.8).all()


def test_two_sided_errors_need_one_direction_per_answer():
    planted = two_sided()
    s = planted.statistics()
    per_answer = answer_controlled(s)
    assert per_answer.shape == (3, 2, D)
    for answer in range(3):
        found = cosine(per_answer[answer], planted.error_direction[answer])
        assert (found > 0.95).all()
        alone = cosine(controlled_contrastive(s), planted.error_direction[answer])
        assert (alone < 0.8).all()
    # "less yes" and "less no" cancel in any single direction
    assert (controlled_contrastive(s).norm(dim=-1) < 0.2 * per_answer.norm(dim=-1)).all()


def test_with_one_answer_always_given_it_is_the_controlled_contrast():
    planted = one_sided()
    always_0 = replace(planted, predictions=torch.where(planted.wrong, 0, planted.labels))
    always_0 = always_0.pick((always_0.labels == 1).nonzero()[:, 0])
    s = always_0.statistics(planted.weights())
    torch.testing.assert_close(answer_controlled(s)[0], controlled_contrastive(s))


# --- the algebra --------------------------------------------------------------------------------


def test_patterns_are_covariances_times_the_probe():
    planted = one_sided(n=400)
    w = planted.weights()
    s = planted.statistics(w)
    for layer, h in enumerate(planted.h.double()):
        x = h - h.mean(0)
        torch.testing.assert_close(pattern(s)[layer], x.T @ x @ w[layer] / len(h))
        means = torch.stack([h[planted.labels == c].mean(0) for c in (0, 1)])
        x = h - means[planted.labels]
        torch.testing.assert_close(controlled_pattern(s)[layer], x.T @ x @ w[layer] / len(h))
    assert torch.equal(euclidean(s), w)


def test_the_pattern_is_the_shortest_shift_in_the_metric_of_the_data():
    planted = one_sided(n=400)
    w, s = planted.weights(), planted.statistics()
    h = planted.h[0].double()
    inverse = torch.linalg.inv(torch.cov(h.T, correction=0))

    def shift(d):  # lowers the score by exactly one
        return -d / (w[0] @ d)

    def length(step):
        return (step @ inverse @ step).sqrt()

    best = shift(pattern(s)[0])
    g = torch.Generator().manual_seed(3)
    for other in torch.randn(50, D, generator=g).double():
        sideways = other - (other @ w[0]) / (w[0] @ w[0]) * w[0]
        assert length(best) < length(best + 0.1 * sideways)
    assert length(best) < length(shift(w[0]))  # along the probe is longer, though shorter naively
    assert best.norm() > shift(w[0]).norm()


def test_a_contrast_is_controlled_already_where_classes_are_balanced():
    planted = one_sided()
    groups = [
        ((planted.labels == c) & (planted.wrong == wrong)).nonzero()[:, 0]
        for c in (0, 1)
        for wrong in (False, True)
    ]
    least = min(map(len, groups))
    balanced = planted.pick(torch.cat([group[:least] for group in groups]))
    s = balanced.statistics(planted.weights())
    torch.testing.assert_close(contrastive(s), controlled_contrastive(s))
    uneven = planted.statistics()
    assert (cosine(contrastive(uneven), controlled_contrastive(uneven)) < 0.8).all()


def test_how_often_a_class_occurs_does_not_turn_controlled_directions():
    planted = one_sided()
    s = planted.statistics()
    of_class_1 = (planted.labels == 1).nonzero()[:, 0]
    more = planted.pick(torch.cat([torch.arange(6000), *[of_class_1] * 9]))
    s_more = more.statistics(planted.weights())
    for formula in CONTROLLED:
        assert (cosine(formula(s), formula(s_more)) > 0.99).all()
    assert (cosine(contrastive(s), contrastive(s_more)) < 0.98).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rescaled_features_rescale_the_direction(kind):
    """With h -> A h and w -> A^-T w, scores are unchanged and d -> A d: the same shift."""
    planted = two_sided(n=600)
    w = planted.weights(0.1)
    g = torch.Generator().manual_seed(5)
    mixing = torch.eye(D).double() + 0.3 * torch.randn(D, D, generator=g).double()
    moved = replace(planted, h=planted.h.double() @ mixing.T + 7.0)
    before = direction(planted.statistics(w), kind).vectors
    after = direction(moved.statistics(w @ torch.linalg.inv(mixing)), kind).vectors
    expected = before @ mixing.float().T
    assert before.norm() > 0
    if kind == "euclidean":  # the one that depends on the units of the features
        assert cosine(after, expected).max() < 0.95
    else:
        torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4)


# --- streams and special cases ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_batches_add_up(kind):
    planted = two_sided(n=500)
    w = planted.weights()
    parts = [planted.pick(part).statistics(w) for part in torch.arange(500).split(77)]
    streamed = sum(parts[1:], parts[0])
    whole = direction(planted.statistics(w), kind).vectors
    torch.testing.assert_close(direction(streamed, kind).vectors, whole)


class Readings:
    def __init__(self, planted, answered=None):
        n, k = len(planted.labels), int(planted.labels.max()) + 1
        predictions = planted.predictions
        if answered is not None:
            predictions = torch.where(answered, predictions, -1)
        self.h, probs = planted.h, torch.full((n, k), 1 / k)
        self.outcomes = make_outcomes("abcd"[:k], planted.labels, predictions, probs)

    def resid(self, position):
        return self.h


@dataclass
class Probe:
    weights: torch.Tensor
    position: str = "last"


def test_directions_of_activations_are_those_of_the_statistics():
    planted = two_sided(n=600)
    w = planted.weights().float()
    found = fit_directions(Readings(planted), Probe(w))
    for kind in KINDS:
        expected = direction(planted.statistics(w.double()), kind)
        torch.testing.assert_close(found[kind].vectors, expected.vectors)
        assert found[kind].vectors.dtype == torch.float32


def test_unanswered_examples_are_wrong_at_last_and_absent_at_exact():
    planted = one_sided(n=600)
    answered = torch.arange(600) % 4 > 0
    readings = Readings(planted, answered)
    w = planted.weights().float()
    at_last = fit_direction(readings, Probe(w), "controlled_contrastive").vectors
    at_exact = fit_direction(readings, Probe(w, "exact"), "controlled_contrastive").vectors
    kept = planted.pick(answered.nonzero()[:, 0])
    torch.testing.assert_close(
        at_exact, direction(kept.statistics(w.double()), "controlled_contrastive").vectors
    )
    wrong = replace(planted, predictions=torch.where(answered, planted.predictions, -1))
    torch.testing.assert_close(
        at_last, direction(wrong.statistics(w.double()), "controlled_contrastive").vectors
    )
    assert not torch.allclose(at_last, at_exact)


@pytest.mark.parametrize("kind", ["contrastive", "controlled_contrastive", "answer_controlled"])
def test_no_errors_no_direction_and_that_is_said(kind, caplog):
    planted = one_sided(n=200)
    flawless = replace(planted, predictions=planted.labels)
    with caplog.at_level(logging.INFO, logger="mera_tl"):
        found = direction(flawless.statistics(planted.weights()), kind)
    assert torch.equal(found.vectors, torch.zeros_like(found.vectors))
    assert "0 wrong and 200 right" in found.notes[0]
    assert found.notes[0] in caplog.text


def test_a_class_without_errors_weighs_nothing():
    planted = one_sided()
    keep = (planted.labels == 1) | ~planted.wrong
    partly = planted.pick(keep.nonzero()[:, 0])
    found = direction(partly.statistics(planted.weights()), "controlled_contrastive")
    assert "classes [0]" in found.notes[0]
    only = planted.pick((planted.labels == 1).nonzero()[:, 0])
    expected = contrastive(only.statistics(planted.weights()))
    torch.testing.assert_close(found.vectors, expected.float())


def test_a_direction_that_raises_the_score_moves_nothing_and_that_is_said():
    planted = one_sided()
    w = planted.weights()
    s = planted.statistics(torch.stack([w[0], -w[1]]))
    found = direction(s, "contrastive")
    assert found.vectors[0].norm() > 0
    assert "layers [1]" in found.notes[0]
    for layer, moves in ((0, True), (1, False)):
        step = Adaptive(0.0).step(s.weights[layer].float(), found.vectors[layer], torch.tensor(1.0))
        assert bool(step.any()) == moves


@pytest.mark.parametrize("kind", ["euclidean", "pattern", "controlled_pattern"])
def test_a_probe_that_reads_nothing_moves_nothing(kind):
    planted = one_sided(n=200)
    found = direction(planted.statistics(torch.zeros(2, D).double()), kind)
    assert torch.equal(found.vectors, torch.zeros(2, D))


def test_unknown_kind():
    planted = one_sided(n=50)
    with pytest.raises(ValueError, match="no direction 'sideways'; pass one of euclidean"):
        fit_directions(Readings(planted), Probe(planted.weights()), ("sideways",))


def grouped(counts):
    """Sums over examples of known means: `counts[label][answer]` of them at distinct corners."""
    places, labels, predictions = [], [], []
    for label, row in enumerate(counts):
        for answer, n in enumerate(row):
            corner = torch.zeros(4)
            corner[2 * label + answer] = 1.0
            places += [corner] * n
            labels += [label] * n
            predictions += [answer] * n
    h = torch.stack(places)[None]
    parts = torch.tensor(labels), torch.tensor(predictions)
    return Statistics.of(h, *parts, torch.ones(1, 4), n_options=2)


def test_classes_weigh_by_the_variance_of_their_difference():
    found = controlled_contrastive(grouped([[30, 3], [3, 3]]))[0]
    first, second = 3 * 30 / 33, 3 * 3 / 6
    share = first / (first + second)
    wanted = torch.tensor([-share, share, 1 - share, share - 1])
    assert torch.allclose(found.float(), wanted, atol=1e-6)


def test_the_direction_of_an_answer_is_as_long_as_the_difference_of_means():
    found = answer_controlled(grouped([[20, 5], [6, 12]]))
    # Answering 0: from what label 1 looks like when it is answered 1, to what it looks like here.
    assert torch.allclose(found[0, 0].float(), torch.tensor([0.0, 0.0, 1.0, -1.0]), atol=1e-6)
    assert torch.allclose(found[1, 0].float(), torch.tensor([-1.0, 1.0, 0.0, 0.0]), atol=1e-6)
