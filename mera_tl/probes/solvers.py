"""Linear fits by the thousand: every layer, penalty and fold in one batched solve.

A regression needs no examples once it has their sums. `Moments` adds those up batch by batch, in
blocks; a fold is a set of blocks, so folds share every product and `pool` only adds matrices. What
comes out is a `Quadratic`, the mean squared error of one problem (a layer and a fold) as a function
of the coefficients, and each solver minimises a batch of them. How far a `Solution` is from
optimal is measured and stands in its `gap`; a solver that stops early says so.
"""

import logging
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mera_tl.probes.lasso import active_newton

logger = logging.getLogger(__name__)


class Moments:
    """Sums over examples, per layer and block, about a fixed origin.

    Memory does not grow with the number of examples. The origin only keeps the sums free of
    cancellation: the mean of the first batch will do.
    """

    def __init__(self, origin: Float[Tensor, "layer d_model"], *, n_blocks: int = 1) -> None:
        n_layers, width = origin.shape
        zeros = torch.zeros(n_layers, n_blocks, width, width, dtype=origin.dtype).to(origin.device)
        self.origin = origin
        self.square = zeros  # sum of x x', the costly one
        self.cross = zeros[..., 0].clone()
        self.total = zeros[..., 0].clone()
        self.count = zeros[0, :, 0, 0].clone()
        self.target = self.count.clone()
        self.target_square = self.count.clone()

    def add(
        self,
        resid: Float[Tensor, "layer example d_model"],
        target: Float[Tensor, " example"],
        block: Int[Tensor, " example"],
    ) -> None:
        """Add a batch of examples, each to its block."""
        target = target.to(self.origin)
        for b in block.unique().tolist():
            rows = (block == b).nonzero()[:, 0]
            x = resid[:, rows].to(self.origin) - self.origin[:, None]
            y = target[rows]
            self.square[:, b].baddbmm_(x.mT, x)
            self.cross[:, b] += einsum(x, y, "layer example d, example -> layer d")
            self.total[:, b] += x.sum(1)
            self.count[b] += len(rows)
            self.target[b] += y.sum()
            self.target_square[b] += y.square().sum()

    def pool(self, use: Bool[Tensor, "fold block"]) -> "Quadratic":
        """Return the regression problem of every layer and fold, folds varying fastest."""
        weight = use.to(self.origin)
        share = weight / (weight @ self.count)[:, None]
        n_layers, n_blocks, width, _ = self.square.shape
        mean = rearrange(share @ self.total, "l f d -> (l f) d")
        target_mean = (share @ self.target).repeat(n_layers)
        # One product and one update in place: at this size, fresh memory costs more than sums.
        gram = share @ self.square.view(n_layers, n_blocks, width * width)
        gram = gram.view(-1, width, width).baddbmm_(mean[:, :, None], mean[:, None], alpha=-1)
        return Quadratic(
            gram=gram,
            cross=(share @ self.cross).view(-1, width) - mean * target_mean[:, None],
            variance=(share @ self.target_square).repeat(n_layers) - target_mean.square(),
            mean=mean + self.origin.repeat_interleave(len(use), dim=0),
            target_mean=target_mean,
        )


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The mean squared error of each problem: `w'Gw - 2c'w + variance`, intercept eliminated."""

    gram: Float[Tensor, "problem d_model d_model"]
    cross: Float[Tensor, "problem d_model"]
    variance: Float[Tensor, " problem"]
    mean: Float[Tensor, "problem d_model"]
    target_mean: Float[Tensor, " problem"]

    @staticmethod
    def of(
        resid: Float[Tensor, "problem example d_model"], target: Float[Tensor, " example"]
    ) -> "Quadratic":
        """Return the problems of data in memory, every example used."""
        moments = Moments(resid.mean(1))
        block = torch.zeros(len(target), dtype=torch.long, device=resid.device)
        moments.add(resid, target, block)
        return moments.pool(torch.ones(1, 1, dtype=torch.bool, device=resid.device))

    def intercept(
        self, coef: Float[Tensor, "problem penalty d_model"]
    ) -> Float[Tensor, "problem penalty"]:
        """Return the intercept that goes with coefficients."""
        return self.target_mean[:, None] - einsum(
            coef, self.mean, "problem penalty d, problem d -> problem penalty"
        )

    def spread(
        self, coef: Float[Tensor, "problem penalty d_model"]
    ) -> tuple[Float[Tensor, "problem penalty"], Float[Tensor, "problem penalty"]]:
        """Return, per fit, the covariance of its score with the target and the score's variance."""
        image = einsum(self.gram, coef, "problem d e, problem penalty e -> problem penalty d")
        return (
            einsum(coef, self.cross, "problem penalty d, problem d -> problem penalty"),
            einsum(coef, image, "problem penalty d, problem penalty d -> problem penalty"),
        )


@dataclass(frozen=True, eq=False)
class Solution:
    """The minimisers of a batch of problems, and how far from optimal each was left."""

    coef: Float[Tensor, "problem penalty d_model"]
    intercept: Float[Tensor, "problem penalty"]
    gap: Float[Tensor, "problem penalty"]
    """Lasso: duality gap relative to the objective at zero; others: the norm of the (smallest
    sub)gradient relative to that at zero. No fit at all is 1, an exact one 0."""
    tolerance: float

    @property
    def converged(self) -> Bool[Tensor, "problem penalty"]:
        """Whether each fit ended within the tolerance."""
        return self.gap <= self.tolerance


def least_squares(problems: Quadratic) -> Solution:
    """Fit by least squares; where features are dependent, the fit of smallest norm.

    Directions whose variance is below 1e-12 of the largest (1e-5 in float32) count as absent.
    """
    coef = torch.empty_like(problems.cross)
    floor = 1e-12 if coef.dtype == torch.float64 else 1e-5
    factor, failed = torch.linalg.cholesky_ex(problems.gram)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    dependent = (failed > 0) | ~(pivots.amin(-1) > 10 * floor * pivots.amax(-1))
    full = ~dependent
    coef[full] = torch.cholesky_solve(problems.cross[full, :, None], factor[full])[..., 0]
    for i in dependent.nonzero()[:, 0].tolist():
        variances, axes = torch.linalg.eigh(problems.gram[i])
        kept = variances > floor * variances[-1].clamp(min=0)
        scores = axes.T @ problems.cross[i]
        coef[i] = axes @ torch.where(kept, scores / variances, 0.0)
    return _smooth(problems, coef[:, None], torch.zeros(1).to(coef))


def ridge_path(problems: Quadratic, penalties: Float[Tensor, " penalty"]) -> Solution:
    """Minimise mean squared error + penalty * |w|^2 for every penalty (> 0).

    scikit-learn's `Ridge(alpha)` is `penalty = alpha / n`.
    """
    identity = torch.eye(problems.gram.shape[-1]).to(problems.gram)
    # One Cholesky a penalty is cheaper than one eigendecomposition up to about a dozen of them.
    factors = [torch.linalg.cholesky(problems.gram + p * identity) for p in penalties.tolist()]
    coef = [torch.cholesky_solve(problems.cross[..., None], factor)[..., 0] for factor in factors]
    return _smooth(problems, torch.stack(coef, 1), penalties.to(problems.cross))


def _smooth(
    problems: Quadratic,
    coef: Float[Tensor, "problem penalty d_model"],
    penalties: Float[Tensor, " penalty"],
) -> Solution:
    """Measure the gradient of least-squares and ridge fits."""
    slope = einsum(problems.gram, coef, "problem d e, problem penalty e -> problem penalty d")
    gradient = slope - problems.cross[:, None] + penalties[:, None] * coef
    gap = relative(gradient.norm(dim=-1), problems.cross.norm(dim=-1)[:, None])
    return reported(Solution(coef, problems.intercept(coef), gap, tolerance_for(coef)))


def lasso_path(problems: Quadratic, penalties: Float[Tensor, " penalty"]) -> Solution:
    """Minimise mean squared error / 2 + penalty * |w|_1 for every penalty (> 0).

    This is scikit-learn's objective with `alpha = penalty`.
    """
    l1 = penalties.to(problems.cross).expand(len(problems.cross), -1)
    start = torch.zeros_like(problems.cross)[:, None].expand(-1, len(penalties), -1)
    coef = active_newton(problems.gram, problems.cross, l1, start)
    correlation = problems.cross[:, None] - coef @ problems.gram
    gap = duality_gap(correlation, coef, problems.cross, problems.variance, l1)
    return reported(Solution(coef, problems.intercept(coef), gap, tolerance_for(coef)))


def duality_gap(
    correlation: Float[Tensor, "problem penalty d_model"],
    coef: Float[Tensor, "problem penalty d_model"],
    cross: Float[Tensor, "problem d_model"],
    variance: Float[Tensor, " problem"],
    l1: Float[Tensor, "problem penalty"],
) -> Float[Tensor, "problem penalty"]:
    """Return the lasso's duality gap relative to its objective at zero coefficients.

    `correlation` is that of the residuals with the features.
    """
    explained = (cross[:, None] * coef).sum(-1)
    squared = variance[:, None] - explained - (correlation * coef).sum(-1)
    # The residual, shrunk until no feature correlates with it more than the penalty, is dual
    # feasible.
    shrink = (l1 / correlation.abs().amax(-1)).clamp(max=1)
    dual = shrink * (variance[:, None] - explained) - shrink.square() * squared / 2
    primal = squared / 2 + l1 * coef.abs().sum(-1)
    return relative((primal - dual).clamp(min=0), variance[:, None] / 2)


def lower_products(x: Float[Tensor, "row column"], size: int = 256) -> Float[Tensor, "row row"]:
    """Return the lower triangle of `x x'`; what lies above it is not set."""
    products = x.new_empty(len(x), len(x))
    for start in range(0, len(x), size):
        stop = min(start + size, len(x))
        torch.mm(x[start:stop], x[:stop].T, out=products[start:stop, :stop])
    return products


# --- what was reached -------------------------------------------------------------------------


def tolerance_for(values: Tensor) -> float:
    """Return the gap up to which a fit in this precision counts as converged."""
    return 1e-6 if values.dtype == torch.float64 else 1e-3


def relative(value: Tensor, scale: Tensor) -> Tensor:
    """Divide; nothing to fit (scale zero) leaves nothing to be desired."""
    return torch.where(scale > 0, value / scale, 0.0)


def reported(solution: Solution) -> Solution:
    """Log how many fits stopped short of the tolerance, and hand the solution on."""
    short = ~solution.converged
    if short.any():
        logger.warning(
            "%d of %d fits stopped at a gap of up to %.1e, above the tolerance %.0e.",
            int(short.sum()),
            short.numel(),
            float(solution.gap[short].max()),
            solution.tolerance,
        )
    return solution
