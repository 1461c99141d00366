"""Outcomes, and what is computed from them: checked against scikit-learn and brute force."""

import pytest
import torch

from mera_tl.inference import Outcomes, accuracy_interval, paired_p_value, spi, spi_interval


def outcomes(labels, predictions, n_options=3):
    labels, predictions = torch.tensor(labels), torch.tensor(predictions)
    probs = torch.full((len(labels), n_options), 0.1)
    for i, p in enumerate(predictions):
        probs[i] = 0.0 if p < 0 else probs[i]
        if p >= 0:
            probs[i, p] = 0.8
    zeros = torch.zeros(len(labels), dtype=torch.long)
    rows = torch.arange(len(labels))
    peak = torch.full((len(labels),), -torch.inf)
    options = tuple("abc"[:n_options])
    return Outcomes(options, rows, labels, predictions, probs, *[zeros] * 4, zeros.float(), peak)


def test_weighted_scores_agree_with_scikit_learn():
    from sklearn.metrics import precision_recall_fscore_support

    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (80,), generator=generator).tolist()
    predictions = torch.randint(-1, 3, (80,), generator=generator).tolist()
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predictions, labels=[0, 1, 2], average="weighted", zero_division=0
    )
    scores = outcomes(labels, predictions).weighted_scores()
    assert scores == pytest.approx({"precision": precision, "recall": recall, "f1": f1})


def test_transitions_and_gains():
    base = outcomes([0, 0, 1, 1], [0, 1, 1, -1])
    after = outcomes([0, 0, 1, 1], [1, 0, 1, 1])
    assert after.transitions(base) == {"0->0": 0, "0->1": 2, "1->0": 1, "1->1": 1}
    assert after.gain(base).tolist() == [-1, 1, 0, 1]
    assert after.gain(base, "error")[3].item() == pytest.approx(0.8)
    with pytest.raises(ValueError, match="different rows"):
        after.gain(base.subset(torch.tensor([0])))


def test_spi_is_the_share_of_what_could_be_won_or_lost():
    assert spi(0.9, 0.8) == pytest.approx(0.5)
    assert spi(0.6, 0.8) == pytest.approx(-0.25)
    assert spi(0.8, 0.8) == 0
    assert spi(1.0, 0.0) == 1
    assert spi(0.0, 1.0) == -1


def test_intervals_and_paired_test_agree_with_brute_force():
    from math import comb

    base = outcomes([0] * 40, [0] * 25 + [1] * 15, 2)
    after = outcomes([0] * 40, [0] * 23 + [1] * 2 + [0] * 9 + [1] * 6, 2)
    assert after.transitions(base) == {"0->0": 6, "0->1": 9, "1->0": 2, "1->1": 23}
    tail = sum(comb(11, k) for k in (0, 1, 2, 9, 10, 11)) / 2**11
    assert paired_p_value(after, base) == pytest.approx(tail)
    low, high = accuracy_interval(after)
    beyond = sum(comb(40, k) * low**k * (1 - low) ** (40 - k) for k in range(32, 41))
    assert beyond == pytest.approx(0.025)
    assert low < after.accuracy < high
    generator, draws = torch.Generator().manual_seed(1), []
    for _ in range(2000):
        rows = torch.randint(0, 40, (40,), generator=generator)
        hits = [run.correct[rows].double().mean().item() for run in (after, base)]
        draws.append(spi(*hits))
    wanted = torch.tensor(draws).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert spi_interval(after, base) == pytest.approx(wanted, abs=0.04)
    assert paired_p_value(base, base) == 1


def test_outcomes_survive_a_file():
    run = outcomes([0, 2, 1], [0, -1, 1])
    again = Outcomes.from_records(run.to_records(), run.options)
    for name in ("rows", "labels", "predictions", "probs", "peak", "n_steered", "shift"):
        assert torch.equal(getattr(again, name), getattr(run, name))
