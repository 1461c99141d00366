"""Where a model's errors can be read: one linear map per layer from the residual stream to error.

`score = w.h + b` predicts `logit(clip(error))`, so `sigmoid(score)` is the predicted error and the
limit of a steering threshold is `logit(threshold)`. Fits standardise the features and fold that
back, so a probe acts on raw `h`. Layers are compared on folds that all of them share; a probe's
own metrics are therefore optimistic by the choice, and `LinearProbe.measure` scores it on
examples that no fit has seen.
"""

import html
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mera_tl import scoring, solvers, store

logger = logging.getLogger(__name__)

Position = Literal["last", "exact"]
Kind = Literal["least_squares", "ridge"]

DEFAULT_PENALTY = {"least_squares": 0.0, "ridge": 3.0}
"""Ridge is regularised far beyond what predicts best: the shortest shift along a well-fitting
probe hides in directions of little variance and changes no answer."""

N_FOLDS, N_BLOCKS, HELD_OUT_BLOCKS = 5, 10, 3


@runtime_checkable
class Readings(Protocol):
    """What a probe is fitted to: `mera_tl.Activations`, or anything with these members."""

    @property
    def error(self) -> Any: ...  # noqa: D102
    @property
    def correct(self) -> Any: ...  # noqa: D102
    @property
    def outcomes(self) -> Any: ...  # noqa: D102
    @property
    def manifest(self) -> Any: ...  # noqa: D102

    def resid(self, position: Any) -> Any: ...  # noqa: D102


@dataclass(frozen=True, eq=False)
class Examples:
    """What a probe sees of some examples: only answered ones at `exact`, all of them at `last`."""

    resid: Float[Tensor, "layer example d_model"]
    error: Float[Tensor, " example"]
    incorrect: Bool[Tensor, " example"]

    def __len__(self) -> int:
        return len(self.error)

    @staticmethod
    def of(activations: Readings | Sequence[Readings], position: Position) -> "Examples":
        """Read one task's activations, or a mixture of several.

        Raises:
            ValueError: if nothing is left at this position, or an activation is not finite.
        """
        parts = activations if isinstance(activations, Sequence) else [activations]
        kept = [torch.as_tensor(part.outcomes.answered) | (position == "last") for part in parts]
        examples = Examples(
            torch.cat([a.resid(position)[:, k] for a, k in zip(parts, kept, strict=True)], dim=1),
            torch.cat([torch.as_tensor(a.error)[k] for a, k in zip(parts, kept, strict=True)]),
            torch.cat([~torch.as_tensor(a.correct)[k] for a, k in zip(parts, kept, strict=True)]),
        )
        n = sum(len(k) for k in kept)
        if len(examples) < n:
            logger.info(
                "%d of %d examples were not answered and have no %r position; they are left out.",
                n - len(examples),
                n,
                position,
            )
        broken = ~examples.resid.isfinite().all(-1)
        if broken.any():
            raise ValueError(
                f"Activations at {position!r} are not finite for {int(broken.any(0).sum())} of "
                f"{len(examples)} examples (first in layer {int(broken.any(1).nonzero()[0])}); "
                "load the model in float32 or leave these examples out."
            )
        return examples


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """One linear map per layer whose score predicts the log-odds of error."""

    weights: Float[Tensor, "layer d_model"]
    bias: Float[Tensor, " layer"]
    resid_norm: Float[Tensor, " layer"]
    """Median norm of the residuals fitted to: the unit of additive strengths."""
    position: Position
    kind: str
    penalty: float
    best_layer: int
    """The layer with the best held-out score: least RMSE of predicted error."""
    clip: float
    metrics: tuple[dict[str, Any], ...] = ()
    """One row per layer: held-out means over the folds, their spread `*_sd`, and `*_dummy`."""
    manifest: dict[str, Any] | None = None

    def score(
        self, resid: Float[Tensor, "layer example d_model"]
    ) -> Float[Tensor, "layer example"]:
        """Return the log-odds of error that each layer predicts."""
        return (
            einsum(resid, self.weights.to(resid), "layer example d, layer d -> layer example")
            + self.bias.to(resid)[:, None]
        )

    def predicted_error(
        self, resid: Float[Tensor, "layer example d_model"]
    ) -> Float[Tensor, "layer example"]:
        """Return the error that each layer predicts, in (0, 1)."""
        return torch.sigmoid(self.score(resid))

    @cached_property
    def table(self) -> pd.DataFrame:
        """The held-out metrics, one row per layer."""
        return pd.DataFrame(list(self.metrics))

    def measure(self, activations: Readings | Sequence[Readings]) -> pd.DataFrame:
        """Score the probe on examples it was not fitted to: one row per layer, all metrics."""
        examples = Examples.of(activations, self.position)
        score = self.score(examples.resid).double()
        measured = scoring.measure(
            score, examples.error.double(), examples.incorrect, clip=self.clip
        )
        return pd.DataFrame({"layer": range(len(score))} | measured)

    def save(self, folder: str | Path) -> Path:
        """Write `probe.safetensors` and, last, its manifest `probe.json`; return the folder."""
        folder = Path(folder)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        plain = {k: v for k, v in values.items() if k not in tensors}
        store.save_tensors(folder / "probe.safetensors", tensors)
        store.write_json(folder / "probe.json", plain)
        return folder

    @staticmethod
    def load(folder: str | Path) -> "LinearProbe":
        """Read a probe that `save` wrote.

        Raises:
            ValueError: if a file is missing or damaged.
        """
        plain = store.read_json(Path(folder) / "probe.json")
        tensors = store.load_tensors(Path(folder) / "probe.safetensors")
        return LinearProbe(**tensors, **plain | {"metrics": tuple(plain["metrics"])})

    def check(self, model: Any) -> None:
        """Refuse a model other than the one whose activations were fitted.

        Raises:
            ValueError: naming both models.
        """
        fitted = (self.manifest or {}).get("model", {})
        wanted = fitted.get("fingerprint")
        if wanted and wanted != model.fingerprint:
            raise ValueError(
                f"This probe was fitted on {fitted.get('name')} ({wanted}), but the model is "
                f"{model.name} ({model.fingerprint}); fit a probe on this model first."
            )

    def _repr_html_(self) -> str:
        title = f"LinearProbe: {self.kind}, penalty {self.penalty:g}, position {self.position}"
        return f"<p>{html.escape(title)}, best layer {self.best_layer}</p>" + (
            self.table.to_html(index=False, float_format="%.3f") if self.metrics else ""
        )


def fit_error_probe(
    activations: Readings | Sequence[Readings],
    *,
    kind: Kind = "ridge",
    position: Position = "last",
    penalty: float | None = None,
    clip: float = 0.01,
    seed: int = 0,
) -> LinearProbe:
    """Fit one probe per layer on all examples, and find the best layer on shared folds.

    The default, strongly regularised ridge, is meant for steering; its direction is rescaled by a
    regression in one dimension, so that scores stay log-odds. `penalty` is in units of the mean
    feature variance for ridge. `clip` keeps the errors in `[clip, 1 - clip]` before the logit.

    Raises:
        ValueError: if there are too few examples or an activation is not finite.
    """
    penalty = DEFAULT_PENALTY[kind] if penalty is None else penalty
    examples = Examples.of(activations, position)
    block = blocks(examples.incorrect, seed)
    use = torch.cat([folds(), torch.ones(1, N_BLOCKS, dtype=torch.bool)])
    weights, bias = _fit(examples, kind, penalty, clip, block, use)
    metrics = _held_out(examples, weights, bias, clip, block)
    best = int(torch.tensor([row["rmse"] for row in metrics]).nan_to_num(torch.inf).argmin())
    first = activations[0] if isinstance(activations, Sequence) else activations
    return LinearProbe(
        weights=weights[:, -1].float(),
        bias=bias[:, -1].float(),
        resid_norm=examples.resid.norm(dim=-1).median(-1).values,
        position=position,
        kind=kind,
        penalty=penalty,
        best_layer=best,
        clip=clip,
        metrics=metrics,
        manifest=dict(first.manifest),
    )


def folds() -> Bool[Tensor, "fold block"]:
    """Return which blocks each fold fits on: seven of ten, held-out threes moving round."""
    start = torch.arange(N_FOLDS)[:, None] * HELD_OUT_BLOCKS
    held_out = (start + torch.arange(HELD_OUT_BLOCKS)) % N_BLOCKS
    return torch.ones(N_FOLDS, N_BLOCKS, dtype=torch.bool).scatter(1, held_out, False)


def blocks(incorrect: Bool[Tensor, " example"], seed: int) -> Int[Tensor, " example"]:
    """Deal examples into ten blocks at random, errors and correct ones evenly.

    Raises:
        ValueError: if there are fewer examples than blocks.
    """
    n = len(incorrect)
    if n < N_BLOCKS:
        raise ValueError(f"A probe needs at least {N_BLOCKS} examples to hold some out, got {n}.")
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    dealt = shuffled[incorrect.cpu()[shuffled].long().argsort(stable=True)]
    block = torch.empty(n, dtype=torch.long)
    block[dealt] = torch.arange(n) % N_BLOCKS
    return block


def _fit(
    examples: Examples,
    kind: str,
    penalty: float,
    clip: float,
    block: Int[Tensor, " example"],
    use: Bool[Tensor, "fold block"],
) -> tuple[Float[Tensor, "layer fold d_model"], Float[Tensor, "layer fold"]]:
    """Fit every layer and fold on standardised features; return raw weights and biases."""
    x = examples.resid.double()
    deviation, mean = torch.std_mean(x, dim=1, correction=0)
    scale = torch.where(deviation > 0, deviation, 1.0)  # a constant feature gets weight zero
    x = (x - mean[:, None]) / scale[:, None]
    moments = solvers.Moments(torch.zeros_like(mean), n_blocks=N_BLOCKS)
    moments.add(x, scoring.logit_error(examples.error, clip), block)
    problems = moments.pool(use)
    if kind == "least_squares":
        coef = solvers.least_squares(problems).coef
    else:
        coef = solvers.ridge_path(problems, torch.tensor([penalty])).coef
        coef = coef * _held_out_slope(moments.pool(~use[:-1]), coef)
    bias = rearrange(problems.intercept(coef), "(l f) 1 -> l f", l=len(x))
    weights = rearrange(coef, "(l f) 1 d -> l f d", l=len(x)) / scale[:, None]
    return weights, bias - einsum(weights, mean, "layer fold d, layer d -> layer fold")


def _held_out_slope(
    held_out: solvers.Quadratic, coef: Float[Tensor, "problem penalty d_model"]
) -> Float[Tensor, "problem penalty 1"]:
    """Return the factor that makes scores log-odds again after strong regularisation.

    Regresses target on score in one dimension, on examples that the direction was not fitted to:
    in-sample slopes are as overconfident as the fit. A fold takes the slope of the other folds, the
    fit to everything (the last fold of `coef`) that of all. Where nothing can be read the slope is
    not positive and the weights become zero.
    """
    fits = rearrange(coef, "(l f) p d -> l f p d", f=N_FOLDS + 1)[:, :-1]
    moments = held_out.spread(rearrange(fits, "l f p d -> (l f) p d"))
    covariance, variance = (rearrange(m, "(l f) p -> l f p", f=N_FOLDS) for m in moments)
    covariance, variance = (
        torch.cat([m.sum(1, keepdim=True) - m, m.sum(1, keepdim=True)], dim=1)
        for m in (covariance, variance)
    )
    slope = torch.where(variance > 0, covariance / variance, 0.0).clamp(min=0)
    return rearrange(slope, "l f p -> (l f) p 1")


def _held_out(
    examples: Examples,
    weights: Float[Tensor, "layer fold d_model"],
    bias: Float[Tensor, "layer fold"],
    clip: float,
    block: Int[Tensor, " example"],
) -> tuple[dict[str, Any], ...]:
    """Measure each fold where it was not fitted: mean, spread and dummy of every metric."""
    measured, dummies = [], []
    for fold, use in enumerate(folds()):
        fitted = use[block]
        held_out = ~fitted
        score = einsum(
            examples.resid[:, held_out].double(),
            weights[:, fold],
            "layer example d, layer d -> layer example",
        )
        error, incorrect = examples.error.double(), examples.incorrect
        there = (error[held_out], incorrect[held_out])
        measured.append(scoring.measure(score + bias[:, fold, None], *there, clip=clip))
        constant = torch.logit(error[fitted].mean(), eps=clip).expand(1, int(held_out.sum()))
        dummies.append(scoring.measure(constant, *there, clip=clip))
    rows = []
    for layer in range(len(weights)):
        row: dict[str, Any] = {"layer": layer, "nonzero": int((weights[layer, -1] != 0).sum())}
        for name in scoring.METRICS:
            values = torch.stack([fold[name][layer] for fold in measured])
            row[name] = float(values.mean())
            row[f"{name}_sd"] = float(values.std())
            row[f"{name}_dummy"] = float(torch.stack([fold[name] for fold in dummies]).mean())
        rows.append(row)
    return tuple(rows)
