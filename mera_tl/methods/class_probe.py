"""Classify instead of steering: what do the activations say that the answer is?

Where options and labels exist, the first question to any steering is why not to train a classifier
on the same labels. This is that classifier: a logistic regression of the true option on the
residual stream of one layer at the final prompt token. It answers by itself, and what the model
would have said plays no part. Its answers are certified by the same paired outcomes as a steering.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from torch import Tensor

from mera_tl import storage
from mera_tl.certificate.calibration import certify_outcomes, evidence_of, setup_of
from mera_tl.certificate.certificate import Calibration
from mera_tl.certificate.description import tensor_hash
from mera_tl.certificate.terms import Terms
from mera_tl.inference.activations import Activations, collect
from mera_tl.inference.answers import ReadSettings
from mera_tl.inference.outcomes import Outcomes
from mera_tl.models.model import Model
from mera_tl.tasks.task import Calibration as CalibrationRole
from mera_tl.tasks.task import Task, Train

PENALTIES = (10.0, 1000.0)
"""Of scikit-learn's `LogisticRegression(C=1/penalty)` on standardised features."""
N_FOLDS = 3
MOST_LAYERS = 12
"""Layers that are compared, evenly spaced."""
NEVER = -1e4
"""Score of an option that no training example has."""


@dataclass(frozen=True, eq=False)
class ClassProbe:
    """A linear map from one layer's residual stream to the options."""

    weights: Float[Tensor, "option d_model"]
    """On raw activations."""
    bias: Float[Tensor, " option"]
    layer: int
    penalty: float
    accuracy: tuple[float, ...] = ()
    """Held-out accuracy by layer, of those that were compared; see `layers`."""
    layers: tuple[int, ...] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What it was fitted to."""

    def probs(self, resid: Float[Tensor, "example d_model"]) -> Float[Tensor, "example option"]:
        """Return P(option)."""
        scores = einsum(resid.float(), self.weights, "example d, option d -> example option")
        return (scores + self.bias).softmax(-1)

    def answer(self, activations: Activations) -> Outcomes:
        """Answer by what is read; an example that the model leaves unanswered is answered too."""
        probs = self.probs(activations.resid("last")[self.layer])
        return replace(activations.outcomes, probs=probs, predictions=probs.argmax(-1))

    def save(self, folder: str | Path) -> None:
        """Write class_probe.safetensors and, last, class_probe.json."""
        storage.reopen(Path(folder) / "class_probe.json")
        tensors = {"weights": self.weights, "bias": self.bias}
        storage.save_tensors(Path(folder) / "class_probe.safetensors", tensors)
        names = ("layer", "penalty", "accuracy", "layers", "manifest")
        plain = {name: getattr(self, name) for name in names}
        storage.write_json(Path(folder) / "class_probe.json", plain)

    @classmethod
    def load(cls, folder: str | Path) -> "ClassProbe":
        """Read what `save` wrote.

        Raises:
            ValueError: if a file is missing or damaged.
        """
        plain: dict[str, Any] = storage.read_json(Path(folder) / "class_probe.json")
        plain |= {name: tuple(plain[name]) for name in ("accuracy", "layers")}
        return cls(**storage.load_tensors(Path(folder) / "class_probe.safetensors"), **plain)


def fit_class_probe(task: Task[Train], activations: Activations, *, seed: int = 0) -> ClassProbe:
    """Fit the classifier in the layer and with the penalty of best cross-validated accuracy.

    `activations` are those of the training split, unsteered; `seed` is that of the folds, where
    texts that occur more than once are in one. Ties go to the lower log loss.
    """
    labels, resid = activations.labels.numpy(), activations.resid("last")
    every = range(len(resid))
    layers = tuple(every[:: -(-len(every) // MOST_LAYERS)])
    folds = _folds(task, seed)
    found: dict[tuple[int, float], tuple[float, float]] = {}
    for layer in layers:
        for penalty in PENALTIES:
            probs = torch.zeros(len(labels), len(activations.outcomes.options))
            for learn, judge in folds:
                fitted = fit_classes(resid[layer][learn], labels[learn], probs.shape[1], penalty)
                probs[judge] = fitted.probs(resid[layer][judge])
            right = (probs.argmax(-1) == activations.labels).double().mean()
            chance = probs.gather(1, activations.labels[:, None]).double().clamp(min=1e-6)
            found[layer, penalty] = (float(right), float(chance.log().mean()))
    layer, penalty = max(found, key=lambda which: found[which])
    best = tuple(max(found[each, penalty][0] for penalty in PENALTIES) for each in layers)
    fitted = fit_classes(resid[layer], labels, len(activations.outcomes.options), penalty)
    told: dict[str, Any] = {"accuracy": best, "layers": layers, "manifest": activations.origin}
    return replace(fitted, layer=layer, **told)


def _folds(task: Task[Any], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Divide examples into folds, no text in two of them."""
    key = {text: i for i, text in enumerate(dict.fromkeys(e.key for e in task.examples))}
    texts = np.array([key[example.key] for example in task.examples])
    split = KFold(min(N_FOLDS, len(key)), shuffle=True, random_state=seed)
    return [
        (np.flatnonzero(np.isin(texts, learn)), np.flatnonzero(np.isin(texts, judge)))
        for learn, judge in split.split(np.arange(len(key)))
    ]


def fit_classes(
    resid: Float[Tensor, "example d_model"],
    labels: np.ndarray,
    n_options: int,
    penalty: float = PENALTIES[0],
) -> ClassProbe:
    """Fit scikit-learn's `LogisticRegression(C=1/penalty)` on standardised activations.

    An option without an example is never predicted; with one option only, that is.
    """
    x = resid.double()
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 0, scale, torch.inf)  # what does not vary tells nothing
    present = np.unique(labels)
    weights = torch.zeros(n_options, x.shape[1], dtype=torch.double)
    bias = torch.full((n_options,), NEVER, dtype=torch.double)
    if len(present) == 1:
        bias[present] = 0.0
        return ClassProbe(weights.float(), bias.float(), 0, penalty)
    model: Any = LogisticRegression(C=1 / penalty, max_iter=300)
    model.fit(((x - mean) / scale).numpy(), labels)
    coef, intercept = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if len(present) == 2:  # scikit-learn then has one row, the second class against the first
        coef, intercept = torch.cat([0 * coef, coef]), torch.cat([0 * intercept, intercept])
    weights[present] = coef / scale
    bias[present] = intercept - (coef / scale) @ mean
    return ClassProbe(weights.float(), bias.float(), 0, penalty)


def certify_class_probe(
    model: Model,
    task: Task[CalibrationRole],
    probe: ClassProbe,
    *,
    terms: Terms,
    min_gain: float = 0.0,
    settings: ReadSettings | None = None,
) -> Calibration:
    """Certify on held-out examples that the classifier beats the model, or abstain."""
    settings = settings or ReadSettings()
    task = evidence_of(task, terms.seed, [probe.manifest], model=model, settings=settings)
    read = collect(model, task, settings=settings)
    return certify_outcomes(
        task,
        read.outcomes,
        [probe.answer(read)],
        candidates=[
            {
                "name": f"classifier of layer {probe.layer}",
                "reads": tensor_hash(probe.weights, probe.bias),
            }
        ],
        terms=terms,
        min_gain=min_gain,
        setup=setup_of(model, task, settings),
    )
