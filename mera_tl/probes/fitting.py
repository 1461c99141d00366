"""Fit error probes: every layer on all examples, penalties and layers chosen on shared folds.

The metrics kept with a probe are from those folds (see `cross_validation`), a little optimistic by
the choice; `LinearProbe.measure` scores it on examples that no fit has seen.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pandas as pd
import torch

from mera_tl.probes import metrics
from mera_tl.probes.cross_validation import (
    FULL,
    LASSO,
    REGRESSIONS,
    Grid,
    Kind,
    fit_grid,
    held_out_table,
)
from mera_tl.probes.examples import Mixture, Position, as_parts, read_examples
from mera_tl.probes.probe import LinearProbe

logger = logging.getLogger(__name__)

Rank = Literal["best", "median", "worst"]

PENALTIES: Mapping[str, float | Sequence[float]] = {
    "ridge": 3.0,
    "least_squares": 0.0,
    "lasso": LASSO,
    "logistic": 1.0,
    "logistic_l2": 1.0,
    "contrastive": 0.0,
}
"""Ridge is regularised far beyond what predicts best: the shortest shift along a well-fitting
probe hides in directions of little variance and changes no answer."""


def fit_error_probe(
    activations: Mixture,
    *,
    kind: Kind = "ridge",
    position: Position = "last",
    penalty: float | Sequence[float] | None = None,
    clip: float = 0.01,
    seed: int = 0,
) -> LinearProbe:
    """Fit one probe per layer on all examples, and find the best layer on shared folds.

    Features are standardised, with the scale folded back into the weights. The regressions are
    fitted to `logit(error)`, the logistic probes to incorrectness. Of several penalties each layer
    takes the best one. As scikit-learn's (for n examples):

        ridge           Ridge(alpha=n * penalty), scaled; 3 by default, strong, meant for steering
        least_squares   LinearRegression()
        lasso           Lasso(alpha=penalty)
        logistic        LogisticRegression(C=1/penalty, l1_ratio=1)
        logistic_l2     LogisticRegression(C=1/penalty)
        contrastive     mean(h | most error) - mean(h | least error), scaled; the penalty is the
                        number of examples in each mean, 0 for half of them

    "Scaled": a regression in one dimension on held-out examples makes their scores log-odds.

    Args:
        activations: what `collect` returned, of one task or of several.
        kind: the kind of fit.
        position: where the activations were read: the final prompt token or the answer token.
        penalty: one, or several to choose from; by default `PENALTIES[kind]`.
        clip: errors are clipped to [clip, 1 - clip] before the logit.
        seed: of the folds.

    Raises:
        ValueError: if these are not activations, there is no such kind, penalty or clip, there are
            fewer than 10 examples, a logistic probe has one class only, or an activation is not
            finite.
    """
    if not isinstance(kind, str) or kind not in PENALTIES:
        raise ValueError(f"There is no probe {kind!r}; pass one of {', '.join(PENALTIES)}.")
    wanted = PENALTIES[kind] if penalty is None else penalty
    penalties = tuple(wanted) if isinstance(wanted, Sequence) else (wanted,)
    if not penalties or not all(
        isinstance(p, int | float) and 0 <= p < torch.inf for p in penalties
    ):
        raise ValueError(f"penalty={penalty!r} is not a finite number of 0 or more, or several.")
    grid = {kind: penalties}
    return _fit(activations, grid, "best", position, clip, seed)


def fit_ranked_probe(
    activations: Mixture,
    rank: Rank,
    *,
    position: Position = "last",
    clip: float = 0.01,
    seed: int = 0,
) -> LinearProbe:
    """Fit the paper's seven regressions; each layer takes the best, median or worst held-out one.

    Raises:
        ValueError: as `fit_error_probe`.
    """
    return _fit(activations, REGRESSIONS, rank, position, clip, seed)


def probe_path(
    activations: Mixture,
    *,
    untouched: Mixture | None = None,
    grid: Grid = FULL,
    positions: Sequence[Position] = ("last",),
    clip: float = 0.01,
    seed: int = 0,
) -> pd.DataFrame:
    """Fit every kind and penalty for every layer and position: one row each, with all metrics.

    Held-out metrics are for choosing (see `held_out_table`). Reporting takes the columns
    `untouched_*`: the fit on all examples, measured on activations that no fold has seen.

    Raises:
        ValueError: as `fit_error_probe`.
    """
    tables = []
    for position in positions:
        examples = read_examples(activations, position)
        fits = fit_grid(examples, grid, clip=clip, seed=seed, refit=untouched is not None)
        table = held_out_table(examples, fits, clip=clip, seed=seed)
        table.insert(0, "position", position)
        if untouched is not None:
            fresh = read_examples(untouched, position)
            score = fits.score(fresh.resid.double(), -1)
            values = metrics.measure(score, fresh.error.double(), fresh.incorrect, clip=clip)
            for name, value in values.items():
                table[f"untouched_{name}"] = value.flatten().tolist()
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def choose_fits(table: pd.DataFrame, *, by: str = "rmse", rank: Rank = "best") -> pd.DataFrame:
    """Return, per layer, the row of a `probe_path` table that ranks so by a held-out metric."""
    ordered = table.dropna(subset=by).sort_values(
        by, ascending=by in metrics.LOWER_IS_BETTER, kind="stable"
    )
    share = {"best": 0.0, "median": 0.5, "worst": 1.0}[rank]
    groups = [group for _, group in ordered.groupby("layer")]
    return pd.concat([group.iloc[[round(share * (len(group) - 1))]] for group in groups])


def _fit(
    activations: Mixture, grid: Grid, rank: Rank, position: Position, clip: float, seed: int
) -> LinearProbe:
    if not 0 < clip < 0.5:
        raise ValueError(f"clip={clip!r} is not between 0 and 0.5; pass a small error, as 0.01.")
    examples = read_examples(activations, position)
    fits = fit_grid(examples, grid, clip=clip, seed=seed)
    table = held_out_table(examples, fits, clip=clip, seed=seed)
    by = "auroc" if all(kind.startswith("logistic") for kind in grid) else "rmse"
    # With nothing to rank by (a fold of one class) every layer keeps its first fit.
    known = table.assign(**{by: table[by].fillna(-1.0 if by == "auroc" else torch.inf)})
    chosen = choose_fits(known, by=by, rank=rank)
    layers = torch.arange(len(fits.weights))
    fit = torch.from_numpy(chosen.index.to_numpy(copy=True)) - layers * len(fits.kinds)
    weights = fits.weights[layers, -1, fit].float()
    _say_unread((weights == 0).all(-1).tolist(), "/".join(grid), position)
    best_layer = int(chosen[by].to_numpy().argsort(kind="stable")[-1 if by == "auroc" else 0])
    return LinearProbe(
        weights=weights,
        bias=fits.bias[layers, -1, fit].float(),
        resid_norm=examples.resid.norm(dim=-1).median(-1).values,
        position=position,
        kind=fits.kinds[int(fit[best_layer])],
        penalty=fits.penalties[int(fit[best_layer])],
        best_layer=best_layer,
        clip=clip,
        metrics=tuple(table.loc[chosen.index].to_dict("records")),
        manifest=_manifest(activations),
    )


def _say_unread(unread: Sequence[bool], kinds: str, position: Position) -> None:
    layers = [str(layer) for layer, is_unread in enumerate(unread) if is_unread]
    where = f"layer{'s' * (len(layers) > 1)} {', '.join(layers)}"
    if layers:
        logger.log(
            logging.WARNING if all(unread) else logging.INFO,
            "Nothing could be read in %s (%s, position %r): weights are zero there, and nothing is "
            "steered.",
            "any layer" if all(unread) else where,
            kinds,
            position,
        )


def _manifest(activations: Mixture) -> dict[str, Any]:
    """Return what is said of activations, and of a mixture that of all parts."""
    parts = [part.origin for part in as_parts(activations)]
    if len(parts) == 1:
        return parts[0]
    names = ("task", "data_hash", "n", "source", "rows")
    return {**parts[0], "mixture": [{name: part.get(name) for name in names} for part in parts]}
