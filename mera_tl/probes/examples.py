"""What a probe sees: the activations at one position, the error there, and whether it was wrong."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mera_tl.inference.activations import Activations, Position, places_read

logger = logging.getLogger(__name__)

Mixture = Activations | Sequence[Activations]
"""The activations of one task, or of several, which are then mixed."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Activations at one position, the error there, and whether the answer was incorrect."""

    resid: Float[Tensor, "layer example d_model"]
    error: Float[Tensor, " example"]
    """1 - P(true option), in [0, 1]."""
    incorrect: Bool[Tensor, " example"]
    texts: Int[Tensor, " example"] | None = None
    """Numbers of their texts, from 0 in the order in which they come first; None: all differ."""

    def __len__(self) -> int:
        return len(self.error)

    def shuffled(self, seed: int) -> "Examples":
        """Return a control task: the same targets, assigned to other examples at random."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return replace(self, error=self.error[order], incorrect=self.incorrect[order])


def read_examples(activations: Mixture, position: Position) -> Examples:
    """Return what a probe sees: all examples at `last`, elsewhere those that have the position.

    Raises:
        ValueError: if these are not activations, none is left, models are mixed, or an activation
            is not finite.
    """
    parts = as_parts(activations)
    models = {str(part.manifest.get("model_fingerprint")) for part in parts}
    if len(models) > 1:
        raise ValueError(
            f"A probe reads one model, but these activations come from {len(models)} "
            f"(fingerprints {', '.join(sorted(models))}); fit one probe each."
        )
    usable = [places_read(part.outcomes, position) for part in parts]
    n, n_usable = sum(map(len, usable)), sum(int(rows.sum()) for rows in usable)
    if n_usable < n:
        logger.info(
            "%d of %d examples were not answered, or by no token, so they have no %r position and "
            "are left out.",
            n - n_usable,
            n,
            position,
        )
    if n_usable == 0:
        raise ValueError(
            f"None of {n} examples has a {position!r} position; collect examples the model "
            "answers, or use position='last'."
        )
    pairs = list(zip(parts, usable, strict=True))
    names = [
        (number, text)
        for number, (part, rows) in enumerate(pairs)
        for text, is_usable in zip(part.texts, rows.tolist(), strict=True)
        if is_usable
    ]
    number_of = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return Examples(
        torch.cat([part.resid(position)[:, rows] for part, rows in pairs], dim=1),
        torch.cat([part.error[rows] for part, rows in pairs]),
        torch.cat([~part.correct[rows] for part, rows in pairs]),
        torch.tensor([number_of[name] for name in names]),
    )


def as_parts(activations: Any) -> list[Activations]:
    """Return the activations of each task.

    Raises:
        ValueError: saying what was got instead, if these are not activations.
    """
    parts = list(activations) if isinstance(activations, list | tuple) else [activations]
    wrong = [part for part in parts if not isinstance(part, Activations)]
    if wrong or not parts:
        got = type(wrong[0]).__name__ if wrong else "none"
        raise ValueError(
            f"A probe is fitted on activations, but got {got}; pass collect(model, task)."
        )
    return parts
