"""The lasso for all layers, folds and penalties, by Newton's method on the support.

Activations are so collinear that their Gram matrix has a condition number of 1e10 and a lasso
keeps a dozen coefficients: there coordinate descent runs out of iterations, and this is exact.
Each step takes the nonzero coefficients and the few that violate optimality most, solves for them
exactly, and is tried twice: with the coefficients that would change sign dropped and the others
solved for again, and in full. Both are searched for the minimum of the piecewise parabola along
them. How many coefficients may enter at once doubles when a step succeeds and halves when it does
not; one at a time always gains, which is why the method ends.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from mera_tl.probes.least_squares import Problems, Solution, relative, solve_factored


def lasso_path(problems: Problems, penalties: Sequence[float]) -> Solution:
    """Minimise mean squared error / 2 + penalty * |w|_1 for every penalty (> 0).

    As scikit-learn's `Lasso(alpha=penalty)`.
    """
    # From the largest penalty down, each fit starts at the last: few coefficients change, and all
    # problems of a step have supports of like size.
    order = sorted(set(penalties), reverse=True)
    if problems.is_wide:
        layers = [
            _on_working_set(Problems(x[None], problems.target, problems.use), order)
            for x in problems.x
        ]
        fits = torch.cat(layers)
    else:
        gram, cross = problems.gram.flatten(0, 1), problems.cross.flatten(0, 1)
        path = [torch.zeros_like(cross)]
        for penalty in order:
            path.append(active_newton(gram, cross, penalty, path[-1]))
        fits = torch.stack(path[1:], 1).unflatten(0, problems.cross.shape[:2])
    coef = fits[:, :, [order.index(penalty) for penalty in penalties]]
    gap = duality_gap(problems, coef, penalties)
    return Solution(coef, problems.intercept(coef), gap).warn()


def _on_working_set(
    layer: Problems, penalties: Sequence[float]
) -> Float[Tensor, "1 fold penalty d_model"]:
    """Solve one layer's folds on few features; take in others that violate optimality."""
    width = layer.x.shape[-1]
    coef, path = torch.zeros_like(layer.cross[0]), []
    inside = layer.cross[0].abs().topk(min(32, width)).indices.unique()
    gram = _gram_of(layer, inside)
    for penalty in penalties:
        solved = False
        while True:
            # A feature outside belongs inside if its correlation with the residual exceeds the
            # penalty. Taking in as many as there are nonzero keeps the number of rounds small.
            correlation = layer.correlation(coef[None, :, None])[0, :, 0]
            excess = (correlation.abs() - penalty).index_fill(-1, inside, 0.0)
            size = max(32, int((coef != 0).sum(-1).max()))
            worst, feature = excess.topk(min(size, width))
            entering = feature[worst > 1e-9 * penalty].unique()
            if solved and not len(entering):
                break
            if len(entering):
                inside = torch.cat([inside, entering])
                gram = _gram_of(layer, inside)
            cross = layer.cross[0][:, inside]
            coef[:, inside] = active_newton(gram, cross, penalty, coef[:, inside])
            solved = True
        path.append(coef.clone())
    return torch.stack(path, 1)[None]


def _gram_of(
    layer: Problems, inside: Int[Tensor, " inside"]
) -> Float[Tensor, "fold inside inside"]:
    return Problems(layer.x[..., inside], layer.target, layer.use).gram[0]


def duality_gap(
    problems: Problems,
    coef: Float[Tensor, "layer fold penalty d_model"],
    penalties: Sequence[float],
) -> Float[Tensor, "layer fold penalty"]:
    """Return the lasso's duality gap relative to its objective at zero coefficients."""
    l1, variance = torch.tensor(penalties).to(coef), problems.variance[:, None]
    correlation = problems.correlation(coef)
    explained = (problems.cross[:, :, None] * coef).sum(-1)
    squared = variance - explained - (correlation * coef).sum(-1)
    # The residual, shrunk until no feature correlates with it more than the penalty, is feasible
    # in the dual problem, whose value no primal one can undercut.
    shrink = (l1 / correlation.abs().amax(-1)).clamp(max=1)
    dual = shrink * (variance - explained) - shrink.square() * squared / 2
    primal = squared / 2 + l1 * coef.abs().sum(-1)
    return relative((primal - dual).clamp(min=0), variance / 2)


def active_newton(
    gram: Float[Tensor, "problem d_model d_model"],
    cross: Float[Tensor, "problem d_model"],
    l1: float,
    coef: Float[Tensor, "problem d_model"],
    *,
    max_steps: int = 1000,
) -> Float[Tensor, "problem d_model"]:
    """Minimise `w'Gw/2 - c'w + l1 |w|_1` for every problem, from a first guess `coef`.

    Ends when no (sub)gradient exceeds 1e-9 of `l1` (1e-4 in float32), or when rounding ends
    progress; the caller measures what was reached.
    """
    coef = coef.clone()
    live = torch.arange(len(coef), device=coef.device)
    entering, idle = torch.full_like(live, 4), torch.zeros_like(live)
    tolerance = 1e-9 if coef.dtype == torch.float64 else 1e-4
    slack = tolerance * (1e-3 * cross.abs().amax(-1)).clamp(min=l1)
    for _ in range(max_steps):
        # At the optimum every gradient is `-l1 sign(w)`, and at most `l1` where w is zero.
        w, gradient = coef[live], _gradient(gram, cross, coef, live)
        on = w != 0
        excess = torch.where(on, (gradient + l1 * w.sign()).abs(), gradient.abs() - l1)
        unfinished = (excess.amax(-1) > slack[live]) & (idle[live] < 12)
        if not unfinished.any():
            break
        live, w, on, gradient, excess = (v[unfinished] for v in (live, w, on, gradient, excess))
        # In play: the support, and of the others those that violate optimality most. A zero will
        # move downhill, which gives its sign.
        violators = (~on & (excess > slack[live, None])).sum(-1)
        size = on.sum(-1) + torch.minimum(entering[live], violators)
        chosen = torch.where(on, torch.inf, excess).topk(max(int(size.max()), 1)).indices
        inside = torch.arange(chosen.shape[1], device=live.device) < size[:, None]
        sign = torch.where(on, w.sign(), -gradient.sign()).gather(1, chosen)
        start, slope = w.gather(1, chosen), gradient.gather(1, chosen)
        hessian = _padded(_blocks(gram, live, chosen), inside)
        moved, length = _signed_step(hessian, inside, start, slope, sign, l1)
        coef[live] = w.scatter(1, chosen, torch.where(inside, moved, start))
        # Rounding ends progress, in float32 well before optimality; the gap will tell.
        idle[live] = torch.where(length > 0, 0, idle[live] + 1)
        doubled, halved = (2 * entering[live]).clamp(1, 64), entering[live] // 2
        same = torch.where(length > 0.3, entering[live], halved)
        entering[live] = torch.where((length > 0.999) | (entering[live] == 0), doubled, same)
    return coef


def _gradient(
    gram: Float[Tensor, "problem d_model d_model"],
    cross: Float[Tensor, "problem d_model"],
    coef: Float[Tensor, "problem d_model"],
    live: Int[Tensor, " live"],
) -> Float[Tensor, "live d_model"]:
    """Return `Gw - c` of the live problems."""
    w = coef[live]
    size = max(int((w != 0).sum(-1).max()), 1)
    if 8 * size > coef.shape[1]:
        # One product each, where all at once would first copy the matrices of those still live.
        images = [gram[problem] @ row for problem, row in zip(live.tolist(), w, strict=True)]
        return torch.stack(images) - cross[live]
    # While the support is small, only the rows of G that it meets are read.
    support = w.abs().topk(size).indices
    return (w.gather(1, support)[:, None] @ gram[live[:, None], support])[:, 0] - cross[live]


def _blocks(
    gram: Float[Tensor, "problem d_model d_model"],
    live: Int[Tensor, " live"],
    chosen: Int[Tensor, "live chosen"],
) -> Float[Tensor, "live chosen chosen"]:
    """Return the rows and columns of G that were chosen for each problem."""
    if chosen.shape[1] < 64:
        return gram[live[:, None, None], chosen[:, :, None], chosen[:, None]]
    # Whole rows first: of large blocks, element by element costs as much as factorising them.
    pairs = zip(live.tolist(), chosen, strict=True)
    return torch.stack([gram[problem][rows][:, rows] for problem, rows in pairs])


def _padded(
    hessian: Float[Tensor, "live chosen chosen"], inside: Bool[Tensor, "live chosen"]
) -> Float[Tensor, "live chosen chosen"]:
    """Replace what lies outside by an identity, and lift the diagonal off exact singularity."""
    hessian = torch.where(inside[:, :, None] & inside[:, None], hessian, 0.0)
    lift = hessian.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    # Twins among the features would stop Cholesky; this much moves no fit beyond its tolerance.
    lift = lift * (1e-11 if hessian.dtype == torch.float64 else 1e-5)
    hessian.diagonal(dim1=-2, dim2=-1).add_(torch.where(inside, lift, 1.0))
    return hessian


def _signed_step(
    hessian: Float[Tensor, "live chosen chosen"],
    inside: Bool[Tensor, "live chosen"],
    coef: Float[Tensor, "live chosen"],
    gradient: Float[Tensor, "live chosen"],
    sign: Float[Tensor, "live chosen"],
    l1: float,
) -> tuple[Float[Tensor, "live chosen"], Float[Tensor, " live"]]:
    """Return the better of two Newton steps for given signs, and the share of it that was taken."""
    # With its signs given the objective is one parabola, and a Newton step goes to its minimum.
    factor, failed = torch.linalg.cholesky_ex(hessian)
    downhill = torch.where(inside, -gradient - l1 * sign, 0.0)
    newton = solve_factored(factor, downhill)
    # Not positive definite for all that: coordinate by coordinate is still downhill.
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    newton = torch.where(failed[:, None] > 0, downhill / diagonal, newton)
    target = _without_crossing(hessian, inside, coef, downhill, sign, coef + newton)
    clipped = torch.where(target * sign > 0, target, 0.0) * inside
    # A coefficient that would leave zero on the wrong side is not allowed to enter.
    free = torch.where((coef == 0) & (newton * sign <= 0), 0.0, newton)
    # Signs may change on the way after all, so each step is only a direction: how far to go along
    # it is found exactly, and the step that gains more is taken.
    steps = torch.stack([clipped - coef * inside, free])
    curved = (hessian @ steps[..., None])[..., 0]
    curvature = (steps * curved).sum(-1).clamp(min=torch.finfo(coef.dtype).tiny)
    slope = (steps * gradient).sum(-1)
    length = _line_minimum(coef.expand_as(steps), steps, slope, curvature, l1)
    moved = coef + length[..., None] * steps
    gain = (moved.abs() - coef.abs()).sum(-1) * l1 + slope * length + curvature * length**2 / 2
    # Exact zeros where a coefficient is meant to vanish, not what rounding leaves of it.
    moved[0] = torch.where(length[0, :, None] == 1, clipped, moved[0])
    moved = torch.where(moved.abs() < 1e-14 * coef.abs().amax(-1)[:, None], 0.0, moved)
    first = gain[0] <= gain[1]
    return torch.where(first[:, None], moved[0], moved[1]), torch.where(first, *length)


def _without_crossing(
    hessian: Float[Tensor, "live chosen chosen"],
    inside: Bool[Tensor, "live chosen"],
    coef: Float[Tensor, "live chosen"],
    downhill: Float[Tensor, "live chosen"],
    sign: Float[Tensor, "live chosen"],
    target: Float[Tensor, "live chosen"],
) -> Float[Tensor, "live chosen"]:
    """Drop the coefficients that a step would carry through zero, and solve for the others again.

    Setting them to zero alone, with features as collinear as these, undoes most of the step.
    """
    wanted = (hessian @ coef[..., None])[..., 0] + downhill
    staying = inside
    # Solving again may carry others through zero; six rounds settle nearly all.
    for _ in range(6):
        wrong = staying & (target * sign <= 0)
        again = wrong.any(-1).nonzero()[:, 0]
        if not len(again):
            break
        staying = staying & ~wrong
        on = staying[again]
        reduced = torch.where(on[:, :, None] & on[:, None], hessian[again], 0.0)
        reduced.diagonal(dim1=-2, dim2=-1).add_(torch.where(on, 0.0, 1.0))
        factor = torch.linalg.cholesky_ex(reduced).L
        solved = solve_factored(factor, torch.where(on, wanted[again], 0.0))
        target = target.index_copy(0, again, torch.where(on, solved, 0.0))
    return target


def _line_minimum(
    coef: Float[Tensor, "*live chosen"],
    step: Float[Tensor, "*live chosen"],
    slope: Float[Tensor, "*live"],
    curvature: Float[Tensor, "*live"],
    l1: float,
) -> Float[Tensor, "*live"]:
    """Minimise a convex parabola plus `l1 |w + t step|_1` over t in [0, 1], exactly."""
    # Where a coefficient crosses zero the derivative jumps by twice `l1 |step|`.
    crossing = torch.where(coef * step < 0, -coef / step, 2.0)
    crossing, order = crossing.sort(-1)
    kinks = 2 * l1 * step.abs().gather(-1, order)
    start = slope + l1 * torch.where(coef != 0, coef.sign() * step, step.abs()).sum(-1)
    # Between two crossings the derivative is a line: its offset grows by the kinks passed.
    offset = start[..., None] + pad(kinks.cumsum(-1), (1, 0))
    left, right = pad(crossing, (1, 0), value=0.0), pad(crossing, (0, 1), value=2.0)
    root = torch.minimum(torch.maximum(-offset / curvature[..., None], left), right)
    # The derivative never falls, so the minimum is in the first stretch that ends at or above zero.
    rising = (offset + curvature[..., None] * right >= 0).int().argmax(-1, keepdim=True)
    return torch.where(start < 0, root.gather(-1, rising)[..., 0].clamp(0, 1), 0.0)
