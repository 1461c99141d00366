"""Which way to move an activation. Reading an error is not steering away from it.

**Why not along the probe.** A probe `w` says where in activation space error can be *read*. The
paper moves along `d = w`, which is the shortest shift that lowers the score, measured by a ruler
that does not know the data. A well-fitted probe is `w = S^-1 c`, with S the covariance of the
activations and c their covariance with the error: the inverse puts its weight on directions in
which activations hardly vary, because noise is cheap to cancel there. A shift along it satisfies
the probe at once and goes where no activation ever is; the rest of the network does not notice.

**Measure length as the data does.** Ask for the shortest shift that lowers the score by one in the
metric of the data, `min s' S^-1 s` subject to `w.s = -1`. The answer is `s = -S w / (w' S w)`: move
along the *pattern* `S w`, how activations change as the score changes (Haufe et al., 2014). For the
well-fitted probe above `S w = c`. A very strongly regularised `w` tends to c as well, up to scale,
and so does the difference of means of wrong and right examples: all three are the same idea.

**Hold the class fixed.** Where errors go together with a class ("spam from saved contacts is called
ham"), c holds the class too, and moving along it moves the answer for the right and the wrong
alike. The variance splits into that between the true classes and that within them, and only the
second says what differs *when the model is wrong about the same kind of example*. So replace S by
`S_within`, the covariance within true classes, or take the difference of means within each class.
It is adjustment for a confounder, with true classes that are known for training examples; a
direction needs no label when it is used.

**Hold the answer fixed as well.** When a model errs both ways, "say yes less" and "say no less" are
opposite directions and any single one helps half of the errors and harms the other half. Given the
answer c that a model is about to give, compare the examples of true class c' that it answers c with
those that it answers c', weighted by how often each c' is the truth behind a wrong c.

**Read per answer, too.** Error is an exclusive or of two things: what is true and what is answered.
Where a model errs both ways, no linear probe can read it from activations that hold both. *Given*
the answer, error says only what is true, and one probe per answer reads that. But such a probe must
not also say which way: within an answer, lowering its score makes the example look like one of
which that answer would be true, and the answer stays. So the probe opens a gate (`rules.Gated`),
and the direction above, a difference of means with a length of its own, does the moving.

**Known and not known.** The algebra is exact; that the shift changes the answer is not implied by
any of it, since nothing here asks the network what a shift does. It is found out by steering:
`mera_tl.search` on training data, a certificate on data of its own. Within a class, errors may
still go together with something harmless, and no mean can tell.

Everything points towards error: a rule moves along `-d`. All directions come from sums over
examples (`Statistics`), which add up batch by batch and never build S.
"""

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mera_tl.inference.activations import places_read

logger = logging.getLogger(__name__)

MIN_EXAMPLES = 3
"""A mean over fewer examples than this is not compared with another."""

_ORIGINS: MutableMapping[Tensor, Mapping[str, Any]] = WeakIdKeyDictionary()
"""What vectors were fitted to, for as long as they are: a `Steering` takes the vectors alone."""

CHUNK = 256
"""Examples that are held in float64 at a time."""


@runtime_checkable
class ReadProbe(Protocol):
    """The part of a probe that a direction depends on."""

    @property
    def weights(self) -> Any: ...  # noqa: D102
    @property
    def position(self) -> Any: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class Direction:
    """Which way error lies, in every layer: `vectors` is what `Steering(direction=...)` takes."""

    kind: str
    vectors: Float[Tensor, "*option layer d_model"]
    """Per layer, or per (unsteered answer, layer); zero where the data do not give a direction."""
    notes: tuple[str, ...] = ()
    """What the data could not answer."""

    def __repr__(self) -> str:
        return f"Direction({self.kind}, vectors {tuple(self.vectors.shape)}, notes {self.notes})"


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over examples by true class and answer; those of two batches add up.

    The last place of the axis `answer` counts the examples that were not answered: wrong, about
    nothing in particular.
    """

    weights: Float[Tensor, "layer d_model"]
    n: Float[Tensor, "option answer"]
    total: Float[Tensor, "layer option answer d_model"]
    """Sum of h."""
    along: Float[Tensor, "layer option d_model"]
    """Sum of (w.h) h: all that `S w` needs, which is never built from an S."""

    @staticmethod
    def of(
        resid: Float[Tensor, "layer example d_model"],
        labels: Int[Tensor, " example"],
        predictions: Int[Tensor, " example"],
        weights: Float[Tensor, "layer d_model"],
        *,
        n_options: int,
    ) -> "Statistics":
        """Sum over a batch of examples; a prediction of -1 is no answer."""
        h, w = resid.double(), weights.double().to(resid.device)
        answers = torch.where(predictions < 0, n_options, predictions)
        true = torch.nn.functional.one_hot(labels, n_options).to(h)
        said = torch.nn.functional.one_hot(answers, n_options + 1).to(h)
        score = einsum(h, w, "layer example d, layer d -> layer example")
        group = einsum(true, said, "example option, example answer -> example option answer")
        return Statistics(
            w,
            reduce(group, "example option answer -> option answer", "sum"),
            einsum(h, group, "layer example d, example o answer -> layer o answer d"),
            einsum(h, score, true, "layer example d, layer example, example o -> layer o d"),
        )

    def __add__(self, other: "Statistics") -> "Statistics":
        """Return the sums over the examples of both."""
        return replace(
            self, n=self.n + other.n, total=self.total + other.total, along=self.along + other.along
        )

    @property
    def n_options(self) -> int:
        """Number of options."""
        return len(self.n)

    @property
    def right(self) -> Float[Tensor, "option answer"]:
        """One where the answer is the true class, else zero."""
        return torch.eye(self.n_options, self.n_options + 1).to(self.n)


# --- the directions -----------------------------------------------------------------------------


def euclidean(s: Statistics) -> Float[Tensor, "layer d_model"]:
    """Return `w`: the shortest way to a lower score, and the paper's."""
    return s.weights


def pattern(s: Statistics) -> Float[Tensor, "layer d_model"]:
    """Return `S w`: the shortest way in the metric of the data."""
    total = reduce(s.total, "layer option answer d -> layer d", "sum")
    along = reduce(s.along, "layer option d -> layer d", "sum")
    score = einsum(total, s.weights, "layer d, layer d -> layer")
    n = s.n.sum()
    return (along - total * score[:, None] / n) / n


def controlled_pattern(s: Statistics) -> Float[Tensor, "layer d_model"]:
    """Return `S_within w`: the shortest way in the metric of the data within true classes."""
    total = reduce(s.total, "layer option answer d -> layer option d", "sum")
    score = einsum(total, s.weights, "layer option d, layer d -> layer option")
    share = total * score[..., None] / s.n.sum(-1).clamp(min=1)[:, None]
    return reduce(s.along - share, "layer option d -> layer d", "sum") / s.n.sum()


def contrastive(s: Statistics) -> Float[Tensor, "layer d_model"]:
    """Return the mean of the wrong examples minus the mean of the right ones."""
    wrong, right = _sums(s)
    return _difference(
        (reduce(wrong[0], "layer option d -> layer d", "sum"), wrong[1].sum()),
        (reduce(right[0], "layer option d -> layer d", "sum"), right[1].sum()),
    )


def controlled_contrastive(s: Statistics) -> Float[Tensor, "layer d_model"]:
    """Return wrong minus right within every true class, averaged.

    A class weighs `n_wrong n_right / (n_wrong + n_right)`, the inverse variance of its difference;
    one without enough of either weighs nothing.
    """
    wrong, right = _sums(s)
    weight = wrong[1] * right[1] / (wrong[1] + right[1]).clamp(min=1)
    weight = weight * (wrong[1] >= MIN_EXAMPLES) * (right[1] >= MIN_EXAMPLES)
    share = weight / weight.sum().clamp(min=1e-12)
    return einsum(_difference(wrong, right), share, "layer option d, option -> layer d")


def answer_controlled(s: Statistics) -> Float[Tensor, "answer layer d_model"]:
    """Return one direction per current answer c: from what it should have been, to c.

    `d_c = sum over c' of P(true = c' | answer c, wrong) (mean(h | c', answer c) - mean(h | c',
    answer c'))`; pairs without enough examples are left out, the others sharing their weight.
    """
    k = s.n_options
    n, total = s.n[:, :k], s.total[:, :, :k]
    mean = total / n.clamp(min=1)[..., None]
    right = torch.diagonal(mean, dim1=1, dim2=2)
    difference = mean - rearrange(right, "layer d option -> layer option 1 d")
    enough = (n >= MIN_EXAMPLES) & (n.diagonal() >= MIN_EXAMPLES)[:, None]
    weight = n * enough * (1 - torch.eye(k).to(n))
    share = weight / weight.sum(0).clamp(min=1)
    return einsum(difference, share, "layer option answer d, option answer -> answer layer d")


def instruction(
    without: Float[Tensor, "layer example d_model"], given: Float[Tensor, "layer example d_model"]
) -> Float[Tensor, "layer d_model"]:
    """Return the mean of the prompts without their instruction minus that with it.

    No label and no reply is needed; moving against it moves toward the instruction.
    """
    return reduce(without - given, "layer example d -> layer d", "mean")


def prompt_controlled(
    resid: Float[Tensor, "layer reply d_model"],
    prompt: Int[Tensor, " reply"],
    incorrect: Bool[Tensor, " reply"],
) -> Float[Tensor, "layer d_model"]:
    """Return wrong minus right replies to the same prompt, averaged over prompts that have both.

    `prompt` numbers the prompts from 0. What differs between a good and a bad reply to the same
    question cannot be the question. Zero where no prompt has both. A reply without a token, all
    zero, is left out: a difference from it would be the whole activation.
    """
    spoken = resid.any(0).any(-1)
    resid, prompt, incorrect = resid[:, spoken], prompt[spoken], incorrect[spoken]
    n_prompts = int(prompt.max()) + 1 if len(prompt) else 1
    wrong, right = (
        torch.nn.functional.one_hot(prompt, n_prompts).to(resid) * rows[:, None]
        for rows in (incorrect, ~incorrect)
    )
    mixed = (wrong.sum(0) > 0) & (right.sum(0) > 0)
    means = [
        einsum(resid, rows, "layer reply d, reply prompt -> layer prompt d")
        / rows.sum(0).clamp(min=1)[:, None]
        for rows in (wrong, right)
    ]
    difference = (means[0] - means[1]) * mixed[:, None]
    return reduce(difference, "layer prompt d -> layer d", "sum") / mixed.sum().clamp(min=1)


_FORMULAS = {
    "euclidean": euclidean,
    "pattern": pattern,
    "contrastive": contrastive,
    "controlled_pattern": controlled_pattern,
    "controlled_contrastive": controlled_contrastive,
    "answer_controlled": answer_controlled,
}
KINDS = tuple(_FORMULAS)

_Sums = tuple[Tensor, Tensor]
"""Sums of h and counts, by true class."""


def _sums(s: Statistics) -> tuple[_Sums, _Sums]:
    """Return the sums over wrong and over right examples, by true class."""
    contraction = "layer option answer d, option answer -> layer option d"
    wrong, right = 1 - s.right, s.right
    return (
        (einsum(s.total, wrong, contraction), (s.n * wrong).sum(-1)),
        (einsum(s.total, right, contraction), (s.n * right).sum(-1)),
    )


def _difference(wrong: _Sums, right: _Sums) -> Tensor:
    """Return the difference of two means; zero where either has too few examples."""
    enough = (wrong[1] >= MIN_EXAMPLES) & (right[1] >= MIN_EXAMPLES)
    difference = wrong[0] / wrong[1].clamp(min=1)[..., None]
    difference = difference - right[0] / right[1].clamp(min=1)[..., None]
    return difference * enough[..., None]


# --- from activations ---------------------------------------------------------------------------


def fit_direction(activations: Any, probe: ReadProbe, kind: str) -> Direction:
    """Find which way to move for a probe, in every layer; the activations are training data.

    `.vectors`, which `Steering` takes, are of shape (layer, d_model), for `answer_controlled`
    (option, layer, d_model). Kinds, for a probe `w` and the covariance S of the activations:

        euclidean               w: the paper's, the shortest shift
        pattern                 S w: the shortest shift in the metric of the data
        contrastive             mean(h | wrong) - mean(h | right)
        controlled_pattern      S w, with S within true classes
        controlled_contrastive  the difference of means within each true class, averaged
        answer_controlled       one difference per unsteered answer, the true class held fixed

    Where `w.d` is not positive, MERA's rule moves nothing: look at the `notes` of what is returned.
    Examples without an answer have no `exact` position, and replies without a token no `generated`:
    they count only at `last`.

    Raises:
        ValueError: if these are not activations and a probe, or there is no such kind of direction.
    """
    return fit_directions(activations, probe, (kind,))[kind]


def fit_directions(
    activations: Any, probe: ReadProbe, kinds: Sequence[str] = KINDS
) -> Mapping[str, Direction]:
    """Find several directions in one pass over the examples.

    `activations` are `mera_tl.Activations` or anything with `resid(position)` and `outcomes`.

    Raises:
        ValueError: if there is no such kind of direction.
    """
    unknown = [kind for kind in kinds if kind not in _FORMULAS]
    if unknown:
        raise ValueError(
            f"There is no direction {unknown[0]!r}; pass one of {', '.join(_FORMULAS)}."
        )
    if not hasattr(activations, "resid") or not hasattr(probe, "weights"):
        raise ValueError(
            f"{activations!r:.60} and {probe!r:.60} are not activations and a probe; pass "
            "collect(model, task) and fit_error_probe(activations)."
        )
    outcomes = activations.outcomes
    resid = activations.resid(probe.position)
    kept = places_read(outcomes, probe.position).nonzero()[:, 0]
    statistics = None
    for part in kept.split(CHUNK):
        batch = Statistics.of(
            resid[:, part],
            outcomes.labels[part],
            outcomes.predictions[part],
            probe.weights,
            n_options=len(outcomes.options),
        )
        statistics = batch if statistics is None else statistics + batch
    if statistics is None:
        raise ValueError(
            f"None of {len(outcomes)} examples has activations at {probe.position!r}; "
            "fit the probe at position='last'."
        )
    found = {kind: direction(statistics, kind) for kind in kinds}
    if origin := getattr(activations, "origin", None):
        _ORIGINS.update({each.vectors: origin for each in found.values()})
    return found


def origin_of(vectors: Tensor | None) -> Mapping[str, Any]:
    """Return what a direction was fitted to, as `Activations.origin` says it, if that is known."""
    return {} if vectors is None else _ORIGINS.get(vectors, {})


def direction(statistics: Statistics, kind: str) -> Direction:
    """Return a direction; what the data could not answer is logged and stays in `notes`.

    Zero where there are too few examples to compare. Where it raises the probe's score (`w.d` is
    not positive) MERA's rule moves nothing, which the notes say too.
    """
    vectors = _FORMULAS[kind](statistics)
    notes = _notes(kind, statistics, vectors)
    for note in notes:
        logger.info("%s: %s", kind, note)
    return Direction(kind, vectors.float(), notes)


def _notes(kind: str, s: Statistics, vectors: Tensor) -> tuple[str, ...]:
    notes = []
    n_right = int((s.n * s.right).sum())
    n_wrong = int(s.n.sum()) - n_right
    if kind != "euclidean" and min(n_wrong, n_right) < MIN_EXAMPLES:
        notes.append(f"{n_wrong} wrong and {n_right} right examples are too few to compare")
    if kind == "controlled_contrastive":
        (_, wrong), (_, right) = _sums(s)
        few = (wrong < MIN_EXAMPLES) | (right < MIN_EXAMPLES)
        if few.any():
            notes.append(f"classes {few.nonzero()[:, 0].tolist()} have too few wrong or right")
    empty = ~(vectors != 0).any(-1)
    slope = einsum(vectors, s.weights, "... layer d, layer d -> ... layer")
    against = (slope <= 0) & ~empty
    if against.any():
        layers = sorted(set(against.nonzero()[:, -1].tolist()))
        notes.append(
            f"raises the probe's score in layers {layers}, where MERA's rule moves nothing"
        )
    if empty.any() and kind == "answer_controlled":
        answers = sorted(set(empty.nonzero()[:, 0].tolist()))
        notes.append(f"answers {answers} have no comparable errors, so nothing moves there")
    return tuple(notes)
