"""Which answers to trust: answer only where the predicted error is low, and certify the rest.

Where errors cannot be corrected they can be withheld. Thresholds t are tested from the strictest
on: at each, the wrong among the answered are binomial, and an exact test decides whether
P(wrong | answered) <= alpha. The first that cannot be certified ends the sequence, which therefore
costs no share of delta (fixed sequence). Thresholds must not depend on the calibration outcomes:
take quantiles of the predicted error on training examples. Imports neither torch nor pandas.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import special

from mera_tl.certificate.bounds import check_probability, upper_share
from mera_tl.certificate.certificate import check_certified, percent


@dataclass(frozen=True)
class Answered:
    """What the calibration examples say about one threshold."""

    threshold: float
    answered: int
    """Examples with a predicted error of at most the threshold."""
    wrong: int
    """Incorrect answers among them."""
    wrong_at_most: float
    """Exact upper confidence bound of P(wrong | answered)."""


@dataclass(frozen=True)
class Withholding:
    """Up to which predicted error answers may be given, with what is promised of them."""

    alpha: float
    """Greatest share of wrong answers among those given."""
    delta: float
    n: int
    base: float
    """Share of incorrect answers where nothing is withheld."""
    rows: tuple[Answered, ...]
    """The thresholds that were tested, in order; all but perhaps the last are certified."""
    setup: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What the promise is about: as of a `Calibration`, and under `reads` what predicts the error,
    by hashes; empty for predictions of unknown origin."""

    @property
    def chosen(self) -> Answered | None:
        """The most lenient certified threshold; None where there is none.

        Also of rows that were read from a file the first that is not certified ends the sequence.
        """
        certified = list(takewhile(lambda row: row.wrong_at_most <= self.alpha, self.rows))
        return certified[-1] if certified else None

    @property
    def threshold(self) -> float | None:
        """Answer where the predicted error is at most this; None: withhold everything."""
        return None if self.chosen is None else self.chosen.threshold

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Withholding":
        """Rebuild what `to_json` returned, deriving every bound again from its counts.

        Raises:
            ValueError: if thresholds do not rise, or counts are not those of ever more examples.
        """
        rows, before = [], Answered(-math.inf, 0, 0, 0.0)
        for row in value["rows"]:
            more, wrong = row["answered"] - before.answered, row["wrong"] - before.wrong
            rises = row["threshold"] > before.threshold and row["answered"] <= value["n"]
            if not (rises and 0 <= wrong <= more):
                raise ValueError(
                    "This is no certificate of withholding: its counts are not those of "
                    "thresholds that rise on one set of examples; certify again."
                )
            bound = upper_share(row["wrong"], row["answered"], value["delta"])
            before = Answered(row["threshold"], row["answered"], row["wrong"], bound)
            rows.append(before)
        return cls(**{**value, "rows": tuple(rows)})

    def check(self, model: Any) -> None:
        """Refuse a model, tokenizer, chat template or system prompt other than those certified for.

        Raises:
            ValueError: naming what differs.
        """
        check_certified(self.setup, model, "certify withholding on this one")

    def __str__(self) -> str:
        row = self.chosen
        terms = (
            f"Confidence {1 - self.delta:.4g} over the draw of {self.n} calibration examples; "
            "exact binomial test, thresholds in a fixed order; wrong where nothing is withheld: "
            f"{100 * self.base:.1f} %. Holds on average for data drawn as these were, not for a "
            "subgroup, other prompts or another model."
        )
        if row is None:
            first, least = self.rows[0], least_answered(self.alpha, self.delta)
            short = f"; at least {least:,} answers must be tested" * (first.answered < least)
            return (
                "NO WITHHOLDING: no threshold could be certified. At the strictest, "
                f"{first.threshold:.3g}, {first.wrong} of {first.answered} answers are wrong, so "
                f"up to {100 * first.wrong_at_most:.1f} %; allowed {100 * self.alpha:.1f} %{short}."
                f"\n{terms}"
            )
        return (
            f"WITHHOLD above a predicted error of {row.threshold:.3g}: "
            f"{percent(row.answered / self.n)} answered, certified at most "
            f"{100 * self.alpha:.1f} % of them wrong (observed {row.wrong} of {row.answered}).\n"
            f"{terms}"
        )


def certify_withholding(
    predicted_error: Float[np.ndarray, " example"],
    correct: Bool[np.ndarray, " example"],
    *,
    alpha: float,
    thresholds: Sequence[float],
    delta: float = 0.05,
) -> Withholding:
    """Find up to which predicted error answers may be given with at most `alpha` of them wrong.

    The promise: with probability 1 - `delta` over the draw of the examples,
    P(wrong | predicted error <= threshold) <= alpha, or everything is withheld. Examples must be
    distinct texts that had no part in fitting the probe or choosing the thresholds.

    Raises:
        ValueError: if shapes or probabilities do not fit, or thresholds do not rise.
    """
    check_probability("alpha", alpha)
    check_probability("delta", delta)
    if len(predicted_error) != len(correct) or not len(correct):
        raise ValueError(
            f"{len(predicted_error)} predicted errors came with {len(correct)} outcomes; pass one "
            "of each for every example, and at least one example."
        )
    if not np.isfinite(predicted_error).all():
        raise ValueError("Some predicted errors are not finite numbers; find out why.")
    if not len(thresholds) or np.isnan(thresholds).any() or (np.diff(thresholds) <= 0).any():
        raise ValueError(
            f"`thresholds={tuple(thresholds)}` do not rise from the strictest to the most lenient; "
            "pass each once, in order, as quantiles of the predicted error in training."
        )
    rows = []
    for threshold in thresholds:
        given = predicted_error <= threshold
        answered, wrong = int(given.sum()), int((given & ~correct).sum())
        bound = upper_share(wrong, answered, delta)
        rows.append(Answered(float(threshold), answered, wrong, bound))
        if bound > alpha:
            break
    base = float(1 - correct.mean())
    return Withholding(alpha, delta, len(correct), base, tuple(rows))


def withholding_thresholds(
    predicted_error: Float[np.ndarray, " example"],
    n: int,
    *,
    alpha: float,
    delta: float = 0.05,
    correct: Bool[np.ndarray, " example"] | None = None,
) -> tuple[float, ...]:
    """Return thresholds to test on `n` examples: quantiles of the predicted error in training.

    A sequence that begins where nothing can be certified ends there. So the strictest is the one
    with the greatest chance, if `n` examples are like those of training, where `correct` says which
    answers were; without, so many answers pass that a third of alpha wrong among them would do.
    """
    shares = np.linspace(0.05, 1, 20)
    if correct is None:
        answers = withholding_size(1.0, alpha / 3, alpha, delta=delta, target=0.7) or n
        first = min(0.9, max(0.1, answers / n))
    else:
        wrong = ~correct[np.argsort(predicted_error)]
        counts = [math.ceil(share * len(wrong)) for share in shares]
        chances = [
            _chance(max(1, int(share * n)), float(wrong[:count].mean()), alpha, delta)
            for share, count in zip(shares, counts, strict=True)
        ]
        first = float(shares[int(np.argmax(chances))])
    return tuple(np.unique(np.quantile(predicted_error, np.linspace(first, 1, 10))).tolist())


def _chance(answered: int, risk: float, alpha: float, delta: float) -> float:
    """Return the probability that so many answers certify `alpha`, if a `risk` of them is wrong."""
    # Most wrong answers at which the exact test still rejects: its level rises with their number.
    counts = np.arange(answered + 1)
    most = int(np.searchsorted(special.bdtr(counts, answered, alpha), delta, side="right")) - 1
    return float(special.bdtr(most, answered, risk)) if most >= 0 else 0.0


def least_withheld(base: float, alpha: float) -> float:
    """Return the least share to withhold so that at most `alpha` of the answers are wrong.

    `(base - alpha) / (1 - alpha)` for a model that is wrong in a share `base` of its answers: what
    a probe withholds that knows every error. A real one withholds more.
    """
    if not 0 <= base <= 1:
        raise ValueError(f"`base={base:g}` is not a share between 0 and 1; pass one, as 0.2.")
    check_probability("alpha", alpha)
    return max(0.0, (base - alpha) / (1 - alpha))


def least_answered(alpha: float, delta: float = 0.05) -> int:
    """Return the fewest answers that can certify `alpha`, if none of them is wrong."""
    check_probability("alpha", alpha)
    check_probability("delta", delta)
    return math.ceil(math.log(delta) / math.log1p(-alpha))


def withholding_size(
    share: float, risk: float, alpha: float, *, delta: float = 0.05, target: float = 0.8
) -> int | None:
    """Return about how many examples certify `alpha` with probability `target`.

    If a `share` of them is answered and a `risk` of the answered is wrong. None where the risk is
    not below alpha, or more than a million answers would be needed.
    """
    for name, value in (("share", share), ("alpha", alpha), ("delta", delta), ("target", target)):
        check_probability(name, value, one=name == "share")
    if not 0 <= risk < alpha:
        return None

    def reached(answered: int) -> float:
        return _chance(answered, risk, alpha, delta)

    high = least_answered(alpha, delta)
    while reached(high) < target:
        high *= 2
        if high > 1_000_000:
            return None
    low = high // 2
    while high - low > max(1, low // 200):
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= target else (middle, high)
    return math.ceil(high / share)


def withholding_table(
    base: float, alpha: float, *, delta: float = 0.05, target: float = 0.8
) -> list[dict[str, float | int | None]]:
    """Return the examples needed to certify `alpha`, by the risk that is left among the answers.

    For each risk the share that is answered at most: `(1 - base) / (1 - risk)`, by a probe that
    withholds errors and nothing else. A real one answers less and needs more.
    """
    least_withheld(base, alpha)
    rows = []
    for risk in (0.0, alpha / 4, alpha / 2, 3 * alpha / 4):
        share = min(1.0, (1 - base) / (1 - risk))
        n = withholding_size(share, min(risk, base), alpha, delta=delta, target=target)
        rows.append({"risk": risk, "answered": share, "n": n})
    return rows
