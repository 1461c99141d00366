"""Outcomes, and what is computed from them: checked by hand and against brute force."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_outcomes

from mera_tl.inference import Outcomes, accuracy_interval, paired_p_value, spi, spi_interval


def outcomes(labels, predictions, n_options=3):
    labels, predictions = torch.tensor(labels), torch.tensor(predictions)
    probs = torch.full((len(labels), n_options), 0.1)
    for i, p in enumerate(predictions):
        probs[i] = 0.0 if p < 0 else probs[i]
        if p >= 0:
            probs[i, p] = 0.8
    return make_outcomes("abc"[:n_options], labels, predictions, probs)


def test_scores_weigh_options_by_how_often_they_are_true_and_no_answer_is_none_of_them():
    # Of three a two are found, of three said to be a two are; of two b one, of one said one.
    scores = outcomes([0, 0, 0, 1, 1], [0, 0, -1, 1, 0]).weighted_scores()
    precision, recall = (3 * 2 / 3 + 2 * 1) / 5, (3 * 2 / 3 + 2 * 1 / 2) / 5
    assert scores == pytest.approx({"precision": precision, "recall": recall, "f1": 2 / 3})


def test_transitions_and_gains():
    base = outcomes([0, 0, 1, 1], [0, 1, 1, -1])
    after = outcomes([0, 0, 1, 1], [1, 0, 1, 1])
    assert after.transitions(base) == {"0->0": 0, "0->1": 2, "1->0": 1, "1->1": 1}
    assert after.gain(base).tolist() == [-1, 1, 0, 1]
    assert after.gain(base, "error")[3].item() == pytest.approx(0.8)
    with pytest.raises(ValueError, match="different rows"):
        after.gain(base.subset(torch.tensor([0])))
    for other in (outcomes([1, 0, 1, 1], [0, 1, 1, -1]), replace(base, options=("b", "a", "c"))):
        with pytest.raises(ValueError, match="different rows or answers"):
            after.gain(other)  # of another task, with rows of the same numbers


def test_spi_is_the_share_of_what_could_be_won_or_lost():
    assert spi(0.9, 0.8) == pytest.approx(0.5)
    assert spi(0.6, 0.8) == pytest.approx(-0.25)
    assert spi(0.8, 0.8) == 0
    assert spi(1.0, 0.0) == 1
    assert spi(0.0, 1.0) == -1


def test_the_interval_of_accuracy_and_the_paired_test_agree_with_brute_force():
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
    assert paired_p_value(base, base) == 1


def test_outcomes_survive_a_file():
    run = outcomes([0, 2, 1], [0, -1, 1])
    records = run.to_records()
    older = [{"peak" if k == "max_score" else k: v for k, v in each.items()} for each in records]
    for again in (Outcomes.from_records(rows, run.options) for rows in (records, older)):
        for name in ("rows", "labels", "predictions", "probs", "max_score", "n_steered", "shift"):
            assert torch.equal(getattr(again, name), getattr(run, name))


def run_of(counts):
    """Runs before and after with so many 0->1, 1->0, 1->1 and 0->0."""
    n = sum(counts)
    before = [1] * counts[0] + [0] * counts[1] + [0] * counts[2] + [1] * counts[3]
    after = [0] * counts[0] + [1] * counts[1] + [0] * counts[2] + [1] * counts[3]
    return outcomes([0] * n, after, 2), outcomes([0] * n, before, 2)


def bootstrap(counts, rng):
    """The interval that does not hold: percentiles of resampled rows."""
    n = sum(counts)
    drawn = rng.multinomial(n, np.array(counts) / n, size=300) / n
    values = [spi(row[0] + row[2], row[1] + row[2]) for row in drawn]
    return np.quantile(values, [0.025, 0.975])


@pytest.mark.parametrize(
    ("base", "recovered", "regressed"),
    [(0.95, 0.9, 0.0), (0.95, 0.5, 0.01), (0.95, 0.0, 0.05), (0.7, 0.5, 0.02), (0.98, 1.0, 0.0)],
)
def test_the_interval_of_spi_covers_the_truth(base, recovered, regressed):
    rng, wrong = np.random.default_rng(0), 1 - base
    shares = [wrong * recovered, base * regressed, base * (1 - regressed), wrong * (1 - recovered)]
    truth = spi(shares[0] + shares[2], base)
    draws = list(map(tuple, rng.multinomial(100, shares, size=400).tolist()))
    known = {counts: spi_interval(*run_of(counts)) for counts in set(draws)}

    def coverage(known):
        hits = [known[d][0] - 1e-9 <= truth <= known[d][1] + 1e-9 for d in draws]
        return sum(hits) / len(hits)

    assert coverage(known) >= 0.94
    if (base, recovered) == (0.95, 0.9):  # control: there the old one fails
        assert coverage({counts: bootstrap(counts, rng) for counts in known}) < 0.9


def test_the_interval_of_spi_narrows_holds_its_estimate_and_stays_within_bounds():
    widths = []
    for n in (1, 4, 16):
        counts = (9 * n, 2 * n, 83 * n, 6 * n)
        low, high = spi_interval(*run_of(counts))
        after, before = run_of(counts)
        assert -1 <= low < spi(after.accuracy, before.accuracy) < high <= 1
        widths.append(high - low)
    assert widths[0] > 1.6 * widths[1] > 2.5 * widths[2]
    for counts in ((0, 0, 30, 0), (0, 0, 0, 30), (30, 0, 0, 0), (0, 30, 0, 0), (0, 0, 15, 15)):
        low, high = spi_interval(*run_of(counts))
        assert -1 <= low <= high <= 1


def test_outcomes_say_little_of_themselves():
    run = outcomes([0, 2, 1], [0, -1, 1])
    assert repr(run) == "Outcomes(3 examples, accuracy .67, 1 unanswered)"
    assert "answers: a 1, b 1, c 0" in run._repr_html_()


def test_replies_go_with_their_examples():
    run = replace(outcomes([0, 2, 1], [0, -1, 1]), replies=("a.", "none", "b"))
    assert run.subset(torch.tensor([2, 0])).replies == ("b", "a.")
    assert run.with_rows(torch.tensor([1]), run.subset(torch.tensor([2]))).replies[1] == "b"
    assert Outcomes.from_records(run.to_records(), run.options).replies == run.replies
    assert outcomes([0], [0]).replies == (None,)


def test_a_comparison_counts_and_draws_every_example():
    base = outcomes([0, 1, 1, 0], [1, 0, 1, 0])
    after = outcomes([0, 1, 1, 0], [1, 1, 0, 0])
    found = after.compare(base)
    assert found.transitions == {"0->0": 1, "0->1": 1, "1->0": 1, "1->1": 1}
    assert "1 recovered, 1 regressed of 4" in repr(found)
    drawn = [x for trace in found.plot().data[1:] for x in trace.customdata]
    assert len(drawn) == 4
    with pytest.raises(ValueError, match="different rows"):
        after.compare(base.subset(torch.tensor([0, 1])))
