"""Steering families of the field, each a short function from training data to candidates.

Other toolkits move activations in other ways than by a probe and a direction. Here each way is a
list of steerings that differ in layer, threshold and strength, all fitted on a part of the training
split. The rest of it chooses one, and the calibration split tests that one, as with `search`: what
differs between rows of a table is the idea, not the care. They are not in `search` itself, whose
budget they would double, and they act in the residual stream: the statistics they need (a
covariance, a spread, a length) are not those of sparse latents.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import Ridge
from torch import Tensor

from mera_tl.inference.activations import Activations
from mera_tl.inference.answers import ReadSettings
from mera_tl.methods.candidates import Candidate, SearchData
from mera_tl.methods.class_probe import fit_classes
from mera_tl.methods.race import Choices, Search, divide, require_training
from mera_tl.methods.trials import Trial, choose, tabulate
from mera_tl.models.model import Model
from mera_tl.probes.fitting import fit_error_probe
from mera_tl.probes.probe import LinearProbe
from mera_tl.steering.directions import fit_directions
from mera_tl.steering.many import evaluate_many
from mera_tl.steering.rules import Adaptive, Gated, Proportional, Rule
from mera_tl.steering.spaces import ClassSpace, ResidualSpace, Space, TransportSpace, UnitSpace
from mera_tl.steering.steering import Steering
from mera_tl.steering.unsteered import Passes
from mera_tl.tasks.task import Task, Train

MOST_LAYERS = 8
"""Layers that a family is tried in, evenly spaced."""
LEADERS = 12
"""Candidates that see all judging examples; all see a quarter of them."""
STRENGTHS = (-2.0, -1.0, 1.0, 2.0)
"""Between which, and none, a learned strength is taught to choose."""
MOST_TAUGHT = 400
"""Examples that a learned strength is taught from: each is run at every strength."""
KINDS = ("contrastive", "controlled_contrastive")


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a family may learn from: a part of the training split."""

    model: Model
    task: Task[Any]
    activations: Activations
    """Of the task, unsteered."""
    choices: Choices
    settings: ReadSettings
    layers: tuple[int, ...]

    @property
    def resid(self) -> Float[Tensor, "layer example d_model"]:
        """The residual stream at the final prompt token."""
        return self.activations.resid("last").float()

    @property
    def wrong(self) -> Bool[Tensor, " example"]:
        """Which answers are not the true option."""
        return ~self.activations.correct

    def ridge(self, space: Space | None = None) -> LinearProbe:
        """Fit the strongly regularised ridge probe, in a space."""
        return fit_error_probe(self.read(space), kind="ridge", penalty=3.0, seed=self.choices.seed)

    def read(self, space: Space | None) -> Activations:
        """Return the activations as a space reads them."""
        if space is None:
            return self.activations
        features = torch.stack([space.read(h, layer) for layer, h in enumerate(self.resid)], dim=1)
        return replace(self.activations, by_position={"last": features})

    def first(self, n: int) -> "Lesson":
        """Return the lesson of the first examples only."""
        n = min(n, len(self.task))
        part = self.activations.subset(torch.arange(n))
        return replace(self, task=self.task.subset(range(n)), activations=part)

    def probe(self, weights: Tensor, bias: Tensor, kind: str) -> LinearProbe:
        """Return a probe with weights of a family's own."""
        norm = self.resid.norm(dim=-1).median(-1).values
        told: Any = {"penalty": 0.0, "best_layer": self.layers[0], "clip": 0.01}
        told |= {"manifest": self.activations.origin}
        return LinearProbe(weights.float(), bias.float(), norm, "last", kind, **told)


Ways = Iterator[tuple[Candidate, Steering]]
Family = Callable[[Lesson], Ways]


def class_probe_steered(lesson: Lesson) -> Ways:
    """Move towards the class that a classifier reads, where it is not what the model will say.

    Shows what steering adds to `class_probe`, or loses. The gate opens where the classifier gives
    the unsteered answer a probability of error above the threshold; the move is between the means
    of the examples of two classes.
    """
    labels, n_options = lesson.activations.labels, len(lesson.activations.outcomes.options)
    fits = [fit_classes(h, labels.numpy(), n_options) for h in lesson.resid]
    true = torch.nn.functional.one_hot(labels, n_options).float()
    means = einsum(lesson.resid, true, "layer example d, example option -> layer option d")
    means = means / true.sum(0).clamp(min=1)[:, None]
    # An option that never occurs has no mean: the one of all moves nowhere in particular.
    means[:, true.sum(0) == 0] = lesson.resid.mean(1, keepdim=True)
    weights, bias = (torch.stack([getattr(f, name) for f in fits]) for name in ("weights", "bias"))
    space = ClassSpace(weights, bias, means)
    # For an answer a, log-odds of error are minus those of class a.
    answers = torch.eye(n_options)[:, None].expand(n_options, len(fits), n_options).contiguous()
    probe = lesson.probe(-answers, torch.zeros(n_options, len(fits)), "class")
    yield from _gated("class_probe_steered", lesson, probe, answers, space)


def whitened(lesson: Lesson) -> Ways:
    """Move along `S^-1 (mean wrong - mean right)`, the shift of least collateral change.

    Of all shifts that change `(mean wrong - mean right).h` by one, `S^-1` times it has the least
    second moment over the other activations (Fisher's linear discriminant). S is the covariance
    within wrong and right examples, shrunk as by `sklearn.covariance.ledoit_wolf`.
    """
    probe = lesson.ridge()
    direction = torch.zeros_like(probe.weights)
    for layer in lesson.layers:
        direction[layer] = whitened_difference(lesson.resid[layer], lesson.wrong)
    for layer, threshold in product(lesson.layers, lesson.choices.thresholds):
        yield _candidate("whitened", Adaptive(), probe, direction, layer, threshold)


def affine(lesson: Lesson) -> Ways:
    """Map wrong to right by mean and spread of every unit: Linear-AcT (arXiv 2410.23054).

    There strengths are shares of the way; the ridge probe says where errors are.
    """
    # Without a wrong example, or a right one, all stand in: there is nowhere to go.
    sides = (lesson.wrong, ~lesson.wrong)
    groups = [lesson.resid[:, rows] if rows.any() else lesson.resid for rows in sides]
    start, to = (group.mean(1) for group in groups)
    spread = [group.std(1, correction=0) for group in groups]
    ratio = torch.where(spread[0] > 0, spread[1] / spread[0].clamp(min=1e-6), 1.0)
    space = TransportSpace(start, to, ratio)
    yield from _gated("affine", lesson, lesson.ridge(), start - to, space)


def rotation(lesson: Lesson) -> Ways:
    """Rotate activations away from error, in their plane with the direction, at constant length.

    Spherical steering (arXiv 2602.08169): probe and difference of means are those of `h / |h|`.
    """
    yield from _unit("rotation", lesson, "ridge", UnitSpace(turns=True))


def cast_gate(lesson: Lesson) -> Ways:
    """Steer where the cosine with a condition vector exceeds a threshold: CAST (arXiv 2409.05907).

    The condition is the difference of means of `h / |h|`, high minus low error.
    """
    yield from _unit("cast_gate", lesson, "contrastive", UnitSpace())


def ablation(lesson: Lesson) -> Ways:
    """Erase what a linear map can read of error: LEACE (arXiv 2306.03819) for one concept.

    It has no threshold: every example is moved along the pattern until the least-squares probe
    reads what it reads on average.
    """
    shape = lesson.resid.shape[0], lesson.resid.shape[-1]
    weights, direction, bias = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape[0])
    for layer in lesson.layers:
        weights[layer], direction[layer], bias[layer] = eraser(lesson.resid[layer], lesson.wrong)
    probe = lesson.probe(weights, bias, "least_squares")
    for layer in lesson.layers:
        yield _candidate("ablation", Proportional(), probe, direction, layer)


def learned_strength(lesson: Lesson) -> Ways:
    """Learn from h how far to move, either way: a linear map to strength (CLAS, arXiv 2604.24693).

    Every example is tried at a few strengths on one direction. The target is the strength of least
    error, the smaller one where hardly better, and a ridge regression learns it. (CLAS takes the
    gradient through the model; this needs forward passes only.)
    """
    activations, layers = lesson.activations, lesson.layers[1::2] or lesson.layers
    found = fit_directions(activations, lesson.ridge(), KINDS)
    some = lesson.first(MOST_TAUGHT)
    taught = _best_strengths(some, [found[kind].vectors for kind in KINDS], layers)
    for kind, targets in zip(KINDS, taught, strict=True):
        direction = found[kind].vectors
        weights, bias = torch.zeros_like(direction), torch.zeros(len(direction))
        for layer, target in zip(layers, targets, strict=True):
            weights[layer], bias[layer] = _regress(some.resid[layer], target)
        probe = lesson.probe(weights, bias, "strength")
        for layer, strength in product(layers, (1.0, 2.0)):
            rule = Proportional(strength)
            yield _candidate(f"learned_strength, {kind}", rule, probe, direction, layer)


FAMILIES: Mapping[str, Family] = {
    family.__name__: family
    for family in (
        class_probe_steered,
        whitened,
        affine,
        rotation,
        ablation,
        cast_gate,
        learned_strength,
    )
}


def search_family(
    family: Family,
    model: Model,
    task: Task[Train],
    activations: Activations,
    *,
    choices: Choices | None = None,
    settings: ReadSettings | None = None,
    passes: Passes | None = None,
) -> Search:
    """Choose a family's layer, threshold and strength on training data.

    Two thirds fit, the rest judges: a quarter of it all candidates, the whole the best dozen. With
    the same `passes`, several families run the examples that judge unsteered once.

    Raises:
        ValueError: as `search`.
    """
    choices, settings = choices or Choices(), replace(settings or ReadSettings(), progress=False)
    require_training(task, activations)
    activations.check(model, settings)
    fit, judge = divide(task, choices.search_share, choices.seed)
    every = range(model.n_layers)
    layers = tuple(every[:: -(-len(every) // MOST_LAYERS)])
    if choices.layers is not None:
        layers = tuple(dict.fromkeys(layer for some in choices.layers for layer in some))
    learned = activations.subset(torch.tensor(fit))
    lesson = Lesson(model, task.subset(fit), learned, choices, settings, layers)
    steerings = dict(family(lesson))
    part = (task.subset(judge), activations.subset(torch.tensor(judge)))
    told: dict[str, Any] = {"known": steerings, "passes": passes}
    data = SearchData(model, *part, {}, choices.metric, settings, **told)

    def trials(some: Sequence[Candidate], places: Sequence[int]) -> list[Trial]:
        return [Trial(*each) for each in zip(some, data.gains(some, places), strict=True)]

    order = torch.randperm(len(judge), generator=torch.Generator().manual_seed(choices.seed))
    first = trials(list(steerings), order[: -(-len(judge) // 4)].tolist())
    ranked = sorted(first, key=lambda each: -each.value(choices.caution))
    finalists = trials([each.candidate for each in ranked[:LEADERS]], range(len(judge)))
    best = choose(finalists, choices.caution)
    details = {"n_fit": len(fit), "n_search": len(judge), "n_candidates": len(steerings)}
    table = tabulate(finalists, choices.caution)
    return Search(best, steerings[best], table, details)


# --- the mathematics ----------------------------------------------------------------------------


def whitened_difference(
    resid: Float[Tensor, "example d_model"], wrong: Bool[Tensor, " example"]
) -> Float[Tensor, " d_model"]:
    """Return `S^-1 (mean wrong - mean right)`, S shrunk; zero where one of them is empty."""
    if not 0 < int(wrong.sum()) < len(wrong):
        return torch.zeros(resid.shape[-1])
    means = torch.stack([resid[~wrong].mean(0), resid[wrong].mean(0)]).double()
    within = resid.double() - means[wrong.long()]
    # With fewer examples than units S has no inverse: it is drawn towards a multiple of one.
    covariance = torch.from_numpy(ledoit_wolf(within.numpy(), assume_centered=True)[0])
    return torch.linalg.solve(covariance, means[1] - means[0]).float()


def eraser(
    resid: Float[Tensor, "example d_model"], concept: Bool[Tensor, " example"]
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"], float]:
    """Return w, d and b: `h - (w.h + b) d` is uncorrelated with the concept, and nearest to h.

    `w` is the least-squares probe `S^+ c` and `d = c / (w.c)`, with c the covariance of h with the
    concept: LEACE's `W^+ P W` for one concept (Belrose et al., 2023, theorem 4.3).
    """
    h, z = resid.double(), concept.double()
    centred = h - h.mean(0)
    c = einsum(centred, z - z.mean(), "example d, example -> d") / len(h)
    covariance = einsum(centred, centred, "example d, example e -> d e") / len(h)
    w = torch.linalg.pinv(covariance, hermitian=True, rtol=1e-6) @ c
    slope = w @ c
    if slope <= 1e-12:  # nothing can be read, so there is nothing to erase
        return torch.zeros_like(w).float(), torch.zeros_like(w).float(), 0.0
    return w.float(), (c / slope).float(), float(-w @ h.mean(0))


def _best_strengths(
    lesson: Lesson, directions: Sequence[Float[Tensor, "layer d_model"]], layers: Sequence[int]
) -> Float[Tensor, "direction tried example"]:
    """Return, for every layer and example, the strength of least error among a few and none."""
    n = len(directions[0])
    always = lesson.probe(torch.zeros_like(directions[0]), torch.ones(n), "constant")
    tried = [
        Steering(always, direction, Proportional(strength), layers=(layer,), positions="last")
        for direction, layer, strength in product(directions, layers, STRENGTHS)
    ]
    runs = evaluate_many(lesson.model, lesson.task, tried, settings=lesson.settings)
    shape = (len(directions), len(layers), len(STRENGTHS))
    error = torch.stack([run.error for run in runs]).unflatten(0, shape)
    # No move is the first to be compared, and what is not better by a hundredth is not chosen.
    unsteered = lesson.activations.error.expand(*shape[:2], 1, -1) - 0.01
    strengths = torch.tensor([0.0, *STRENGTHS])
    return strengths[torch.cat([unsteered, error], dim=2).argmin(2)]


def _regress(
    resid: Float[Tensor, "example d_model"], target: Float[Tensor, " example"]
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, ""]]:
    """Return weights and intercept of a ridge regression on standardised activations."""
    x = resid.double()
    scale = x.std(0, correction=0)
    scale = torch.where(scale > 0, scale, torch.inf)
    model = Ridge(alpha=float(len(x)))
    model.fit(((x - x.mean(0)) / scale).numpy(), np.asarray(target, dtype=float))
    weights = torch.from_numpy(np.asarray(model.coef_)) / scale
    return weights.float(), (float(model.intercept_) - weights @ x.mean(0)).float()


# --- candidates ---------------------------------------------------------------------------------


def _gated(name: str, lesson: Lesson, probe: LinearProbe, direction: Tensor, space: Space) -> Ways:
    """List a gate at every layer, threshold and strength."""
    choices = lesson.choices
    every = product(lesson.layers, choices.gate_thresholds, (0.5, *choices.strengths))
    for layer, threshold, strength in every:
        rule = Gated(strength=strength)
        yield _candidate(name, rule, probe, direction, layer, threshold, space)


def _unit(name: str, lesson: Lesson, kind: Any, space: UnitSpace) -> Ways:
    """List gates on directions of activations, along both differences of means."""
    read = lesson.read(space)
    penalty = 3.0 if kind == "ridge" else None
    probe = fit_error_probe(read, kind=kind, penalty=penalty, seed=lesson.choices.seed)
    for along, found in fit_directions(read, probe, KINDS).items():
        yield from _gated(f"{name}, {along}", lesson, probe, found.vectors, space)


def _candidate(
    name: str,
    rule: Rule,
    probe: LinearProbe,
    direction: Tensor,
    layer: int,
    threshold: float = 0.5,
    space: Space | None = None,
) -> tuple[Candidate, Steering]:
    """Return one way of steering, in words and as it is."""
    strength = getattr(rule, "strength", None)
    candidate = Candidate(name, None, (layer,), "last", threshold, strength)
    where: dict[str, Any] = {"layers": (layer,), "positions": "last"}
    steering = Steering(probe, direction, rule, space or ResidualSpace(), **where)
    return candidate, steering if isinstance(rule, Proportional) else steering.at(threshold)
