"""Linear fits of folds that have no more examples than features: from the rows themselves.

Least squares then needs only the products of examples with each other, which the folds of a layer
share; a lasso needs the products of those few features that could enter. The Gram matrix of all
features, which `solvers` works from, is never formed.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mera_tl.probes.lasso import active_newton
from mera_tl.probes.solvers import (
    Moments,
    Solution,
    duality_gap,
    lower_products,
    relative,
    reported,
    tolerance_for,
)


def least_squares_from_rows(
    resid: Float[Tensor, "layer example d_model"],
    target: Float[Tensor, " example"],
    use: Bool[Tensor, "fold example"],
) -> Solution:
    """Fit by least squares; of all fits that are equally good, the one of least norm.

    Examples of a fold should lie together: their products are then copied in few pieces.
    """
    weight = use.to(resid) / use.sum(-1, keepdim=True).to(resid)
    target_mean = weight @ target
    centred = (target - target_mean[:, None]) * use
    solutions = []
    for x in resid:
        products, dual = lower_products(x), torch.zeros_like(centred)
        room = torch.empty_like(products)  # at this size, fresh memory costs as much as sums
        for fold, used in enumerate(use):
            dual[fold] = _dual(x, _kernel(products, used, room), used, centred[fold])
        # Whole products with the examples, all folds at once, instead of a copy of each fold's.
        mean = weight @ x
        coef = dual @ x - dual.sum(-1, keepdim=True) * mean
        intercept = target_mean - (coef * mean).sum(-1)
        residual = (coef @ x.T + intercept[:, None] - target) * use
        gradient = residual @ x - residual.sum(-1, keepdim=True) * mean
        gap = relative(gradient.norm(dim=-1), (centred @ x).norm(dim=-1))
        solutions.append((coef, intercept, gap))
    coefs, intercepts, gaps = (torch.cat(part)[:, None] for part in zip(*solutions, strict=True))
    return reported(Solution(coefs, intercepts, gaps, tolerance_for(resid)))


def _kernel(
    products: Float[Tensor, "example example"],
    used: Bool[Tensor, " example"],
    room: Float[Tensor, "example example"],
) -> Float[Tensor, "used used"]:
    """Copy the lower triangle of the products of a fold's examples into `room`."""
    n_used, row = int(used.sum()), 0
    kernel = room.view(-1)[: n_used * n_used].view(n_used, n_used)
    runs = _runs(used)
    for i, a in enumerate(runs):
        column, stop = 0, row + a.stop - a.start
        for b in runs[: i + 1]:
            kernel[row:stop, column : column + b.stop - b.start] = products[a, b]
            column += b.stop - b.start
        row = stop
    return kernel


def _dual(
    x: Float[Tensor, "example d_model"],
    kernel: Float[Tensor, "used used"],
    used: Bool[Tensor, " example"],
    target: Float[Tensor, " example"],
) -> Float[Tensor, " example"]:
    """Return the weights, of sum zero, with which a fold's examples add up to the coefficients."""
    floor = 1e-12 if kernel.dtype == torch.float64 else 1e-5
    # What is added along the constant vector meets a dual of sum zero, and keeps the rank.
    lift = kernel.diagonal().mean()
    factor, failed = torch.linalg.cholesky_ex(kernel.add_(lift))
    pivots = factor.diagonal().square()
    dual = torch.zeros(len(used), 2).to(target)
    if failed or not pivots.min() > 10 * floor * pivots.max():
        dual[used, 0] = _dual_of_dependent(kernel.sub_(lift), target[used], floor)
        return dual[:, 0]
    wanted = torch.stack([target, used.to(target)], dim=1)
    dual[used] = _solve(factor, wanted[used])
    # One step of refinement: nearly dependent examples cost half of the digits.
    left = wanted - x @ (x.T @ dual) - lift * dual.sum(0)
    dual[used] += _solve(factor, left[used])
    fit, constant = dual.unbind(1)
    return fit - constant * (fit.sum() / constant.sum())


def _solve(factor: Float[Tensor, "n n"], wanted: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Solve from a lower Cholesky factor; unlike `cholesky_solve`, without copying it."""
    half = torch.linalg.solve_triangular(factor, wanted, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _runs(used: Bool[Tensor, " example"]) -> list[slice]:
    """Return the stretches of examples that are used."""
    edges = torch.nn.functional.pad(used.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _dual_of_dependent(
    lower: Float[Tensor, "example example"], target: Float[Tensor, " example"], floor: float
) -> Float[Tensor, " example"]:
    """Solve where examples depend on each other, ignoring directions below the floor."""
    kernel = lower.tril() + lower.tril(-1).T
    column = kernel.mean(0)
    kernel -= column[:, None] + column - column.mean()
    variances, axes = torch.linalg.eigh(kernel)
    kept = variances > floor * variances[-1].clamp(min=0)
    return axes @ torch.where(kept, (axes.T @ target) / variances, 0.0)


def lasso_from_rows(
    resid: Float[Tensor, "layer example d_model"],
    target: Float[Tensor, " example"],
    use: Bool[Tensor, "fold example"],
    penalties: Float[Tensor, " penalty"],
) -> Solution:
    """Minimise mean squared error / 2 + penalty * |w|_1 for every penalty (> 0).

    All fits of a layer are solved on one working set of features; those outside it that violate
    optimality are taken in, until none does.
    """
    patterns, block = use.T.unique(dim=0, return_inverse=True)
    l1 = penalties.to(resid).expand(len(use), -1)
    parts = [_on_working_set(x, target, block, patterns.T, l1) for x in resid]
    coef, intercept, gap = (torch.cat(part) for part in zip(*parts, strict=True))
    return reported(Solution(coef, intercept, gap, tolerance_for(resid)))


def _on_working_set(
    x: Float[Tensor, "example d_model"],
    target: Float[Tensor, " example"],
    block: Int[Tensor, " example"],
    use: Bool[Tensor, "fold block"],
    l1: Float[Tensor, "fold penalty"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return one layer's coefficients, intercepts and gaps."""
    weight = use[:, block].to(x)
    weight /= weight.sum(-1, keepdim=True)
    centred = target - (weight @ target)[:, None]
    variance, cross = (weight * centred.square()).sum(-1), (weight * centred) @ x
    inside = cross.abs().topk(min(32, x.shape[1])).indices.unique()
    coef = x.new_zeros(*l1.shape, len(inside))
    while True:
        columns = x[:, inside]
        moments = Moments(columns.new_zeros(1, len(inside)), n_blocks=use.shape[1])
        moments.add(columns[None], target, block)
        problems = moments.pool(use)
        coef = active_newton(problems.gram, problems.cross, l1, coef)
        intercept = problems.intercept(coef)
        residual = target - coef @ columns.T - intercept[..., None]
        correlation = (residual * weight[:, None]) @ x
        excess = (correlation.abs() - l1[..., None]).index_fill(-1, inside, 0.0)
        size = max(32, int((coef != 0).sum(-1).max()))
        worst, feature = excess.topk(min(size, x.shape[1]))
        entering = feature[worst > 1e-9 * l1[..., None]].unique()
        if not len(entering):
            break
        inside = torch.cat([inside, entering])
        coef = torch.nn.functional.pad(coef, (0, len(entering)))
    whole = x.new_zeros(*l1.shape, x.shape[1]).index_copy(-1, inside, coef)
    return whole, intercept, duality_gap(correlation, whole, cross, variance, l1)
