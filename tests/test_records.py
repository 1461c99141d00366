"""What a record says of a method."""

from dataclasses import replace

import torch
from test_race import some_outcomes

from mera_tl.benchmark import idle


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
