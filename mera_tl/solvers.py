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
        layers = len(self.origin)
        count = weight @ self.count
        share = weight / count[:, None]
        mean = einsum(share, self.total, "fold block, layer block d -> layer fold d")
        target_mean = share @ self.target
        gram = einsum(share, self.square, "fold block, layer block d e -> layer fold d e")
        cross = einsum(share, self.cross, "fold block, layer block d -> layer fold d")
        return Quadratic(
            gram=rearrange(gram - mean[..., :, None] * mean[..., None, :], "l f d e -> (l f) d e"),
            cross=rearrange(cross - mean * target_mean[:, None], "l f d -> (l f) d"),
            variance=(share @ self.target_square - target_mean.square()).repeat(layers),
            mean=rearrange(self.origin[:, None] + mean, "l f d -> (l f) d"),
            target_mean=target_mean.repeat(layers),
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
    """Relative duality gap (lasso), or norm of the gradient relative to the one at zero."""
    tolerance: float

    @property
    def converged(self) -> Bool[Tensor, "problem penalty"]:
        """Whether each fit ended within the tolerance."""
        return self.gap <= self.tolerance


def least_squares(problems: Quadratic, *, tolerance: float = 1e-6) -> Solution:
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
    return _solution(problems, coef[:, None], torch.zeros(1).to(coef), tolerance)


def ridge_path(
    problems: Quadratic, penalties: Float[Tensor, " penalty"], *, tolerance: float = 1e-6
) -> Solution:
    """Minimise mean squared error + penalty * |w|^2 for every penalty (> 0).

    scikit-learn's `Ridge(alpha)` is `penalty = alpha / n`.
    """
    identity = torch.eye(problems.gram.shape[-1]).to(problems.gram)
    # One Cholesky a penalty is cheaper than one eigendecomposition up to about a dozen of them.
    factors = [torch.linalg.cholesky(problems.gram + p * identity) for p in penalties.tolist()]
    coef = [torch.cholesky_solve(problems.cross[..., None], factor)[..., 0] for factor in factors]
    return _solution(problems, torch.stack(coef, 1), penalties.to(problems.cross), tolerance)


def _solution(
    problems: Quadratic,
    coef: Float[Tensor, "problem penalty d_model"],
    penalties: Float[Tensor, " penalty"],
    tolerance: float,
) -> Solution:
    """Measure the gradient of smooth fits and report what did not converge."""
    slope = einsum(problems.gram, coef, "problem d e, problem penalty e -> problem penalty d")
    gradient = slope - problems.cross[:, None] + penalties[:, None] * coef
    scale = problems.cross.norm(dim=-1)[:, None].clamp(min=torch.finfo(coef.dtype).tiny)
    solution = Solution(coef, problems.intercept(coef), gradient.norm(dim=-1) / scale, tolerance)
    return _reported(solution)


def _reported(solution: Solution) -> Solution:
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
