"""What a model answered, example by example, and what changed between two runs.

`Outcomes` are per-example values on the CPU, in the order of the task. Every metric is a function
of one run, or of a run and the unsteered run it is compared with, on the same rows.
"""

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
_PER_EXAMPLE = ("rows", "labels", "predictions", "probs", *_STEERED, "peak")


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Answers, probabilities and steering counts of one run over one task."""

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
    peak: Float[Tensor, " example"]
    """Highest probe score in that scope, before any shift; -inf without hooks. An example whose
    unsteered peak does not exceed a limit cannot be steered at it."""
    replies: tuple[str | None, ...] = ()
    """What was decoded; None where the readout decodes nothing (the default)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "replies", self.replies or (None,) * len(self.rows))

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
        return replace(self, replies=tuple(self.replies[i] for i in places), **kept)

    def with_rows(self, indices: Int[Tensor, " kept"], other: "Outcomes") -> "Outcomes":
        """Return these outcomes with some examples taken from another run."""
        changed = {}
        for name in _PER_EXAMPLE:
            changed[name] = getattr(self, name).clone()
            changed[name][indices] = getattr(other, name)
        replies = list(self.replies)
        for place, reply in zip(indices.tolist(), other.replies, strict=True):
            replies[place] = reply
        return replace(self, replies=tuple(replies), **changed)

    def gain(self, base: "Outcomes", metric: Metric = "correct") -> Float[Tensor, " example"]:
        """Return the paired gain per example: steered minus unsteered, positive is better.

        In {-1, 0, 1} for `correct`; in [-1, 1], the fall of the error, for `error`.
        """
        _require_same_rows(self, base)
        if metric == "correct":
            return self.correct.double() - base.correct.double()
        return base.error.double() - self.error.double()

    def transitions(self, base: "Outcomes") -> dict[str, int]:
        """Count examples by correctness before and after, e.g. `0->1` for the recovered."""
        _require_same_rows(self, base)
        before, after = base.correct.int(), self.correct.int()
        return {
            f"{i}->{j}": int(((before == i) & (after == j)).sum()) for i in (0, 1) for j in (0, 1)
        }

    def weighted_scores(self) -> dict[str, float]:
        """Return precision, recall and F1, averaged over options with weights n(true option)."""
        totals = {"precision": 0.0, "recall": 0.0, "f1": 0.0}
        for option in range(len(self.options)):
            true, said = self.labels == option, self.predictions == option
            hits = (true & said).sum().item()
            precision = hits / max(1, said.sum().item())
            recall = hits / max(1, true.sum().item())
            f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
            weight = true.double().mean().item()
            for name, value in (("precision", precision), ("recall", recall), ("f1", f1)):
                totals[name] += weight * value
        return totals

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
            "peak": [value if value > -torch.inf else None for value in self.peak.tolist()],
        }
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

        return cls(
            options=tuple(options),
            rows=column("row"),
            labels=torch.tensor([index[record["label"]] for record in records]),
            predictions=torch.tensor([index[record["prediction"]] for record in records]),
            probs=column("probs").float(),
            **{name: column(name) for name in _STEERED[:-1]},
            shift=column("shift").float(),
            peak=torch.tensor([-torch.inf if r["peak"] is None else r["peak"] for r in records]),
            replies=tuple(record.get("reply") for record in records),
        )

    def _repr_html_(self) -> str:
        return (
            f"<b>{len(self)} examples</b>: accuracy {self.accuracy:.3f}, mean error "
            f"{self.mean_error:.3f}, {int((~self.answered).sum())} unanswered, "
            f"{self.steered_share:.1%} of (layer, token) pairs steered"
        )


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
    test = stats.binomtest(int(outcomes.correct.sum()), len(outcomes))
    interval = test.proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def paired_p_value(outcomes: Outcomes, base: Outcomes) -> float:
    """Return the two-sided p-value of McNemar's exact test against the unsteered run."""
    changed = outcomes.transitions(base)
    better, worse = changed["0->1"], changed["1->0"]
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def spi_interval(
    outcomes: Outcomes, base: Outcomes, *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return a paired bootstrap interval of the SPI (percentiles of 2,000 resamples)."""
    counts = outcomes.transitions(base)
    n = len(outcomes)
    shares = np.array([counts[name] for name in ("0->1", "1->0", "1->1", "0->0")]) / n
    # Examples with the same transition are exchangeable, so resampling counts is resampling rows.
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=2000) / n
    values = [spi(row[0] + row[2], row[1] + row[2]) for row in drawn]
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _require_same_rows(steered: Outcomes, base: Outcomes) -> None:
    if not torch.equal(steered.rows, base.rows):
        raise ValueError(
            f"Runs over different rows cannot be paired ({len(steered)} against {len(base)} "
            "examples); evaluate both on the same task."
        )
