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

from mera_tl.inference.activations import Activations, places_read
from mera_tl.inference.answers import ReadSettings
from mera_tl.inference.evaluation import evaluate
from mera_tl.inference.outcomes import Outcomes
from mera_tl.models.model import Model, resid_post
from mera_tl.probes.cross_validation import Kind
from mera_tl.probes.examples import Position
from mera_tl.probes.fitting import fit_error_probe
from mera_tl.probes.probe import LinearProbe
from mera_tl.sae.loading import starts_with_bos
from mera_tl.steering.spaces import SAESpace
from mera_tl.tasks.task import Task

MIN_FIRING = 10
"""A latent that fires on fewer training examples has no weight: its scale is not known."""
MAX_LATENTS = 2048
"""Most latents per layer that a probe may use (the most frequently active); bounds the solvers'
memory."""


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
    resid = activations.resid(position)
    usable = places_read(activations.outcomes, position).nonzero()[:, 0]
    parts = [_firing(space.read(resid[layer], layer), usable) for layer in space.layers]
    width = max(1, *(len(columns) for _, columns in parts))
    stack = torch.zeros(resid.shape[1], len(parts), width)
    for i, (latents, columns) in enumerate(parts):
        stack[:, i, : len(columns)] = latents.cpu()
    columns_of = [columns for _, columns in parts]
    del parts
    narrow = replace(activations, by_position={position: stack})
    probe = fit_error_probe(narrow, kind=kind, position=position, penalty=penalty, seed=seed)
    weights, bias = torch.zeros(len(resid), space.d_sae), torch.zeros(len(resid))
    for i, (layer, columns) in enumerate(zip(space.layers, columns_of, strict=True)):
        weights[layer, columns] = probe.weights[i, : len(columns)]
        bias[layer] = probe.bias[i]
    return replace(
        probe,
        weights=weights,
        bias=bias,
        resid_norm=resid[:, usable].norm(dim=-1).median(-1).values,
        best_layer=space.layers[probe.best_layer],
        metrics=tuple({**row, "layer": space.layers[row["layer"]]} for row in probe.metrics),
        manifest={**probe.manifest, "space": space.name},
    )


def _firing(
    latents: Float[Tensor, "example d_sae"], usable: Int[Tensor, " usable"]
) -> tuple[Float[Tensor, "example column"], Int[Tensor, " column"]]:
    """Return the latents that fire often enough to be learnt from, and which they are."""
    fires = (latents[usable] > 0).sum(0)
    columns = fires.argsort(descending=True, stable=True)[:MAX_LATENTS]
    columns = columns[fires[columns] >= MIN_FIRING].sort().values
    return latents[:, columns], columns.cpu()


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

    def erase(resid: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
        return resid.masked_fill(_words(resid, hook, has_bos)[..., None], 0.0)

    rows = []
    for layer in space.layers:
        rebuild = _Rebuild(space, layer, has_bos)
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


class _Rebuild:
    """A hook that puts the reconstruction in place, and adds up what it meets."""

    def __init__(self, space: SAESpace, layer: int, has_bos: bool) -> None:
        self._space, self._layer, self._has_bos = space, layer, has_bos
        self._n, self._on, self._residue, self._square = 0, 0.0, 0.0, 0.0
        self._total: Any = 0.0
        self._fired = torch.zeros(space.d_sae, dtype=torch.bool)

    def __call__(self, resid: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
        words = _words(resid, hook, self._has_bos)
        real = resid[words].float()
        latents = self._space.read(real, self._layer)
        rebuilt = self._space.reconstruct(real, self._layer)
        self._n += len(real)
        self._on += float((latents > 0).sum())
        self._fired |= (latents > 0).any(0).cpu()
        self._residue += float((real - rebuilt).double().square().sum())
        self._square += float(real.double().square().sum())
        self._total = self._total + real.double().sum(0)
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
