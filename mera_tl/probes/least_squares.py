"""Least squares and ridge regression for all layers, folds and penalties; what all solvers share.

`Problems` holds the data of every layer and fold. Where folds have more examples than features, a
regression needs no examples once it has their products: these are summed once per block of
examples that the same folds use, and a fold only adds matrices. Where folds have fewer, the
products of the examples with each other are enough, and the features' Gram matrix is never formed.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Problems:
    """One regression for every layer and fold, with a free intercept."""

    x: Float[Tensor, "layer example d_model"]
    """Features, about zero on average: sums of squares lose no digits then."""
    target: Float[Tensor, " example"]
    use: Bool[Tensor, "fold example"]
    """The examples that each fold fits on."""

    @property
    def is_wide(self) -> bool:
        """Whether some fold has no more examples than features."""
        return int(self.use.sum(-1).min()) <= self.x.shape[-1]

    @cached_property
    def weight(self) -> Float[Tensor, "fold example"]:
        """1/n for the n examples of a fold, else zero: weighted sums are the fold's means."""
        use = self.use.to(self.x)
        return use / use.sum(-1, keepdim=True)

    @cached_property
    def mean(self) -> Float[Tensor, "layer fold d_model"]:
        """The features' means."""
        return self.weight @ self.x

    @cached_property
    def target_mean(self) -> Float[Tensor, " fold"]:
        """The target's mean."""
        # About one of its values: a constant target is then constant to the last digit.
        return self.target[0] + self.weight @ (self.target - self.target[0])

    @cached_property
    def centred(self) -> Float[Tensor, "fold example"]:
        """The target about its mean; zero for examples that the fold does not use."""
        return (self.target - self.target_mean[:, None]) * self.use

    @cached_property
    def variance(self) -> Float[Tensor, " fold"]:
        """The target's variance."""
        return (self.weight * self.centred.square()).sum(-1)

    @cached_property
    def cross(self) -> Float[Tensor, "layer fold d_model"]:
        """The features' covariance with the target."""
        # The centred target sums to zero, so the features need no centring.
        return (self.weight * self.centred) @ self.x

    @cached_property
    def gram(self) -> Float[Tensor, "layer fold d_model d_model"]:
        """The features' covariance matrix."""
        patterns, block = self.use.T.unique(dim=0, return_inverse=True)
        n_layers, _, width = self.x.shape
        square = self.x.new_zeros(n_layers, len(patterns), width, width)
        for b in range(len(patterns)):
            rows = self.x[:, block == b]
            square[:, b].baddbmm_(rows.mT, rows)
        # One product and one update in place: at this size, fresh memory costs more than sums.
        share = patterns.T.to(self.x) / self.use.sum(-1, keepdim=True)
        gram = (share @ square.flatten(2)).view(-1, width, width)
        mean = self.mean.flatten(0, 1)
        return gram.baddbmm_(mean[:, :, None], mean[:, None], alpha=-1).unflatten(0, (n_layers, -1))

    def intercept(
        self, coef: Float[Tensor, "layer fold penalty d_model"]
    ) -> Float[Tensor, "layer fold penalty"]:
        """Return the best intercepts, given the coefficients."""
        return self.target_mean[:, None] - (coef * self.mean[:, :, None]).sum(-1)

    def correlation(
        self, coef: Float[Tensor, "layer fold penalty d_model"]
    ) -> Float[Tensor, "layer fold penalty d_model"]:
        """Return the covariance of residuals and features: minus the gradient of half the MSE."""
        score = einsum(coef, self.x, "layer fold penalty d, layer n d -> layer fold penalty n")
        residual = self.target - score - self.intercept(coef)[..., None]
        residual = residual * self.weight[:, None]
        return einsum(residual, self.x, "layer fold penalty n, layer n d -> layer fold penalty d")


@dataclass(frozen=True, eq=False)
class Solution:
    """The minimisers of a batch of problems, and how far from optimal each was left."""

    coef: Float[Tensor, "layer fold penalty d_model"]
    intercept: Float[Tensor, "layer fold penalty"]
    gap: Float[Tensor, "layer fold penalty"]
    """Lasso: duality gap relative to the objective at zero; ridge: the gradient's norm relative to
    that at zero. No fit at all is 1, an exact one 0."""

    @property
    def tolerance(self) -> float:
        """The gap up to which a fit in this precision counts as converged."""
        return 1e-6 if self.coef.dtype == torch.float64 else 1e-3

    @property
    def converged(self) -> Bool[Tensor, "layer fold penalty"]:
        """Whether each fit ended within the tolerance."""
        return self.gap <= self.tolerance

    def warn(self) -> "Solution":
        """Log how many fits stopped short of the tolerance, and return the solution."""
        short = ~self.converged
        if short.any():
            logger.warning(
                "%d of %d fits stopped at a gap of up to %.1e, above the tolerance %.0e.",
                int(short.sum()),
                short.numel(),
                float(self.gap[short].max()),
                self.tolerance,
            )
        return self


def ridge_path(problems: Problems, penalties: Sequence[float]) -> Solution:
    """Minimise mean squared error + penalty * |w|^2 for every penalty.

    As scikit-learn's `Ridge(alpha=n * penalty)` for n examples. At penalty 0 as its
    `LinearRegression()`: of all fits that are equally good, the one of least norm; directions with
    less than 1e-12 of the largest variance (1e-5 in float32) count as absent.
    """
    coef = (_dual_path if problems.is_wide else _primal_path)(problems, penalties)
    penalty = torch.tensor(penalties).to(coef)[:, None]
    gradient = problems.correlation(coef) - penalty * coef
    gap = relative(gradient.norm(dim=-1), problems.cross.norm(dim=-1)[..., None])
    return Solution(coef, problems.intercept(coef), gap).warn()


def relative(value: Tensor, scale: Tensor) -> Tensor:
    """Divide; nothing to fit (scale zero) leaves nothing to be desired."""
    return torch.where(scale > 0, value / scale, 0.0)


def _primal_path(
    problems: Problems, penalties: Sequence[float]
) -> Float[Tensor, "layer fold penalty d_model"]:
    """Solve `(G + penalty I) w = c`, with the features' Gram matrix G."""
    pairs = list(zip(problems.gram.flatten(0, 1), problems.cross.flatten(0, 1), strict=True))
    # One Cholesky a penalty is cheaper than one eigendecomposition up to about a dozen of them.
    coef = torch.stack([_inverse(gram, p)(c) for gram, c in pairs for p in penalties])
    return coef.view(*problems.cross.shape[:2], len(penalties), -1)


def _dual_path(
    problems: Problems, penalties: Sequence[float]
) -> Float[Tensor, "layer fold penalty d_model"]:
    """Solve for weights of the examples, `w = X'v` with `(K + n penalty I) v = y`, K = XX'."""
    coef = problems.x.new_zeros(*problems.cross.shape[:2], len(penalties), problems.x.shape[-1])
    for layer, x in enumerate(problems.x):
        products = _lower_products(x)  # of all examples; every fold takes its part
        for fold, used in enumerate(problems.use):
            rows = used.nonzero()[:, 0]
            own, mean = x[rows], problems.mean[layer, fold]
            target = problems.centred[fold, rows]
            # Centring moves every product by those with the mean. A centred kernel has no
            # variance along the constant vector: what is added there meets a target of sum zero,
            # so it changes no solution and keeps the rank full.
            kernel, shift = products[rows][:, rows], own @ mean
            kernel -= shift[:, None] + shift - mean @ mean
            kernel += kernel.diagonal().mean()
            for i, penalty in enumerate(penalties):
                solve = _inverse(kernel, penalty * len(rows))
                dual = solve(target)
                # One step of refinement: nearly dependent examples cost half of the digits.
                image = own @ (dual @ own - dual.sum() * mean)
                image = image - image.mean() + penalty * len(rows) * dual
                dual = dual + solve(target - image)
                coef[layer, fold, i] = (dual - dual.mean()) @ own
    return coef


def _inverse(
    lower: Float[Tensor, "n n"], penalty: float
) -> Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]]:
    """Return the function that solves `(A + penalty I) v = wanted`, A semidefinite.

    Only the lower triangle of A is read. Where A is singular, directions below the floor count as
    absent, so that v has the least norm.
    """
    shifted = lower.clone()
    shifted.diagonal().add_(penalty)
    floor = 1e-12 if lower.dtype == torch.float64 else 1e-5
    factor, failed = torch.linalg.cholesky_ex(shifted)
    pivots = factor.diagonal().square()
    if not failed and pivots.min() > 10 * floor * pivots.max():
        return partial(solve_factored, factor)
    # Cholesky cannot tell small from absent: the eigenvalues can, at ten times the price.
    variances, axes = torch.linalg.eigh(lower)
    present = variances > floor * variances[-1].clamp(min=0)
    inverse = torch.where(present, 1 / (variances + penalty), 0.0)
    return lambda wanted: axes @ (inverse * (axes.T @ wanted))


def solve_factored(
    factor: Float[Tensor, "*problem n n"], wanted: Float[Tensor, "*problem n"]
) -> Float[Tensor, "*problem n"]:
    """Solve `L L' v = wanted` for a Cholesky factor L."""
    # Two triangular solves, since `cholesky_solve` copies the factor.
    half = torch.linalg.solve_triangular(factor, wanted[..., None], upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)[..., 0]


def _lower_products(x: Float[Tensor, "row column"], size: int = 256) -> Float[Tensor, "row row"]:
    """Return the lower triangle of `x x'`; what lies above it is not set."""
    products = x.new_empty(len(x), len(x))
    for start in range(0, len(x), size):
        stop = min(start + size, len(x))
        torch.mm(x[start:stop], x[:stop].T, out=products[start:stop, :stop])
    return products
