"""Error probes on the latents of SAEs, and how far an SAE is to be believed.

Latents are computed from stored `resid_post` when they are needed and never stored. A probe on
latents is a `LinearProbe` like any other, fitted by the same solvers on the same folds: its rows
are as many as the model has layers, zero where there is no SAE and for latents that hardly fire.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mera_tl.inference.activations import Activations
from mera_tl.inference.answers import ReadSettings
from mera_tl.inference.evaluation import evaluate
from mera_tl.inference.outcomes import Outcomes
from mera_tl.models.model import Model, resid_post
from mera_tl.probes import metrics
from mera_tl.probes.cross_validation import Kind
from mera_tl.probes.probe import LinearProbe, Position, fit_error_probe
from mera_tl.sae.loading import starts_with_bos
from mera_tl.steering.spaces import SAESpace
from mera_tl.steering.steering import Steering
from mera_tl.tasks.task import Task

MIN_FIRING = 10
"""A latent that fires on fewer training examples has no weight: its scale is not known."""
MAX_LATENTS = 2048
"""Latents a layer that a probe may use, the most often firing ones: the solvers hold their Gram
matrices."""


# --- probes -------------------------------------------------------------------------------------


def fit_latent_probe(
    activations: Activations,
    space: SAESpace,
    *,
    kind: Kind = "ridge",
    position: Position = "last",
    penalty: float | Sequence[float] | None = None,
    seed: int = 0,
) -> LinearProbe:
    """Fit one error probe per layer that has an SAE, on its latents; see `fit_error_probe`.

    Raises:
        ValueError: as `fit_error_probe`.
    """
    resid, kept = activations.resid(position), _kept(activations, position)
    parts = [_firing(space.read(resid[layer], layer), kept) for layer in space.layers]
    width = max(1, *(len(columns) for _, columns in parts))
    stack = torch.zeros(resid.shape[1], len(parts), width)
    for i, (latents, columns) in enumerate(parts):
        stack[:, i, : len(columns)] = latents.cpu()
    chosen = [columns for _, columns in parts]
    del parts
    narrow = replace(activations, by_position={position: stack})
    probe = fit_error_probe(narrow, kind=kind, position=position, penalty=penalty, seed=seed)
    weights, bias = torch.zeros(len(resid), space.d_sae), torch.zeros(len(resid))
    for i, (layer, columns) in enumerate(zip(space.layers, chosen, strict=True)):
        weights[layer, columns] = probe.weights[i, : len(columns)]
        bias[layer] = probe.bias[i]
    return replace(
        probe,
        weights=weights,
        bias=bias,
        resid_norm=resid[:, kept].norm(dim=-1).median(-1).values,
        best_layer=space.layers[probe.best_layer],
        metrics=tuple({**row, "layer": space.layers[row["layer"]]} for row in probe.metrics),
        manifest={**probe.manifest, "space": space.name},
    )


def measure_latents(probe: LinearProbe, space: SAESpace, activations: Activations) -> pd.DataFrame:
    """Score a probe on latents of examples that it was not fitted to: one row per SAE."""
    kept = _kept(activations, probe.position)
    resid = activations.resid(probe.position)[:, kept]
    truth = (activations.error[kept].double(), ~activations.correct[kept])
    rows = []
    for layer in space.layers:
        score = space.read(resid[layer], layer) @ probe.weights[layer] + probe.bias[layer]
        measured = metrics.measure(score.double(), *truth, clip=probe.clip)
        rows.append({"layer": layer, **{name: float(v) for name, v in measured.items()}})
    return pd.DataFrame(rows)


def support(
    probe: LinearProbe, space: SAESpace, activations: Activations, layer: int | None = None
) -> pd.DataFrame:
    """List the latents that a probe uses in a layer (its best one): heaviest in effect first.

    `effect` is the weight times the standard deviation of the latent; `firing` the share of
    examples on which it is on; `page` its public page, where its release is known to Neuronpedia.
    """
    layer = probe.best_layer if layer is None else layer
    kept = _kept(activations, probe.position)
    latents = space.read(activations.resid(probe.position)[layer, kept], layer)
    weights = probe.weights[layer]
    used = weights.nonzero()[:, 0]
    known = space.saes[layer].cfg.metadata.get("neuronpedia_id")
    table = pd.DataFrame(
        {
            "layer": layer,
            "latent": used.tolist(),
            "weight": weights[used].tolist(),
            "effect": (weights[used] * latents[:, used].std(0)).tolist(),
            "firing": (latents[:, used] > 0).float().mean(0).tolist(),
        }
    )
    if known:
        table["page"] = [f"https://www.neuronpedia.org/{known}/{i}" for i in used.tolist()]
    return table.sort_values("effect", key=abs, ascending=False, ignore_index=True)


def _kept(activations: Activations, position: Position) -> Int[Tensor, " kept"]:
    return (activations.outcomes.answered | (position == "last")).nonzero()[:, 0]


def _firing(
    latents: Float[Tensor, "example d_sae"], kept: Int[Tensor, " kept"]
) -> tuple[Float[Tensor, "example column"], Int[Tensor, " column"]]:
    """Return the latents that fire often enough to be learnt from, and which they are."""
    fires = (latents[kept] > 0).sum(0)
    columns = fires.argsort(descending=True, stable=True)[:MAX_LATENTS]
    columns = columns[fires[columns] >= MIN_FIRING].sort().values
    return latents[:, columns], columns.cpu()


# --- what becomes of a prediction ---------------------------------------------------------------


def predictions(steering: Steering, activations: Activations) -> pd.DataFrame:
    """Follow the predicted error through a steering: one row per steered layer.

    Mean predicted error of the examples that move, `before` the shift, in the `latents` that were
    aimed at, and `reencoded` from the activation that was written; `*_above` is the share of them
    that still predicts more than the limit. `relative_shift` is the median of |shift| over |h|.
    In raw space the last two are the same. Layers are looked at one by one, each unsteered before.

    Raises:
        ValueError: if there is one direction or probe per answer.
    """
    rows = [_follow(hook, steering, activations) for _, hook in steering.fwd_hooks()]
    return pd.DataFrame(rows)


def _follow(hook: Any, steering: Steering, activations: Activations) -> dict[str, Any]:
    if hook.per_answer or hook.weights.ndim > 1:
        raise ValueError(
            "Predictions are followed along one direction per layer, but this steering has one per "
            "answer; pass a steering with a single one."
        )
    space, layer, position = hook.space, hook.layer, steering.probe.position
    resid = activations.resid(position)[layer, _kept(activations, position)]
    features = space.read(resid, layer)
    score = features @ hook.weights + hook.bias
    amount = hook.rule.amount(score)
    moved = (amount != 0) & (hook.step != 0).any()
    row = {"layer": layer, "n": len(resid), "n_moved": int(moved.sum())}
    if not moved.any():
        return row
    there = (resid[moved], features[moved], amount[moved, None] * hook.step)
    written = space.write(*there, layer)
    limit = getattr(hook.rule, "limit", torch.inf)
    stages = {
        "before": there[1],
        "latents": space.target(*there[1:], layer),
        "reencoded": space.read(written, layer),
    }
    for name, values in stages.items():
        score = values @ hook.weights + hook.bias
        row[name] = float(torch.sigmoid(score).mean())
        # What lies on the limit but for rounding does not count as above it.
        row[f"{name}_above"] = float((score > limit + 1e-3).float().mean())
    length = (written - there[0]).norm(dim=-1) / there[0].norm(dim=-1)
    return row | {"relative_shift": float(length.median())}


# --- what an SAE explains -----------------------------------------------------------------------


def reconstruction(
    model: Model, task: Task[Any], space: SAESpace, *, settings: ReadSettings | None = None
) -> pd.DataFrame:
    """Measure what each SAE explains of a task's activations, and of the answers that follow.

    One row per layer: `explained_variance` over all tokens but a BOS, `l0` latents on per token,
    share of `dead` latents; then, with its reconstruction in place of the activation, `accuracy`,
    the share of examples with the `same_answer`, and `recovered`: 1 where the options keep their
    probabilities, 0 where they are as far off as with the activation set to zero.
    """
    settings = settings or ReadSettings()
    base = evaluate(model, task, settings=settings, title="unsteered")
    has_bos = starts_with_bos(model)
    rows = []
    for layer in space.layers:
        rebuild, erase = _Rebuild(space, layer, has_bos), _Erase(has_bos)
        rebuilt, erased = (
            evaluate(model, task, [(resid_post(layer), hook)], settings=settings, title=title)
            for hook, title in ((rebuild, f"rebuilt, layer {layer}"), (erase, "set to zero"))
        )
        off, lost = _distance(rebuilt, base), _distance(erased, base)
        rows.append(
            {
                "layer": layer,
                **rebuild.quality(),
                "accuracy_unsteered": base.accuracy,
                "accuracy": rebuilt.accuracy,
                "same_answer": float((rebuilt.predictions == base.predictions).float().mean()),
                "recovered": 1 - off / lost if lost > 0 else torch.nan,
            }
        )
    return pd.DataFrame(rows)


def _distance(some: Outcomes, other: Outcomes) -> float:
    """Return the mean total variation between the options' probabilities."""
    return float((some.probs - other.probs).abs().sum(-1).mean()) / 2


def _words(
    resid: Float[Tensor, "batch pos d_model"], hook: Any, has_bos: bool
) -> Bool[Tensor, "batch pos"]:
    """Return where there is a token of the text: no padding, and no BOS, which SAEs never see."""
    window = hook.ctx["window"]
    real = window.real.to(resid.device)
    return real & ~((real.cumsum(-1) == 1) & has_bos) if window.n_prompt else real


class _Erase:
    def __init__(self, has_bos: bool) -> None:
        self._has_bos = has_bos

    def __call__(self, resid: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
        return resid.masked_fill(_words(resid, hook, self._has_bos)[..., None], 0.0)


class _Rebuild:
    """A hook that puts the reconstruction in place, and adds up what it meets."""

    def __init__(self, space: SAESpace, layer: int, has_bos: bool) -> None:
        self._space, self._layer, self._has_bos = space, layer, has_bos
        self._n, self._on, self._residue, self._square = 0, 0.0, 0.0, 0.0
        self._total: Any = 0.0
        self._fired = torch.zeros(space.d_sae, dtype=torch.bool)

    def __call__(self, resid: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
        words = _words(resid, hook, self._has_bos)
        here = resid[words].float()
        latents = self._space.read(here, self._layer)
        rebuilt = self._space.reconstruct(here, self._layer)
        self._n += len(here)
        self._on += float((latents > 0).sum())
        self._fired |= (latents > 0).any(0).cpu()
        self._residue += float((here - rebuilt).double().square().sum())
        self._square += float(here.double().square().sum())
        self._total = self._total + here.double().sum(0)
        replaced = resid.clone()
        replaced[words] = rebuilt.to(resid.dtype)
        return replaced

    def quality(self) -> dict[str, float]:
        """Return explained variance, latents on per token, and the share that never fired."""
        variance = self._square - float(self._total.square().sum()) / self._n
        return {
            "explained_variance": 1 - self._residue / variance,
            "l0": self._on / self._n,
            "dead": 1 - float(self._fired.float().mean()),
            "n_tokens": self._n,
        }
