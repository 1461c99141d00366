"""What is measured of a method on the test split, as a record and as a table."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import pandas as pd
import torch

from mera_tl.benchmark.recommendation import decided
from mera_tl.inference.outcomes import (
    Outcomes,
    accuracy_interval,
    paired_p_value,
    spi,
    spi_interval,
)
from mera_tl.methods.treatment import Treatment

UNLIKELY = 2.0
"""Times the unsteered perplexity above which replies are warned of. In `steer_free_text` (eight
replies of each measured) steering to five words had 3.0 to 4.9 times on five of six splits, and
next to no right answers left; everything else that was steered had .8 to 1.4, also steering to one
word, which had lost answers, too."""
MOVE_NOTHING = ("prompt_steering", "flip", "withhold", "class_probe", "retry", "best_of_k")
MOVE_NOTHING += ("best_of_k_scorer",)
"""Methods that change answers and no activation."""


def scores(outcomes: Outcomes, base: Outcomes) -> dict[str, Any]:
    """Return the metrics of a run against the unsteered run on the same examples."""
    return {
        "n": len(outcomes),
        "accuracy": outcomes.accuracy,
        "error": outcomes.mean_error,
        "accuracy_interval": list(accuracy_interval(outcomes)),
        "spi": spi(outcomes.accuracy, base.accuracy),
        "spi_interval": list(spi_interval(outcomes, base)),
        "p_value": paired_p_value(outcomes, base),
        "accuracy_change": outcomes.accuracy - base.accuracy,
        "error_change": outcomes.mean_error - base.mean_error,
        "transitions": outcomes.transitions(base),
        "unanswered": int((~outcomes.answered).sum()),
        "risk": 1 - outcomes.correct.sum().item() / max(1, int(outcomes.answered.sum())),
        "steered_share": outcomes.steered_share,
        "tokens_steered": outcomes.n_tokens.double().mean().item(),
        "layers_steered": outcomes.n_layers.double().mean().item(),
        "relative_shift": outcomes.relative_shift,
        **outcomes.weighted_scores(),
    }


def decision_of(treatment: Treatment) -> dict[str, Any]:
    """Return a record's fields about the certificate."""
    decision, trust = treatment.calibration, treatment.withholding
    if trust is not None:
        said = "ABSTAIN" if trust.threshold is None else "WITHHOLD"
        told = {"certificate": str(trust), "delta": trust.delta}
        return {"decision": said, "threshold": trust.threshold, **told}
    if decision is None:
        return dict.fromkeys(("decision", "threshold", "certificate", "delta"))
    return {
        "decision": decision.decision.value,
        "threshold": decision.strength if decision.threshold is None else decision.threshold,
        "certificate": str(decision),
        "delta": decision.terms.delta,
    }


def versions() -> dict[str, str]:
    """Return the versions that a number may depend on."""
    names = ("mera-tl", "torch", "transformer-lens", "transformers")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def table(records: Sequence[dict[str, Any]], *, full: bool = False) -> pd.DataFrame:
    """Return records as the table that a person reads; `full` with all that a record measures.

    Jobs that failed have no row.
    """
    done = [record for record in records if "failure" not in record]
    return pd.DataFrame([_row(record, full) for record in done])


def _row(record: dict[str, Any], full: bool) -> dict[str, Any]:
    row = {name: record[name] for name in ("model", "task", "method", "space", "seed", "n")}
    row |= {name: record[name] for name in ("accuracy", "error")} | {"SPI": record["spi"]}
    if full:
        row |= dict(zip(("SPI low", "SPI high"), record["spi_interval"], strict=True))
        row["p"] = record["p_value"]
    row |= {change: record["transitions"][change] for change in ("0->1", "1->0")}
    # What changes answers and no activation has no share of moved tokens, not one of zero.
    row["steered"] = float("nan") if record["method"] in MOVE_NOTHING else record["steered_share"]
    if full:
        # Records that are older than a measure lack it.
        row["tokens"], row["layers"] = record.get("tokens_steered"), record.get("layers_steered")
        row["shift"] = record.get("relative_shift")
        row |= {name: record[name] for name in ("precision", "recall", "f1")}
        text = record["free_text"] or {}
        row |= {name: text.get(name) for name in ("perplexity", "distinct_1", "distinct_2")}
        row["warnings"] = " ".join(record.get("warnings", ()))
    threshold = float("nan") if record["threshold"] is None else record["threshold"]
    return row | {
        "decision": decided(record["method"], record["decision"]),
        "threshold": threshold,
    }


def promise(records: Sequence[Mapping[str, Any]]) -> str:
    """Say how surely all certificates of a run hold together; nothing where there is none."""
    risks = [r.get("familywise_delta") or 0.0 for r in records if r.get("certificate")]
    if not any(risks):
        return ""
    return (
        f"All certificates of a run hold together with probability {1 - max(risks):.4g} or more "
        "over the draw of its calibration examples."
    )


def idle(name: str, outcomes: Outcomes, base: Outcomes) -> tuple[str, ...]:
    """Warn of a steering that moved tokens while no probability and no reply changed."""
    n_moved = int(outcomes.n_steered.sum())
    if not n_moved or not torch.allclose(outcomes.probs, base.probs, rtol=0, atol=1e-7):
        return ()
    if outcomes.replies != base.replies:
        return ()
    return (
        f"{name} moved {n_moved:,} (layer, token) pairs and no probability changed: what it moves "
        "does not reach the answers; steer other layers or positions.",
    )


def unlikely(
    name: str, text: Mapping[str, Any] | None, base: Mapping[str, Any] | None
) -> tuple[str, ...]:
    """Warn of replies that the unsteered model would hardly give: a form may be met by no text."""
    if not text or not base or not text["perplexity"] > UNLIKELY * base["perplexity"]:
        return ()
    return (
        f"Replies under {name} are odd to the unsteered model (perplexity "
        f"{text['perplexity']:.3g}, its own {base['perplexity']:.3g}): a scorer sees what it looks "
        "for only; read some of them before you rely on the gain.",
    )
