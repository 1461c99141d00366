"""What a model answered, example by example, and what changed between two runs.

`Outcomes` are per-example values on the CPU, in the order of the task. Every metric is a function
of one run, or of a run and the unsteered run it is compared with, on the same rows.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

Metric = Literal["correct", "error"]
_STEERED = ("n_steered", "n_steerable", "n_tokens", "n_layers", "shift")
COUNTS = (*_STEERED, "max_score")
"""What is known of what steering hooks did to each example."""
_PER_EXAMPLE = ("rows", "labels", "predictions", "probs", *COUNTS, "n_generated")


@dataclass(frozen=True, eq=False, repr=False)
class Outcomes:
    """Answers, probabilities and steering counts of one run over one task.

    One value an example, in the order of the task: `predictions` and `labels` (places in `options`,
    -1 unanswered), `probs` (example, option), `correct`, `error` = 1 - P(true option). Set beside
    the unsteered ones by `after.compare(before)`.
    """

    options: tuple[str, ...]
    rows: Int[Tensor, " example"]
    """Row numbers in the task's source."""
    labels: Int[Tensor, " example"]
    """Index of the true option."""
    predictions: Int[Tensor, " example"]
    """Index of the answered option; -1 where no option was answered."""
    probs: Float[Tensor, "example option"]
    """P(option), summing to one; all zero where no option was answered."""
    n_steered: Int[Tensor, " example"]
    """Steered (layer, token) pairs."""
    n_steerable: Int[Tensor, " example"]
    """(layer, token) pairs that were in the scope of a steering hook."""
    n_tokens: Int[Tensor, " example"]
    """Tokens that were moved in some layer."""
    n_layers: Int[Tensor, " example"]
    """Layers in which some token was moved."""
    shift: Float[Tensor, " example"]
    """Sum of |shift| / |h| over the steered (layer, token) pairs."""
    max_score: Float[Tensor, " example"]
    """Highest probe score in that scope, before any shift; -inf without hooks. An example whose
    unsteered maximum does not exceed a limit cannot be steered at it."""
    replies: tuple[str | None, ...] = ()
    """What was decoded; None where the readout decodes nothing (the default)."""
    finishes: tuple[str | None, ...] = ()
    """How a reply that was scored came to its end: "stop", by itself, or "length"."""
    n_generated: Int[Tensor, " example"] = None  # pyright: ignore[reportAssignmentType]
    """Tokens that the reply took, the one that ended it too; 0 where nothing was decoded."""

    def __post_init__(self) -> None:
        for name in ("replies", "finishes"):
            object.__setattr__(self, name, getattr(self, name) or (None,) * len(self.rows))
        if self.n_generated is None:
            object.__setattr__(self, "n_generated", torch.zeros_like(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def error(self) -> Float[Tensor, " example"]:
        """1 - P(true option), in [0, 1]; 1 where unanswered."""
        return 1 - self.probs.gather(1, self.labels[:, None])[:, 0]

    @property
    def correct(self) -> Bool[Tensor, " example"]:
        """Whether the true option was answered."""
        return self.predictions == self.labels

    @property
    def answered(self) -> Bool[Tensor, " example"]:
        """Whether any option was answered."""
        return self.predictions >= 0

    @property
    def spoken(self) -> Bool[Tensor, " example"]:
        """Whether a scored reply has a token, the one that ended it aside."""
        ended = torch.tensor([finish == "stop" for finish in self.finishes], dtype=torch.bool)
        return ~ended | (self.n_generated > 1)

    @property
    def accuracy(self) -> float:
        """Share of correct examples; an unanswered one is incorrect."""
        return self.correct.double().mean().item()

    @property
    def mean_error(self) -> float:
        """Mean of `error`."""
        return self.error.double().mean().item()

    @property
    def steered_share(self) -> float:
        """Share of steerable (layer, token) pairs that a rule moved; 0 without hooks."""
        return self.n_steered.sum().item() / max(1, self.n_steerable.sum().item())

    @property
    def relative_shift(self) -> float:
        """Mean of |shift| / |h| over the (layer, token) pairs that were moved; 0 without any."""
        return self.shift.double().sum().item() / max(1, self.n_steered.sum().item())

    def subset(self, indices: Int[Tensor, " kept"]) -> "Outcomes":
        """Return the outcomes of some examples."""
        kept = {name: getattr(self, name)[indices] for name in _PER_EXAMPLE}
        places = torch.arange(len(self))[indices].tolist()
        replies, finishes = ([x[i] for i in places] for x in (self.replies, self.finishes))
        return replace(self, replies=tuple(replies), finishes=tuple(finishes), **kept)

    def with_rows(self, indices: Int[Tensor, " kept"], other: "Outcomes") -> "Outcomes":
        """Return these outcomes with some examples taken from another run."""
        changed = {}
        for name in _PER_EXAMPLE:
            changed[name] = getattr(self, name).clone()
            changed[name][indices] = getattr(other, name)
        for name in ("replies", "finishes"):
            texts = list(getattr(self, name))
            for place, text in zip(indices.tolist(), getattr(other, name), strict=True):
                texts[place] = text
            changed[name] = tuple(texts)
        return replace(self, **changed)

    def gain(self, base: "Outcomes", metric: Metric = "correct") -> Float[Tensor, " example"]:
        """Return the paired gain per example: steered minus unsteered, positive is better.

        In {-1, 0, 1} for `correct`; in [-1, 1], the fall of the error, for `error`.

        Raises:
            ValueError: if the other outcomes are of other rows, or there is no such metric.
        """
        _require_same_rows(self, base)
        if metric == "correct":
            return self.correct.double() - base.correct.double()
        if metric != "error":
            raise ValueError(f"There is no metric {metric!r}; pass 'correct' or 'error'.")
        return base.error.double() - self.error.double()

    def transitions(self, base: "Outcomes") -> dict[str, int]:
        """Count examples by correctness before and after, e.g. `0->1` for the recovered.

        Raises:
            ValueError: if the other outcomes are of other rows.
        """
        _require_same_rows(self, base)
        before, after = base.correct.int(), self.correct.int()
        return {
            f"{i}->{j}": int(((before == i) & (after == j)).sum()) for i in (0, 1) for j in (0, 1)
        }

    def weighted_scores(self) -> dict[str, float]:
        """Return precision, recall and F1, averaged over options with weights n(true option)."""
        from sklearn.metrics import precision_recall_fscore_support

        options: Any = {"labels": list(range(len(self.options))), "zero_division": 0}
        scores = precision_recall_fscore_support(
            self.labels.numpy(), self.predictions.numpy(), average="weighted", **options
        )
        return dict(zip(("precision", "recall", "f1"), map(float, scores[:3]), strict=True))

    def to_records(self) -> list[dict[str, Any]]:
        """Return one JSON-ready row per example."""
        columns = {
            "row": self.rows.tolist(),
            "label": [self.options[i] for i in self.labels],
            "prediction": [self.options[i] if i >= 0 else None for i in self.predictions],
            "correct": self.correct.tolist(),
            "error": self.error.tolist(),
            "probs": self.probs.tolist(),
            "reply": self.replies,
            **{name: getattr(self, name).tolist() for name in _STEERED},
            "max_score": [None if x == -torch.inf else x for x in self.max_score.tolist()],
        }
        if any(self.finishes):
            columns |= {"finish": self.finishes, "n_generated": self.n_generated.tolist()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    @classmethod
    def from_records(
        cls, records: Sequence[Mapping[str, Any]], options: Sequence[str]
    ) -> "Outcomes":
        """Rebuild outcomes from `to_records`."""
        index = {option: i for i, option in enumerate(options)} | {None: -1}

        def column(name: str) -> Tensor:
            # A column that is younger than the file holds zeros there.
            return torch.tensor([record.get(name, 0) for record in records])

        # An older file calls it peak.
        scores = [r["max_score"] if "max_score" in r else r["peak"] for r in records]
        return cls(
            options=tuple(options),
            rows=column("row"),
            labels=torch.tensor([index[record["label"]] for record in records]),
            predictions=torch.tensor([index[record["prediction"]] for record in records]),
            probs=column("probs").float(),
            **{name: column(name) for name in _STEERED[:-1]},
            shift=column("shift").float(),
            max_score=torch.tensor([-torch.inf if score is None else score for score in scores]),
            replies=tuple(record.get("reply") for record in records),
            finishes=tuple(record.get("finish") for record in records),
            n_generated=column("n_generated"),
        )

    def compare(self, base: "Outcomes") -> "Comparison":
        """Set these outcomes beside the unsteered ones.

        Raises:
            ValueError: if they are of other rows.
        """
        _require_same_rows(self, base)
        return Comparison(base, self)

    def __repr__(self) -> str:
        facts = [f"{len(self)} examples", f"accuracy {_short(self.accuracy)}"]
        if n_silent := int((~self.answered).sum()):
            facts.append(f"{n_silent} unanswered")
        if self.n_steerable.any():
            facts.append(f"{100 * self.steered_share:.1f} % of (layer, token) pairs steered")
        return f"Outcomes({', '.join(facts)})"

    def _repr_html_(self) -> str:
        said = [int((self.predictions == i).sum()) for i in range(len(self.options))]
        answers = ", ".join(
            f"{html.escape(o)} {n}" for o, n in zip(self.options, said, strict=True)
        )
        steered = f", {100 * self.steered_share:.1f} % of (layer, token) pairs steered"
        steered *= bool(self.n_steerable.any())  # without hooks there is none that could be
        return (
            f"<b>{len(self)} examples</b>: accuracy {self.accuracy:.3f}, mean error "
            f"{self.mean_error:.3f}, {int((~self.answered).sum())} unanswered{steered}<br>"
            f"answers: {answers}"
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """Outcomes beside the unsteered ones on the same examples."""

    base: Outcomes
    outcomes: Outcomes

    @property
    def transitions(self) -> dict[str, int]:
        """How many examples went from incorrect (0) or correct (1) to which."""
        return self.outcomes.transitions(self.base)

    def plot(self, *, method: str = "steered") -> Any:
        """Draw each example's error after against its error before, as a plotly figure."""
        import pandas as pd

        from mera_tl.plots import error_before_after

        before, after = self.base.correct.int().tolist(), self.outcomes.correct.int().tolist()
        columns = {
            "row": self.base.rows.tolist(),
            "before": self.base.error.tolist(),
            "after": self.outcomes.error.tolist(),
            "change": [f"{b}->{a}" for b, a in zip(before, after, strict=True)],
        }
        return error_before_after(pd.DataFrame(columns), method=method)

    def __repr__(self) -> str:
        moved = self.transitions
        return (
            f"Comparison(accuracy {_short(self.base.accuracy)} -> "
            f"{_short(self.outcomes.accuracy)}, {moved['0->1']} recovered, {moved['1->0']} "
            f"regressed of {len(self.outcomes)}, SPI "
            f"{spi(self.outcomes.accuracy, self.base.accuracy):+.2f})"
        )


def _short(share: float) -> str:
    """Write a share with two digits and no leading zero."""
    return f"{share:.2f}".removeprefix("0")


def spi(accuracy: float, base: float) -> float:
    """Return the steering performance impact, in [-1, 1]: the share of what could be won or lost.

    `gain / (1 - base)` if accuracy rose, `gain / base` if it fell, 0 if equal.
    """
    gain = accuracy - base
    if gain == 0:
        return 0.0
    return gain / (1 - base) if gain > 0 else gain / base


def accuracy_interval(outcomes: Outcomes, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact (Clopper-Pearson) interval of the accuracy."""
    return _exact_limits(int(outcomes.correct.sum()), len(outcomes), confidence)


def paired_p_value(outcomes: Outcomes, base: Outcomes) -> float:
    """Return the two-sided p-value of McNemar's exact test against the unsteered run."""
    changed = outcomes.transitions(base)
    better, worse = changed["0->1"], changed["1->0"]
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def spi_interval(
    outcomes: Outcomes, base: Outcomes, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Return an interval of the SPI from what changed, pair by pair; it is a little too wide.

    With p the unsteered accuracy, r = P(recovered | wrong before) and q = P(regressed | right
    before), the gain is (1 - p) r - p q. Given how many were wrong before, recoveries and
    regressions are independent binomials, whose exact (Clopper-Pearson) limits combine to one of
    the gain as in Zou and Donner (2008). The unknown p, which also scales the gain, goes through
    its own .995 interval, whose .005 is taken off the rest (Berger and Boos, 1994). A bootstrap of
    rows has no idea of what it did not see: near p = .95 and n = 100 it covers as little as .6.
    """
    counts = outcomes.transitions(base)
    better, worse, n = counts["0->1"], counts["1->0"], len(outcomes)
    wrong = better + counts["0->0"]
    spread = min(0.005, (1 - confidence) / 10)
    p_low, p_high = _exact_limits(n - wrong, n, 1 - spread)
    r_low, r_high = _exact_limits(better, wrong, confidence + spread)
    q_low, q_high = _exact_limits(worse, n - wrong, confidence + spread)
    r = better / wrong if wrong else 0.5
    q = worse / (n - wrong) if n > wrong else 0.5
    p = np.linspace(p_low, p_high, 51)
    gain = (1 - p) * r - p * q
    low = gain - np.hypot((1 - p) * (r - r_low), p * (q_high - q))
    high = gain + np.hypot((1 - p) * (r_high - r), p * (q - q_low))
    # A gain beyond what p leaves to win or to lose is no gain at this p.
    low, high = np.clip(low, -p, 1 - p), np.clip(high, -p, 1 - p)
    ends = [[spi(one + step, one) for one, step in zip(p, way, strict=True)] for way in (low, high)]
    return float(min(ends[0])), float(max(ends[1]))


def _exact_limits(hits: int, n: int, confidence: float) -> tuple[float, float]:
    if not n:
        return 0.0, 1.0
    limits = stats.binomtest(hits, n).proportion_ci(confidence, method="exact")
    return float(limits.low), float(limits.high)


def _require_same_rows(steered: Outcomes, base: Outcomes) -> None:
    if not isinstance(base, Outcomes):
        raise ValueError(f"{base!r:.60} are no outcomes; pass those of evaluate(model, task).")
    same = torch.equal(steered.rows, base.rows) and torch.equal(steered.labels, base.labels)
    if not same or steered.options != base.options:
        raise ValueError(
            f"Runs over different rows or answers cannot be paired ({len(steered)} against "
            f"{len(base)} examples); evaluate both on the same task."
        )
