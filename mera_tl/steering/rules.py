"""How far to move an activation: a score and a direction in, a shift out.

MERA's rule is the projection onto the half-space where the probe predicts at most `limit`. Where
the probe reads `score = w.h + b` and the movement is along `d`,

    shift(h) = -max(0, w.h + b - limit) * d / (w.d),

after which the score is exactly `limit`. With `d = w` it is the shortest such shift (the paper's
closed form). A shift factors into an *amount*, one number a token, and a *step*, one vector a
layer; hooks compute the second once.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

Amounts = Float[Tensor, "*tokens"]
"""One number a token: its score, or how many steps it moves."""
Vectors = Float[Tensor, "*option d"]
"""One vector a layer, or one for each unsteered answer."""
Norms = Float[Tensor, "*#option"]


class Rule(ABC):
    """How far to move along a direction, given the probe's score.

    Raises:
        ValueError: if a limit is no number, or a strength no finite one.
    """

    def __post_init__(self) -> None:
        for name in ("limit", "strength"):
            value = getattr(self, name, 0.0)
            real = isinstance(value, int | float) and value == value
            if not real or (name == "strength" and math.isinf(value)):
                raise ValueError(f"{name}={value!r} is no number to steer by; pass one, as 0.1.")

    @abstractmethod
    def amount(self, score: Amounts) -> Amounts:
        """Return how many steps each token moves; zero leaves it untouched."""

    def step(self, weights: Vectors, direction: Vectors, resid_norm: Norms) -> Vectors:  # noqa: ARG002
        """Return the shift of amount one, in a layer with this typical residual norm.

        `-d` where the direction sets the length, and the probe only whether, or how often.
        """
        return -direction


@final
@dataclass(frozen=True)
class Adaptive(Rule):
    """MERA: move only where the score exceeds `limit`, and exactly as far as needed.

    `limit` is log-odds of error, no predicted error: `steering.at(threshold)` sets it to
    `logit(threshold)`. Infinity, the default, never moves anything.
    """

    limit: float = math.inf
    """On the score scale: the logit of `threshold`. Infinity never moves anything."""

    def amount(self, score: Amounts) -> Amounts:
        """Return the excess of the score over the limit."""
        return (score - self.limit).clamp(min=0)

    def step(self, weights: Vectors, direction: Vectors, resid_norm: Norms) -> Vectors:  # noqa: ARG002
        """Return `-d / (w.d)`: it lowers the score by one.

        Zero where `w.d` is not positive, which includes an all-zero probe or direction: there no
        finite amount along `d` lowers the score.
        """
        slope = (weights * direction).sum(-1, keepdim=True)
        return torch.where(
            slope > 0, -direction / slope.clamp(min=torch.finfo(slope.dtype).tiny), 0
        )


@final
@dataclass(frozen=True)
class Gated(Rule):
    """Where the score exceeds `limit`, move by a length that the direction itself sets.

    For directions that are differences of means, whose length is that of the error in the data; the
    probe only says whether. It need not fall along the direction. `limit` is as `Adaptive`'s,
    `strength` how many directions to move.
    """

    limit: float = math.inf
    """On the score scale: the logit of `threshold`. Infinity never moves anything."""
    strength: float = 1.0
    """How many directions to move."""

    def amount(self, score: Amounts) -> Amounts:
        """Return the strength where the score exceeds the limit."""
        return torch.where(score > self.limit, self.strength, 0.0)


@final
@dataclass(frozen=True)
class Additive(Rule):
    """Fixed-strength steering: every token, whatever its score.

    `strength` is the length of the shift, as a multiple of the layer's median residual norm.
    """

    strength: float
    """Length of the shift, as a multiple of the layer's median residual norm."""

    def amount(self, score: Amounts) -> Amounts:
        """Return the strength for every token."""
        return torch.full_like(score, self.strength)

    def step(self, weights: Vectors, direction: Vectors, resid_norm: Norms) -> Vectors:  # noqa: ARG002
        """Return `-resid_norm * d / ||d||`; zero for a zero direction."""
        norm = direction.norm(dim=-1, keepdim=True)
        unit = direction / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        return torch.where(norm > 0, -resid_norm[..., None] * unit, 0.0)


@final
@dataclass(frozen=True)
class Proportional(Rule):
    """Move every token against the direction as far as its score says, both ways.

    Along `d / (w.d)` it brings every score to zero: concept erasure (LEACE, arXiv 2306.03819) where
    `w` is the least-squares probe of the concept and `d` its pattern. With a score that was learned
    as a strength it is a learned strength (CLAS, arXiv 2604.24693).
    """

    strength: float = 1.0
    """How many directions to move at a score of one."""

    def amount(self, score: Amounts) -> Amounts:
        """Return the score, times the strength."""
        return self.strength * score
