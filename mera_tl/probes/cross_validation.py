"""Fit every kind of probe on shared folds, and measure each where it was not fitted.

Texts are assigned to ten blocks, with all their copies; each of five folds fits on seven and holds
out three, and one last fit uses them all. Every layer, kind and penalty meets the same folds, so
that a comparison is paired and their sums are shared. Features are standardised once per layer,
without a look at the targets, and the scale is folded back: a probe acts on raw `h`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mera_tl.probes import metrics
from mera_tl.probes.examples import Examples
from mera_tl.probes.lasso import lasso_path
from mera_tl.probes.least_squares import Problems, Solution, ridge_path
from mera_tl.probes.logistic import logistic_path

logger = logging.getLogger(__name__)

Kind = Literal["ridge", "least_squares", "lasso", "logistic", "logistic_l2", "contrastive"]
Grid = Mapping[str, Sequence[float]]
"""Penalties by kind. Ridge: in units of the mean feature variance. Lasso: scikit-learn's alpha.
Logistic: 1/C. Contrastive: number of pairs, 0 for half of the examples. Least squares: 0."""

LASSO = (0.5, 0.25, 0.1, 0.05, 0.01, 0.005)
PUBLISHED: Grid = {"least_squares": (0.0,), "lasso": LASSO, "logistic": (1.0,)}
"""The paper's fits."""
REGRESSIONS: Grid = {"least_squares": (0.0,), "lasso": LASSO}
FULL: Grid = {
    "ridge": (0.01, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0),
    **PUBLISHED,
    "contrastive": (0.0, 50.0, 100.0, 200.0),
}

N_FOLDS, N_BLOCKS, HELD_OUT_BLOCKS = 5, 10, 3
CHUNK_BYTES = 1 << 30
"""Layers are fitted in chunks whose matrices stay near this size, one layer at least."""


@dataclass(frozen=True, eq=False)
class Fits:
    """All probes of a grid, on every fold and, last, where they were refitted, on all examples."""

    kinds: tuple[str, ...]
    penalties: tuple[float, ...]
    weights: Float[Tensor, "layer fold fit d_model"]
    bias: Float[Tensor, "layer fold fit"]

    def score(
        self, resid: Float[Tensor, "layer example d_model"], fold: int
    ) -> Float[Tensor, "layer fit example"]:
        """Return the scores of one fold's probes."""
        weights = self.weights[:, fold].to(resid)
        score = einsum(weights, resid, "layer fit d, layer example d -> layer fit example")
        return score + self.bias[:, fold, :, None].to(resid)


def folds(
    incorrect: Bool[Tensor, " example"],
    seed: int,
    texts: Int[Tensor, " example"] | None = None,
) -> Bool[Tensor, "fold example"]:
    """Return which examples each fold fits on: seven tenths, the held-out three moving round.

    Texts are assigned to ten blocks at random, errors and correct ones evenly; `texts` numbers
    them from 0. A copy of what was fitted to is nothing held out, so copies share a block.

    Raises:
        ValueError: if there are fewer texts than blocks.
    """
    texts = torch.arange(len(incorrect)) if texts is None else texts.cpu()
    n = len(texts.unique())
    if n < N_BLOCKS:
        raise ValueError(
            f"A probe needs at least {N_BLOCKS} examples of different texts, to hold some out, "
            f"but got {n}; collect more."
        )
    # A text whose copies are answered differently counts by whether any of them is wrong.
    wrong = torch.zeros(n, dtype=torch.long).index_add(0, texts, incorrect.cpu().long()) > 0
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[wrong[shuffled].long().argsort(stable=True)]
    block = torch.empty(n, dtype=torch.long)
    block[by_class] = torch.arange(n) % N_BLOCKS
    first = torch.arange(N_FOLDS)[:, None] * HELD_OUT_BLOCKS
    return ((block[texts] - first) % N_BLOCKS >= HELD_OUT_BLOCKS).to(incorrect.device)


def fit_grid(examples: Examples, grid: Grid, *, clip: float, seed: int, refit: bool = True) -> Fits:
    """Fit every kind and penalty of a grid for every layer, on every fold.

    With `refit`, one last fold holds the fits to all examples.

    Raises:
        ValueError: if examples are too few, or a logistic probe has only one class to learn.
    """
    _require_targets(examples, grid)
    use = folds(examples.incorrect, seed, examples.texts)
    use = torch.cat([use, torch.ones_like(use[: int(refit)])])
    n_layers, _, width = examples.resid.shape
    per_chunk = max(1, CHUNK_BYTES // (8 * width * width * (N_BLOCKS + 2 * N_FOLDS)))
    parts = []
    for start in range(0, n_layers, per_chunk):
        some = replace(examples, resid=examples.resid[start : start + per_chunk])
        layers = _Layers.of(some, use, clip)
        parts.append([layers.fit(kind, tuple(penalties)) for kind, penalties in grid.items()])
    kinds, penalties = zip(*((k, p) for k, many in grid.items() for p in many), strict=True)
    weights = torch.cat([torch.cat([w for w, _ in part], dim=2) for part in parts])
    bias = torch.cat([torch.cat([b for _, b in part], dim=2) for part in parts])
    return Fits(kinds, penalties, weights, bias)


def _require_targets(examples: Examples, grid: Grid) -> None:
    """Say what cannot be learnt from these targets."""
    one_class = examples.incorrect.all() or not examples.incorrect.any()
    if one_class and any(kind.startswith("logistic") for kind in grid):
        every = "incorrect" if examples.incorrect.any() else "correct"
        raise ValueError(
            f"A logistic probe needs correct and incorrect answers, but all {len(examples)} are "
            f"{every}; collect more examples, or fit kind='ridge' to the error."
        )
    if examples.error.max() == examples.error.min():
        logger.warning(
            "The error is %.3g for all %d examples: there is nothing to read, and probes get no "
            "direction.",
            float(examples.error[0]),
            len(examples),
        )


@dataclass(frozen=True, eq=False)
class _Layers:
    """The problems of a few layers, on standardised features."""

    problems: Problems
    mean: Float[Tensor, "layer d_model"]
    scale: Float[Tensor, "layer d_model"]
    error: Float[Tensor, " example"]
    incorrect: Bool[Tensor, " example"]

    @staticmethod
    def of(examples: Examples, use: Bool[Tensor, "fold example"], clip: float) -> "_Layers":
        x = examples.resid.double()
        deviation, mean = torch.std_mean(x, dim=1, correction=0)
        # Below the resolution of float32 a feature is constant, and gets weight zero.
        varies = deviation > 1e-6 * examples.resid.abs().amax(1)
        scale = torch.where(varies, deviation, torch.inf)
        x = x.sub(mean[:, None]).div_(scale[:, None])
        problems = Problems(x, metrics.logit_error(examples.error, clip), use)
        return _Layers(problems, mean, scale, examples.error, examples.incorrect)

    def fit(
        self, kind: str, penalties: tuple[float, ...]
    ) -> tuple[Float[Tensor, "layer fold fit d_model"], Float[Tensor, "layer fold fit"]]:
        """Return weights and biases on raw activations."""
        match kind:
            case "least_squares":
                solution = ridge_path(self.problems, (0.0,))
            case "lasso":
                solution = lasso_path(self.problems, penalties)
            case "ridge":
                solution = self._rescaled(ridge_path(self.problems, penalties).coef)
            case "contrastive":
                differences = [self._contrast(int(n_pairs)) for n_pairs in penalties]
                solution = self._rescaled(torch.stack(differences, 2))
            case _:
                classes = replace(self.problems, target=self.incorrect.to(self.mean))
                solution = logistic_path(classes, penalties, l1=kind == "logistic")
        weights = solution.coef / self.scale[:, None, None]
        offset = einsum(weights, self.mean, "layer fold fit d, layer d -> layer fold fit")
        return weights, solution.intercept - offset

    def _contrast(self, n_pairs: int) -> Float[Tensor, "layer fold d_model"]:
        """Return mean(h | most error) - mean(h | least error) of each fold, on raw features."""
        differences = []
        for used in self.problems.use:
            rows = used.nonzero()[:, 0]
            rows = rows[self.error[rows].argsort(stable=True)]
            k = min(n_pairs or len(rows) // 2, len(rows) // 2)
            high, low = (self.problems.x[:, part].mean(1) for part in (rows[-k:], rows[:k]))
            differences.append(high - low)
        # The difference of raw features, as a weight on standardised ones.
        variance = torch.where(self.scale.isfinite(), self.scale.square(), 0.0)
        return torch.stack(differences, 1) * variance[:, None]

    def _rescaled(self, coef: Float[Tensor, "layer fold fit d_model"]) -> Solution:
        """Scale directions so that their projections are log-odds of error.

        The scale is the slope of the target on the projection, on examples that the direction was
        not fitted to: in-sample slopes are as overconfident as the fit. A fold takes the slope of
        the other folds, the last fit that of all. Where nothing can be read the slope is not
        positive, and the weights become zero.
        """
        held_out = replace(self.problems, use=~self.problems.use[:N_FOLDS])
        fits = coef[:, :N_FOLDS]
        score = einsum(fits, held_out.x, "layer fold fit d, layer n d -> layer fold fit n")
        weight, centred = held_out.weight[:, None], held_out.centred[:, None]
        covariance = (score * weight * centred).sum(-1)
        variance = (score.square() * weight).sum(-1) - (score * weight).sum(-1).square()
        covariance, variance = (
            torch.cat([part.sum(1, keepdim=True) - part, part.sum(1, keepdim=True)], 1)
            for part in (covariance, variance)
        )
        slope = torch.where(variance > 0, covariance / variance, 0.0).clamp(min=0)
        coef = coef * slope[:, : coef.shape[1], :, None]
        return Solution(coef, self.problems.intercept(coef), torch.zeros_like(coef[..., 0]))


def held_out_table(examples: Examples, fits: Fits, *, clip: float, seed: int) -> pd.DataFrame:
    """Measure every fit on the examples its fold held out: one row per layer, kind and penalty.

    Each metric has three columns: its mean over the folds that have it (an AUROC needs right and
    wrong answers held out), its spread `*_sd`, and `*_dummy`, the mean for the constant prediction
    "the mean error of the fold". `nonzero` counts the weights.
    """
    held_out = ~folds(examples.incorrect, seed, examples.texts)
    error, incorrect = examples.error.double(), examples.incorrect
    measured, dummies = [], []
    for fold, rows in enumerate(held_out):
        truth = (error[rows], incorrect[rows])
        score = fits.score(examples.resid[:, rows].double(), fold)
        measured.append(metrics.measure(score, *truth, clip=clip))
        constant = torch.logit(error[~rows].mean(), eps=clip).expand(1, int(rows.sum()))
        dummies.append(metrics.measure(constant, *truth, clip=clip))
    n_layers, _, n_fits = fits.bias.shape
    columns = {
        "layer": torch.arange(n_layers).repeat_interleave(n_fits).tolist(),
        "kind": list(fits.kinds) * n_layers,
        "penalty": list(fits.penalties) * n_layers,
        "nonzero": (fits.weights[:, :N_FOLDS] != 0).sum(-1).double().mean(1).flatten().tolist(),
    }
    for name in metrics.METRICS:
        values = torch.stack([fold[name] for fold in measured])
        mean, n_known = values.nanmean(0), (~values.isnan()).sum(0)
        columns[name] = mean.flatten().tolist()
        spread = ((values - mean).square().nansum(0) / (n_known - 1).clamp(min=0)).sqrt()
        columns[f"{name}_sd"] = spread.flatten().tolist()
        columns[f"{name}_dummy"] = float(torch.stack([fold[name] for fold in dummies]).nanmean())
    return pd.DataFrame(columns)
