"""What a record says of a method."""

from dataclasses import replace

import torch
from test_race import some_outcomes

from mera_tl.benchmark import idle, scores, table, unlikely


def test_a_steering_that_moves_no_probability_is_told():
    base = some_outcomes()
    moved = replace(base, n_steered=torch.tensor([2, 0, 1, 0]))
    (sentence,) = idle("additive_probe", moved, base)
    assert "moved 3" in sentence and "does not reach the answers" in sentence
    # Controls: nothing was moved; something came of it.
    assert idle("no_steering", base, base) == ()
    probs = moved.probs.clone()
    probs[0] += torch.tensor([-0.1, 0.1, 0.0])
    assert idle("additive_probe", replace(moved, probs=probs), base) == ()


def test_replies_that_are_hardly_text_are_told():
    base = {"perplexity": 2.4}
    (sentence,) = unlikely("searched", {"perplexity": 6.92}, base)
    assert "6.92, its own 2.4" in sentence and "read some of them" in sentence
    for text in (base, {"perplexity": 4.7}, {"perplexity": float("nan")}, None):
        assert unlikely("searched", text, base) == ()
    assert unlikely("searched", {"perplexity": 6.92}, None) == ()


def test_what_moves_nothing_has_no_share_of_moved_tokens():
    """A zero beside hundreds of corrected answers would be read as: it did nothing."""
    base = some_outcomes()
    moved = replace(base, n_steered=torch.tensor([2, 0, 1, 0]))
    shared = {"model": "m", "task": "t", "space": "raw", "seed": 0, "decision": None}
    records = [
        shared | {"method": method, "threshold": None} | scores(moved, base)
        for method in ("flip", "prompt_steering", "withhold", "additive_probe")
    ]
    assert table(records)["steered"].isna().tolist() == [True, True, True, False]
