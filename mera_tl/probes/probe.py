"""Where a model's errors can be read: one linear map per layer from the residual stream to error.

`score = w.h + b` predicts `logit(clip(error))`, so `sigmoid(score)` is the predicted error, and the
limit that belongs to a steering threshold is `logit(threshold)`. A logistic probe's score is the
log-odds of an incorrect answer instead.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mera_tl import storage
from mera_tl.models.identity import manifest_of
from mera_tl.probes import metrics
from mera_tl.probes.examples import Mixture, Position, read_examples

_SHOWN = ("layer", "nonzero", "rmse", "rmse_sd", "rmse_dummy", "r2", "auroc", "ece")
"""Columns of the table that a notebook shows; `table` has all."""


@dataclass(frozen=True, eq=False, repr=False)
class LinearProbe:
    """One linear map per layer, or per (unsteered answer, layer), that predicts error.

    Its score is the log-odds of error. Error is an exclusive or of the truth and the answer, which
    no linear map can read; given the answer it is the truth, which one can. So a probe may have a
    map per answer, and then the answer must be known before it is read.

    `weights` (layer, d_model) and `bias` (layer) act on raw activations; `table` has the held-out
    metrics of every layer, `best_layer` is by them; `measure` scores other examples.
    """

    weights: Float[Tensor, "*answer layer d_model"]
    """On raw activations; all zero where nothing could be read, and then nothing is steered."""
    bias: Float[Tensor, "*answer layer"]
    resid_norm: Float[Tensor, " layer"]
    """Median norm of the residuals fitted to: the unit of additive strengths."""
    position: Position
    """Where the activations were read: the final prompt token or the answer token."""
    kind: str
    """Kind of fit, as `fit_error_probe` takes it."""
    penalty: float
    """Of the best layer, where layers differ."""
    best_layer: int
    """The layer with the best held-out score: least RMSE of error, or AUROC for logistic."""
    clip: float
    """Errors were clipped to [clip, 1 - clip] before the logit."""
    metrics: tuple[dict[str, Any], ...] = ()
    """One row per layer: held-out means over the folds, their spread `*_sd`, and `*_dummy`."""
    manifest: dict[str, Any] = field(default_factory=dict)
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
            ValueError: if these are no activations, or a probe per answer gets no answers.
        """
        if not isinstance(resid, Tensor):
            raise ValueError(
                f"{resid!r:.60} is no tensor; pass activations.resid(), or to score the probe "
                "measure(activations)."
            )
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

    def measure(self, activations: Mixture) -> pd.DataFrame:
        """Score the probe on examples it was not fitted to: one row per layer, all metrics."""
        examples = read_examples(activations, self.position)
        score = self.score(examples.resid).double()
        truth = (examples.error.double(), examples.incorrect)
        return pd.DataFrame(
            {"layer": range(len(score))} | metrics.measure(score, *truth, clip=self.clip)
        )

    def save(self, folder: str | Path) -> Path:
        """Write `probe.safetensors` and, last, its manifest `probe.json`; return the folder."""
        folder = storage.path_of(folder)
        storage.reopen(folder / "probe.json")
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        tensors = {name: v for name, v in values.items() if isinstance(v, Tensor)}
        storage.save_tensors(folder / "probe.safetensors", tensors)
        plain = {name: v for name, v in values.items() if name not in tensors}
        storage.write_json(folder / "probe.json", plain)
        return folder

    @staticmethod
    def load(folder: str | Path) -> "LinearProbe":
        """Read a probe that `save` wrote.

        Raises:
            ValueError: if a file is missing or damaged.
        """
        plain = storage.read_json(Path(folder) / "probe.json")
        tensors = storage.load_tensors(Path(folder) / "probe.safetensors")
        with storage.reading(folder):
            return LinearProbe(**tensors, **plain | {"metrics": tuple(plain["metrics"])})

    def check(self, model: Any) -> None:
        """Refuse a model, of whatever kind, other than the one whose activations were fitted.

        Raises:
            ValueError: naming what differs.
        """
        manifest = manifest_of(model) if self.manifest else {}
        for name, got in manifest.items():
            fitted = self.manifest.get(name, got)
            if name not in ("model", "dtype") and fitted != got:
                raise ValueError(
                    f"This probe was fitted on {self.manifest.get('model')} with {name} {fitted}, "
                    f"but {manifest['model']} has {name} {got}; fit a probe on this model first."
                )

    def __repr__(self) -> str:
        per = f", one map for each of {len(self.weights)} answers" if self.per_answer else ""
        return (
            f"LinearProbe({self.kind}, penalty {self.penalty:g}, position {self.position!r}, "
            f"best layer {self.best_layer} of {self.n_layers}{per})"
        )

    def plot(
        self, metric: str = "auroc", *, beside: Mapping[str, "LinearProbe"] | None = None
    ) -> Any:
        """Draw a held-out metric over the layers (rmse, auroc, r2), as a plotly figure.

        `beside` are other probes, by name.

        Raises:
            ValueError: if there is no such metric, or what is beside is no probe by a name.
        """
        if not isinstance(beside, Mapping | None):
            raise ValueError(f"beside={beside!r:.60} has no name; pass {{name: probe}}.")
        known = [name for name in self.table if f"{name}_sd" in self.table]
        if metric not in known:
            raise ValueError(f"There is no metric {metric!r}; pass one of {', '.join(known)}.")
        from mera_tl.plots import probe_error

        probes = {f"{self.kind}, {self.position}": self, **(beside or {})}
        tables = [probe.table.assign(probe=name) for name, probe in probes.items()]
        return probe_error(pd.concat(tables), metric=metric)

    def _repr_html_(self) -> str:
        shown = [name for name in _SHOWN if self.metrics and name in self.metrics[0]]
        look: Any = {"index": False, "float_format": "%.3f"}
        look["formatters"] = {"nonzero": "{:.0f}".format}
        rows = self.table[shown].to_html(**look) if shown else ""
        return f"<b>{html.escape(repr(self))}</b>{rows}"
