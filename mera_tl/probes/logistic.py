"""Logistic regression for every layer, fold and penalty, by scikit-learn."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mera_tl.probes.least_squares import Problems, Solution

L1 = {"solver": "liblinear", "l1_ratio": 1.0, "intercept_scaling": 1e3, "random_state": 0}
"""liblinear penalises the intercept too, as the weight of a constant feature: made this large, its
weight, and so its penalty, is next to nothing."""
L2 = {"solver": "newton-cholesky", "tol": 1e-8}
"""Features as collinear as activations take lbfgs hundreds of steps, and this one about ten."""


def logistic_path(problems: Problems, penalties: Sequence[float], *, l1: bool) -> Solution:
    """Minimise summed log loss + penalty * (|w|_1 or |w|^2 / 2), for targets 0 and 1.

    As scikit-learn's `LogisticRegression(C=1/penalty)`, to its tolerances, with a free intercept. A
    fold with one class only gets its smoothed log-odds and no weights.
    """
    fits = [
        [_fit(x[used], problems.target[used], penalty, L1 if l1 else L2) for penalty in penalties]
        for x in problems.x
        for used in problems.use
    ]
    shape = (len(problems.x), len(problems.use), len(penalties))
    coef = torch.stack([w for row in fits for w, _ in row]).view(*shape, -1).to(problems.x)
    intercept = torch.tensor([b for row in fits for _, b in row]).view(shape).to(problems.x)
    return Solution(coef, intercept, torch.zeros_like(intercept))


def _fit(
    x: Float[Tensor, "example d_model"],
    positive: Float[Tensor, " example"],
    penalty: float,
    settings: dict[str, Any],
) -> tuple[Float[Tensor, " d_model"], float]:
    n, n_positive = len(positive), float(positive.sum())
    if n_positive in (0, n):
        odds = (n_positive + 0.5) / (n - n_positive + 0.5)
        return x.new_zeros(x.shape[1]), float(torch.tensor(odds).log())
    model: Any = LogisticRegression(C=1 / penalty, max_iter=1000, **settings)
    model.fit(x.cpu().numpy(), positive.cpu().numpy())
    return torch.from_numpy(model.coef_[0]), float(model.intercept_[0])
