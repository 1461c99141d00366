"""How good a probe's scores are: every metric for all layers and penalties at once.

Scores are log-odds of error. On the *error scale* they pass through the sigmoid and are compared
with the observed error; on the *score scale* they are compared with the logit of the clipped error.
Each metric stands beside its *dummy*, what the constant prediction "the training mean" would get.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

METRICS = (
    "rmse",
    "mse",
    "r2",
    "score_rmse",
    "score_mse",
    "score_r2",
    "auroc",
    "balanced_accuracy",
    "ece",
)
"""Error scale first, then score scale, then ranking and calibration."""

LOWER_IS_BETTER = frozenset({"rmse", "mse", "score_rmse", "score_mse", "ece"})


def logit_error(error: Float[Tensor, "*example"], clip: float) -> Float[Tensor, "*example"]:
    """Return `logit(error)` with the error clipped to `[clip, 1 - clip]`, in float64."""
    return torch.logit(error.double(), eps=clip)


def auroc(
    score: Float[Tensor, "*fit example"], positive: Bool[Tensor, " example"]
) -> Float[Tensor, "*fit"]:
    """Return the chance that a positive example scores above a negative one, ties counting half.

    NaN where one of the two classes is absent.
    """
    high, low = score[..., positive].contiguous(), score[..., ~positive].sort(-1).values
    if high.shape[-1] == 0 or low.shape[-1] == 0:
        return torch.full(score.shape[:-1], torch.nan).to(score)
    below = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)
    return below.to(score).mean(-1) / (2 * low.shape[-1])


def auroc_within(
    score: Float[Tensor, " example"], incorrect: Bool[Tensor, " example"], kinds: Sequence[str]
) -> float:
    """Return the AUROC over pairs of examples of the same kind; NaN where there is no such pair.

    Where failure goes together with the kind of question, a probe of the kind has a high AUROC
    and says nothing about the failure of a question.
    """
    hits = pairs = 0.0
    for kind in dict.fromkeys(kinds):
        rows = torch.tensor([each == kind for each in kinds])
        wrong, right = score[rows & incorrect], score[rows & ~incorrect]
        ahead = (wrong[:, None] - right).sign()
        hits, pairs = hits + (ahead + 1).sum().item() / 2, pairs + ahead.numel()
    return hits / pairs if pairs else float("nan")


def balanced_accuracy(
    score: Float[Tensor, "*fit example"], positive: Bool[Tensor, " example"]
) -> Float[Tensor, "*fit"]:
    """Return the mean of the two recalls when a score above 0 (error above .5) means positive."""
    hit = (score > 0) == positive
    return (hit[..., positive].to(score).mean(-1) + hit[..., ~positive].to(score).mean(-1)) / 2


def calibration_error(
    predicted: Float[Tensor, "*fit example"],
    observed: Float[Tensor, " example"],
    *,
    n_bins: int = 10,
) -> Float[Tensor, "*fit"]:
    """Return the expected calibration error over bins of equal width on the predicted error."""
    bin_of = (predicted * n_bins).long().clamp(0, n_bins - 1)
    surplus = torch.zeros(*predicted.shape[:-1], n_bins).to(predicted)
    surplus.scatter_add_(-1, bin_of, predicted - observed)
    return surplus.abs().sum(-1) / predicted.shape[-1]


def measure(
    score: Float[Tensor, "*fit example"],
    error: Float[Tensor, " example"],
    incorrect: Bool[Tensor, " example"],
    *,
    clip: float,
) -> dict[str, Float[Tensor, "*fit"]]:
    """Return every metric of `METRICS` for every fit."""
    predicted = torch.sigmoid(score)
    target = logit_error(error, clip)
    mse = (predicted - error).square().mean(-1)
    score_mse = (score - target).square().mean(-1)
    return {
        "rmse": mse.sqrt(),
        "mse": mse,
        "r2": _explained(mse, error),
        "score_rmse": score_mse.sqrt(),
        "score_mse": score_mse,
        "score_r2": _explained(score_mse, target),
        "auroc": auroc(score, incorrect),
        "balanced_accuracy": balanced_accuracy(score, incorrect),
        "ece": calibration_error(predicted, error),
    }


def _explained(mse: Float[Tensor, "*fit"], observed: Float[Tensor, " example"]) -> Tensor:
    """Return R2; NaN where the observed values do not vary."""
    variance = observed.var(correction=0)
    return torch.where(variance > 0, 1 - mse / variance, torch.nan)
