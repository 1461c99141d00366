"""How well probes on latents predict, and what becomes of their prediction under steering."""

from typing import Any

import pandas as pd
import torch

from mera_tl.inference import Activations
from mera_tl.probes import LinearProbe, metrics
from mera_tl.steering import SAESpace, Steering


def measure_latents(probe: LinearProbe, space: SAESpace, activations: Activations) -> pd.DataFrame:
    """Score a probe on latents of examples that it was not fitted to: one row per SAE."""
    rows_of = usable(activations, probe.position)
    resid = activations.resid(probe.position)[:, rows_of]
    truth = (activations.error[rows_of].double(), ~activations.correct[rows_of])
    rows = []
    for layer in space.layers:
        score = space.read(resid[layer], layer) @ probe.weights[layer] + probe.bias[layer]
        measured = metrics.measure(score.double(), *truth, clip=probe.clip)
        rows.append({"layer": layer, **{name: float(v) for name, v in measured.items()}})
    return pd.DataFrame(rows)


def usable(activations: Activations, position: str) -> torch.Tensor:
    """Return which examples have a token at a position."""
    return (activations.outcomes.answered | (position == "last")).nonzero()[:, 0]


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
    resid = activations.resid(position)[layer, usable(activations, position)]
    features = space.read(resid, layer)
    score = features @ hook.weights + hook.bias
    amount = hook.rule.amount(score)
    moved = (amount != 0) & (hook.step != 0).any()
    row = {"layer": layer, "n": len(resid), "n_moved": int(moved.sum())}
    if not moved.any():
        return row
    part = (resid[moved], features[moved], amount[moved, None] * hook.step)
    written = space.write(*part, layer)
    limit = getattr(hook.rule, "limit", torch.inf)
    stages = {
        "before": part[1],
        "latents": space.target(*part[1:], layer),
        "reencoded": space.read(written, layer),
    }
    for name, values in stages.items():
        score = values @ hook.weights + hook.bias
        row[name] = float(torch.sigmoid(score).mean())
        # What lies on the limit but for rounding does not count as above it.
        row[f"{name}_above"] = float((score > limit + 1e-3).float().mean())
    length = (written - part[0]).norm(dim=-1) / part[0].norm(dim=-1)
    return row | {"relative_shift": float(length.median())}
