"""Where a model's errors can be read: one linear map per layer from the residual stream to error.

`score = w.h + b` predicts `logit(clip(error))`, so `sigmoid(score)` is the predicted error, and the
limit that belongs to a steering threshold is `logit(threshold)`. A logistic probe's score is the
log-odds of an incorrect answer instead. Penalties and layers are chosen on folds that all of them
share (`folds`); the metrics kept with a probe are from there, a little optimistic by the choice,
and `LinearProbe.measure` scores it on examples that no fit has seen.
"""

import html
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mera_tl import storage
from mera_tl.inference.activations import Activations
from mera_tl.models.model import Model
from mera_tl.probes import metrics
from mera_tl.probes.cross_validation import LASSO as LASSO_PENALTIES
from mera_tl.probes.cross_validation import (
    REGRESSIONS,
    Examples,
    Grid,
    Kind,
    fit_grid,
    held_out_table,
)

logger = logging.getLogger(__name__)

Position = Literal["last", "exact"]
Rank = Literal["best", "median", "worst"]
Tasks = Activations | Sequence[Activations]
"""The activations of one task, or of several, which are then mixed."""

PENALTIES: Mapping[str, float | Sequence[float]] = {
    "ridge": 3.0,
    "least_squares": 0.0,
    "lasso": LASSO_PENALTIES,
    "logistic": 1.0,
    "logistic_l2": 1.0,
    "contrastive": 0.0,
}
"""Ridge is regularised far beyond what predicts best: the shortest shift along a well-fitting
probe hides in directions of little variance and changes no answer."""


_SHOWN = ("layer", "nonzero", "rmse", "rmse_sd", "rmse_dummy", "r2", "auroc", "ece")
"""Columns of the table that a notebook shows; `table` has all."""


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """One linear map per layer, or per (unsteered answer, layer), that predicts error.

    Its score is the log-odds of error. Error is an exclusive or of the truth and the answer, which
    no linear map can read; given the answer it is the truth, which one can. So a probe may have a
    map per answer, and then the answer must be known before it is read.
    """

    weights: Float[Tensor, "*answer layer d_model"] = field(repr=False)
    """On raw activations; all zero where nothing could be read, and then nothing is steered."""
    bias: Float[Tensor, "*answer layer"] = field(repr=False)
    resid_norm: Float[Tensor, " layer"] = field(repr=False)
    """Median norm of the residuals fitted to: the unit of additive strengths."""
    position: Position
    kind: str
    penalty: float
    """Of the best layer, where layers differ."""
    best_layer: int
    """The layer with the best held-out score: least RMSE of error, or AUROC for logistic."""
    clip: float
    """Errors were clipped to [clip, 1 - clip] before the logit."""
    metrics: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    """One row per layer: held-out means over the folds, their spread `*_sd`, and `*_dummy`."""
    manifest: dict[str, Any] = field(default_factory=dict, repr=False)
    """Model, data, template and hook of the activations fitted to."""

    @property
    def per_answer(self) -> bool:
        """Whether there is a map per unsteered answer."""
        return self.weights.ndim == 3

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.weights.shape[-2]

    @staticmethod
    def of_answers(pooled: "LinearProbe", probes: Sequence["LinearProbe"]) -> "LinearProbe":
        """Return the probe that reads each answer's examples by a probe of their own.

        All else (residual norms, best layer, metrics) is that of `pooled`, the probe of all.
        """
        return replace(
            pooled,
            weights=torch.stack([probe.weights for probe in probes]),
            bias=torch.stack([probe.bias for probe in probes]),
        )

    def score(
        self,
        resid: Float[Tensor, "layer example d_model"],
        answers: Int[Tensor, " example"] | None = None,
    ) -> Float[Tensor, "layer example"]:
        """Return the log-odds of error that each layer predicts.

        `answers` are the options answered unsteered, for a probe per answer; -1, no answer, is
        read as the first.

        Raises:
            ValueError: if a probe per answer gets none.
        """
        weights, bias = self.weights.to(resid), self.bias.to(resid)
        if not self.per_answer:
            score = einsum(resid, weights, "layer example d, layer d -> layer example")
            return score + bias[:, None]
        if answers is None:
            raise ValueError(
                f"This probe has a map for each of {len(weights)} answers; pass the unsteered "
                "answers, as score(resid, outcomes.predictions)."
            )
        own = answers.to(resid.device).clamp(min=0)
        score = einsum(resid, weights[own], "layer example d, example layer d -> layer example")
        return score + bias[own].T

    def predicted_error(
        self,
        resid: Float[Tensor, "layer example d_model"],
        answers: Int[Tensor, " example"] | None = None,
    ) -> Float[Tensor, "layer example"]:
        """Return the error that each layer predicts, in (0, 1)."""
        return torch.sigmoid(self.score(resid, answers))

    @property
    def table(self) -> pd.DataFrame:
        """The held-out metrics, one row per layer."""
        return pd.DataFrame(list(self.metrics))

    def measure(self, activations: Tasks) -> pd.DataFrame:
        """Score the probe on examples it was not fitted to: one row per layer, all metrics."""
        examples = read_examples(activations, self.position)
        score = self.score(examples.resid).double()
        truth = (examples.error.double(), examples.incorrect)
        return pd.DataFrame(
            {"layer": range(len(score))} | metrics.measure(score, *truth, clip=self.clip)
        )

    def save(self, folder: str | Path) -> Path:
        """Write `probe.safetensors` and, last, its manifest `probe.json`; return the folder."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        tensors = {name: v for name, v in values.items() if isinstance(v, Tensor)}
        storage.save_tensors(Path(folder) / "probe.safetensors", tensors)
        plain = {name: v for name, v in values.items() if name not in tensors}
        storage.write_json(Path(folder) / "probe.json", plain)
        return Path(folder)

    @staticmethod
    def load(folder: str | Path) -> "LinearProbe":
        """Read a probe that `save` wrote.

        Raises:
            ValueError: if a file is missing or damaged.
        """
        plain = storage.read_json(Path(folder) / "probe.json")
        tensors = storage.load_tensors(Path(folder) / "probe.safetensors")
        return LinearProbe(**tensors, **plain | {"metrics": tuple(plain["metrics"])})

    def check(self, model: Model) -> None:
        """Refuse a model other than the one whose activations were fitted.

        Raises:
            ValueError: naming what differs.
        """
        for name, got in model.manifest.items():
            fitted = self.manifest.get(name, got)
            if name not in ("model", "dtype") and fitted != got:
                raise ValueError(
                    f"This probe was fitted on {self.manifest.get('model')} with {name} {fitted}, "
                    f"but {model.name} has {name} {got}; fit a probe on this model first."
                )

    def _repr_html_(self) -> str:
        title = f"LinearProbe: {self.kind}, penalty {self.penalty:g}, position {self.position}"
        shown = [name for name in _SHOWN if self.metrics and name in self.metrics[0]]
        rows = self.table[shown].to_html(index=False, float_format="%.3f") if shown else ""
        return f"<p>{html.escape(title)}, best layer {self.best_layer}</p>{rows}"


def fit_error_probe(
    activations: Tasks,
    *,
    kind: Kind = "ridge",
    position: Position = "last",
    penalty: float | Sequence[float] | None = None,
    clip: float = 0.01,
    seed: int = 0,
) -> LinearProbe:
    """Fit one probe per layer on all examples, and find the best layer on shared folds.

    The default, strongly regularised ridge, is meant for steering. Of several penalties each layer
    takes the best one. Units: ridge, the mean feature variance; lasso, scikit-learn's alpha;
    logistic, 1/C; contrastive, the number of pairs with most and least error (0: half of the
    examples). Directions of ridge and contrastive probes are scaled by a regression in one
    dimension on held-out examples, so that scores are log-odds.

    Raises:
        ValueError: if there are too few examples, a logistic probe has one class only, or an
            activation is not finite.
    """
    wanted = PENALTIES[kind] if penalty is None else penalty
    grid = {kind: tuple(wanted) if isinstance(wanted, Sequence) else (wanted,)}
    return _fit(activations, grid, "best", position, clip, seed)


def fit_ranked_probe(
    activations: Tasks,
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


def choose(table: pd.DataFrame, *, by: str = "rmse", rank: Rank = "best") -> pd.DataFrame:
    """Return, per layer, the row of a `probe_path` table that ranks so by a held-out metric."""
    ordered = table.dropna(subset=by).sort_values(
        by, ascending=by in metrics.LOWER_IS_BETTER, kind="stable"
    )
    share = {"best": 0.0, "median": 0.5, "worst": 1.0}[rank]
    groups = [group for _, group in ordered.groupby("layer")]
    return pd.concat([group.iloc[[round(share * (len(group) - 1))]] for group in groups])


def read_examples(activations: Tasks, position: Position) -> Examples:
    """Return what a probe sees: only answered examples at `exact`, all of them at `last`.

    Raises:
        ValueError: if none is left, models are mixed, or an activation is not finite.
    """
    parts = [activations] if isinstance(activations, Activations) else list(activations)
    models = {str(part.manifest.get("model_fingerprint")) for part in parts}
    if len(models) > 1:
        raise ValueError(
            f"A probe reads one model, but these activations come from {len(models)} "
            f"(fingerprints {', '.join(sorted(models))}); fit one probe each."
        )
    kept = [part.outcomes.answered | (position == "last") for part in parts]
    pairs = list(zip(parts, kept, strict=True))
    n, n_kept = sum(map(len, kept)), sum(int(k.sum()) for k in kept)
    if n_kept < n:
        logger.info(
            "%d of %d examples were not answered, so they have no %r position and are left out.",
            n - n_kept,
            n,
            position,
        )
    if n_kept == 0:
        raise ValueError(
            f"None of {n} examples has a {position!r} position; collect examples the model "
            "answers, or use position='last'."
        )
    return Examples(
        torch.cat([part.resid(position)[:, k] for part, k in pairs], dim=1),
        torch.cat([part.error[k] for part, k in pairs]),
        torch.cat([~part.correct[k] for part, k in pairs]),
    )


def _fit(
    activations: Tasks, grid: Grid, rank: Rank, position: Position, clip: float, seed: int
) -> LinearProbe:
    examples = read_examples(activations, position)
    fits = fit_grid(examples, grid, clip=clip, seed=seed)
    table = held_out_table(examples, fits, clip=clip, seed=seed)
    by = "auroc" if all(kind.startswith("logistic") for kind in grid) else "rmse"
    # With nothing to rank by (a fold of one class) every layer keeps its first fit.
    known = table.assign(**{by: table[by].fillna(-1.0 if by == "auroc" else torch.inf)})
    chosen = choose(known, by=by, rank=rank)
    layers = torch.arange(len(fits.weights))
    fit = torch.from_numpy(chosen.index.to_numpy(copy=True)) - layers * len(fits.kinds)
    weights = fits.weights[layers, -1, fit].float()
    unread = (weights == 0).all(-1).nonzero()[:, 0].tolist()
    if unread:
        level = logging.INFO if len(unread) < len(weights) else logging.WARNING
        logger.log(
            level,
            "Nothing could be read in layers %s (%s, position %r): their weights are zero, and "
            "they will not be steered.",
            ", ".join(map(str, unread)),
            "/".join(grid),
            position,
        )
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


def _manifest(activations: Tasks) -> dict[str, Any]:
    """Return the activations' manifest; of a mixture the first, with what the others are."""
    if isinstance(activations, Activations):
        return dict(activations.manifest)
    mixture = [{k: a.manifest.get(k) for k in ("task", "data_hash", "n")} for a in activations]
    return {**activations[0].manifest, "mixture": mixture}
