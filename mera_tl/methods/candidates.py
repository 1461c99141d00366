"""One way of steering, in words, and what it takes to try it on examples.

A candidate that acts from the final prompt token on shares all that comes before with every other:
each prompt is run once, each candidate costs one token, and only the examples whose score exceeds
its limit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mera_tl.inference.activations import Activations
from mera_tl.inference.answers import ReadSettings
from mera_tl.inference.outcomes import Metric, Outcomes
from mera_tl.methods.foresight import foreseen_gains, log_odds_gradients
from mera_tl.models.model import Model
from mera_tl.probes.fitting import fit_error_probe
from mera_tl.probes.probe import LinearProbe
from mera_tl.sae.probes import fit_latent_probe
from mera_tl.steering.directions import Direction, fit_directions
from mera_tl.steering.hook import Positions
from mera_tl.steering.many import evaluate_many
from mera_tl.steering.rules import Adaptive, Additive, Gated
from mera_tl.steering.spaces import ResidualSpace, SAESpace, Space
from mera_tl.steering.steering import Steering
from mera_tl.steering.unsteered import Passes
from mera_tl.tasks.task import Task

RAW = ResidualSpace()
MEANS = ("contrastive", "controlled_contrastive", "answer_controlled")
"""Directions that are differences of means, and so have a length of their own."""

MIN_ERRORS = 5
"""An answer with fewer wrong or right examples than this has no probe of its own."""


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """Probes and the directions that go with them."""

    probe: LinearProbe
    directions: Mapping[str, Direction]
    generated: LinearProbe | None = None
    """A probe of generated tokens, which reads where these alone are steered."""

    @staticmethod
    def ridge(
        activations: Activations,
        penalty: float,
        kinds: Sequence[str],
        *,
        space: Space = RAW,
        seed: int = 0,
    ) -> "ProbeSet":
        """Fit the probe of MERA's rule and its directions."""
        probe = _fit(activations, space, kind="ridge", penalty=penalty, seed=seed)
        return ProbeSet(probe, fit_directions(features(activations, space), probe, kinds))

    @staticmethod
    def per_answer(
        activations: Activations, kinds: Sequence[str], *, space: Space = RAW, seed: int = 0
    ) -> "ProbeSet":
        """Fit one logistic probe per unsteered answer; where errors are few, that of all examples.

        Directions are along the probe of all.
        """
        pooled = _fit(activations, space, kind="logistic", seed=seed)
        probes = []
        for answer in range(len(activations.outcomes.options)):
            chosen = activations.outcomes.predictions == answer
            part = activations.subset(chosen.nonzero()[:, 0])
            n_of_each = [int((part.correct == right).sum()) for right in (False, True)]
            few = min(n_of_each) < MIN_ERRORS or len(set(part.texts)) < 2 * MIN_ERRORS
            probes.append(pooled if few else _fit(part, space, kind="logistic", seed=seed))
        directions = fit_directions(features(activations, space), pooled, kinds)
        return ProbeSet(LinearProbe.of_answers(pooled, probes), directions)


def _fit(activations: Activations, space: Space, **options: Any) -> LinearProbe:
    if isinstance(space, SAESpace):
        return fit_latent_probe(activations, space, **options)
    return fit_error_probe(activations, **options)


def features(activations: Activations, space: Space) -> Activations:
    """Return activations as a space reads them; zero in the layers where an SAE space has none."""
    if not isinstance(space, SAESpace):
        return activations
    read = {}
    for position in activations.by_position:
        resid = activations.resid(position)  # pyright: ignore[reportArgumentType]
        read[position] = torch.zeros(resid.shape[1], len(resid), space.d_sae)
        for layer in space.layers:
            read[position][:, layer] = space.read(resid[layer], layer)
    return replace(activations, by_position=read)


@dataclass(frozen=True)
class Candidate:
    """One way of steering, in words."""

    direction: str
    penalty: float | None
    """Of the ridge probe; None is one logistic probe per unsteered answer."""
    layers: tuple[int, ...]
    positions: Positions
    threshold: float
    strength: float | None = None
    """None is MERA's rule; a number moves that many directions where the threshold is exceeded, and
    everywhere where it is 0."""
    first_k: int | None = None
    """Generated tokens that may be moved; None is all."""


def candidate_from(plain: Mapping[str, Any]) -> Candidate:
    """Return a candidate from its plain values, as JSON keeps them."""
    return Candidate(**{**plain, "layers": tuple(plain["layers"])})


def steering_of(
    candidate: Candidate, probe: LinearProbe, direction: Tensor | None, space: Space = RAW
) -> Steering:
    """Return a candidate's steering, at its threshold; at 0, one that asks no probe."""
    where = (candidate.layers, candidate.positions, candidate.first_k)
    if candidate.threshold == 0:
        assert direction is not None and candidate.strength is not None
        (layer,) = candidate.layers  # a length in residual norms is one layer's
        length = direction[layer].norm() / probe.resid_norm[layer].clamp(min=1e-12)
        rule = Additive(candidate.strength * float(length))
        return Steering(probe, direction, rule, space, *where)
    rule = Adaptive() if candidate.strength is None else Gated(strength=candidate.strength)
    return Steering(probe, direction, rule, space, *where).at(candidate.threshold)


@dataclass(frozen=True, eq=False)
class SearchData:
    """Where candidates are tried: examples, and what the model answers to them unsteered."""

    model: Model
    task: Task[Any]
    activations: Activations
    """Of the task, unsteered."""
    probe_sets: Mapping[float | None, ProbeSet]
    """By the penalty of candidates."""
    metric: Metric
    settings: ReadSettings
    space: Space = RAW
    known: Mapping[Candidate, Steering] = field(default_factory=dict)
    """Steerings of candidates that are made of no probe set."""
    passes: Passes | None = None
    """Unsteered passes that are shared with others who try candidates on the same examples."""

    def steering(self, candidate: Candidate) -> Steering:
        """Return a candidate's steering."""
        if candidate in self.known:
            return self.known[candidate]
        probes = self.probe_sets[candidate.penalty]
        direction = probes.directions[candidate.direction].vectors
        own = probes.generated if candidate.positions == "generated" else None
        return steering_of(candidate, own or probes.probe, direction, self.space)

    @property
    def base(self) -> Outcomes:
        """What the model answers unsteered."""
        return self.activations.outcomes

    def gains(
        self, candidates: Sequence[Candidate], places: Sequence[int]
    ) -> Float[Tensor, "candidate example"]:
        """Try candidates: return paired gains at these places, NaN elsewhere."""
        gains = torch.full((len(candidates), len(self.task)), torch.nan, dtype=torch.double)
        steerings = [self.steering(each) for each in candidates]
        base, task = self.base.subset(torch.tensor(places)), self.task.subset(places)
        told: dict[str, Any] = {"settings": self.settings, "passes": self.passes}
        told["decide"] = self.metric == "correct"
        runs = evaluate_many(self.model, task, steerings, **told)
        gains[:, places] = torch.stack([run.gain(base, self.metric) for run in runs])
        return gains

    def promise(
        self, candidates: Sequence[Candidate], places: Sequence[int]
    ) -> dict[Candidate, float]:
        """Return the mean gain at these places that each candidate would have to first order."""
        some = self.activations.subset(torch.tensor(places))
        resid, task = some.resid("last").float(), self.task.subset(places)
        slopes = log_odds_gradients(self.model, task, resid, self.settings)
        steerings = [self.steering(each) for each in candidates]
        gains = foreseen_gains(steerings, resid, slopes, some.outcomes, self.metric)
        return dict(zip(candidates, gains.tolist(), strict=True))
