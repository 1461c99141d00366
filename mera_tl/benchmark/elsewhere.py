"""What a steering does to tasks that it was not made for: a few prompts of each, with and without.

A certificate is about one task. A gain there that is paid for elsewhere shows here, as far as a few
prompts can tell: 30 notice a loss of every fifth right reply, and not one of every fiftieth.
"""

from typing import Any

import torch

from mera_tl.inference.outcomes import Outcomes
from mera_tl.tasks.task import Task

N_PROMPTS = 30


def some_prompts(task: Task[Any], seed: int) -> Task[Any]:
    """Return 30 examples of a task, or all, drawn by seed."""
    order = torch.randperm(len(task), generator=torch.Generator().manual_seed(seed))
    return task.subset(sorted(order[:N_PROMPTS].tolist()))


def paired_change(after: Outcomes, before: Outcomes) -> dict[str, Any]:
    """Return how many of some examples are right before and after, and which way they went."""
    moved = after.transitions(before)
    return {
        "n": len(after),
        "before": before.accuracy,
        "after": after.accuracy,
        "better": moved["0->1"],
        "worse": moved["1->0"],
    }
