"""Minimise a parabola plus an L1 norm: the step that lasso and L1 logistic regression share.

Newton's method on the support. Each step takes the nonzero coefficients and the few that violate
optimality most, solves for them exactly, and is tried twice: with the coefficients that would
change sign dropped and the others solved for again, and in full. Both are searched for the minimum
of the piecewise parabola along them. How many coefficients may enter at once doubles when a step
succeeds and halves when it does not; one at a time always gains, which is why the method ends.

Activations are so collinear that their Gram matrix has a condition number of 1e10 and a lasso
keeps a dozen coefficients: there coordinate descent runs out of iterations, and this is exact.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def active_newton(
    gram: Float[Tensor, "problem d_model d_model"],
    cross: Float[Tensor, "problem d_model"],
    l1: Float[Tensor, "problem penalty"],
    coef: Float[Tensor, "problem penalty d_model"],
    *,
    max_steps: int = 1000,
) -> Float[Tensor, "problem penalty d_model"]:
    """Minimise `w'Gw/2 - c'w + l1 |w|_1` for every penalty, from a first guess `coef`.

    Ends when no (sub)gradient exceeds 1e-9 of `l1` (1e-4 in float32), or when rounding ends
    progress; the caller measures what was reached.
    """
    shape, coef = coef.shape, coef.flatten(0, 1).clone()
    owner = torch.arange(shape[0], device=coef.device).repeat_interleave(shape[1])
    l1 = l1.flatten()
    live = torch.arange(len(coef), device=coef.device)
    entering, idle = torch.full_like(live, 4), torch.zeros_like(live)
    tolerance = 1e-9 if coef.dtype == torch.float64 else 1e-4
    slack = tolerance * torch.maximum(l1, 1e-3 * cross.abs().amax(-1)[owner])
    for _ in range(max_steps):
        w = coef[live]
        gradient = _gradient(gram, cross, coef, shape[1], live)
        pull = gradient + l1[live, None] * w.sign()
        excess = torch.where(w != 0, pull.abs(), gradient.abs() - l1[live, None])
        unfinished = (excess.amax(-1) > slack[live]) & (idle[live] < 12)
        if not unfinished.any():
            break
        live, w, gradient, excess = (v[unfinished] for v in (live, w, gradient, excess))
        sign = torch.where(w != 0, w.sign(), -gradient.sign())
        violators = ((w == 0) & (excess > slack[live, None])).sum(-1)
        size = (w != 0).sum(-1) + torch.minimum(entering[live], violators)
        chosen = torch.where(w != 0, torch.inf, excess).topk(max(int(size.max()), 1)).indices
        inside = torch.arange(chosen.shape[1], device=live.device) < size[:, None]
        hessian = _padded(_blocks(gram, owner[live], chosen), inside)
        moved, length = _signed_step(
            hessian,
            inside,
            w.gather(1, chosen),
            gradient.gather(1, chosen),
            sign.gather(1, chosen),
            l1[live],
        )
        coef[live] = w.scatter(1, chosen, torch.where(inside, moved, w.gather(1, chosen)))
        # Rounding ends progress, in float32 well before optimality; the gap will tell.
        idle[live] = torch.where(length > 0, 0, idle[live] + 1)
        doubled, halved = (2 * entering[live]).clamp(1, 64), entering[live] // 2
        kept = torch.where(length > 0.3, entering[live], halved)
        entering[live] = torch.where((length > 0.999) | (entering[live] == 0), doubled, kept)
    return coef.view(shape)


def _gradient(
    gram: Float[Tensor, "problem d_model d_model"],
    cross: Float[Tensor, "problem d_model"],
    coef: Float[Tensor, "fit d_model"],
    n_penalties: int,
    live: Int[Tensor, " live"],
) -> Float[Tensor, "live d_model"]:
    """Return `Gw - c` of the live fits."""
    w, owner = coef[live], live // n_penalties
    size = max(int((w != 0).sum(-1).max()), 1)
    if 8 * size > coef.shape[1]:
        images = torch.empty_like(w)
        for problem in owner.unique().tolist():
            mine = owner == problem
            images[mine] = w[mine] @ gram[problem]
        return images - cross[owner]
    # While the support is small, only the rows of G that it meets are read.
    support = w.abs().topk(size).indices
    return (w.gather(1, support)[:, None] @ gram[owner[:, None], support])[:, 0] - cross[owner]


def _blocks(
    gram: Float[Tensor, "problem d_model d_model"],
    owner: Int[Tensor, " live"],
    chosen: Int[Tensor, "live chosen"],
) -> Float[Tensor, "live chosen chosen"]:
    """Return the rows and columns of G that were chosen for each fit."""
    if chosen.shape[1] < 64:
        return gram[owner[:, None, None], chosen[:, :, None], chosen[:, None]]
    # Whole rows first: of large blocks, element by element costs as much as factorising them.
    pairs = zip(owner.tolist(), chosen, strict=True)
    return torch.stack([gram[problem][rows][:, rows] for problem, rows in pairs])


def _padded(
    hessian: Float[Tensor, "live chosen chosen"], inside: Bool[Tensor, "live chosen"]
) -> Float[Tensor, "live chosen chosen"]:
    """Replace what lies outside by an identity, and lift the diagonal off exact singularity."""
    hessian = torch.where(inside[:, :, None] & inside[:, None], hessian, 0.0)
    lift = hessian.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    lift = lift * (1e-11 if hessian.dtype == torch.float64 else 1e-5)
    hessian.diagonal(dim1=-2, dim2=-1).add_(torch.where(inside, lift, 1.0))
    return hessian


def _signed_step(
    hessian: Float[Tensor, "live chosen chosen"],
    inside: Bool[Tensor, "live chosen"],
    coef: Float[Tensor, "live chosen"],
    gradient: Float[Tensor, "live chosen"],
    sign: Float[Tensor, "live chosen"],
    l1: Float[Tensor, " live"],
) -> tuple[Float[Tensor, "live chosen"], Float[Tensor, " live"]]:
    """Return the better of two Newton steps for given signs, and the share of it that was taken."""
    factor, failed = torch.linalg.cholesky_ex(hessian)
    downhill = torch.where(inside, -gradient - l1[:, None] * sign, 0.0)
    newton = _solve(factor, downhill)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    newton = torch.where(failed[:, None] > 0, downhill / diagonal, newton)
    target = _without_crossing(hessian, inside, coef, downhill, sign, coef + newton)
    clipped = torch.where(target * sign > 0, target, 0.0) * inside
    # A coefficient that would leave zero on the wrong side is not allowed to enter.
    free = torch.where((coef == 0) & (newton * sign <= 0), 0.0, newton)
    steps = torch.stack([clipped - coef * inside, free])
    curved = (hessian @ steps[..., None])[..., 0]
    curvature = (steps * curved).sum(-1).clamp(min=torch.finfo(coef.dtype).tiny)
    slope = (steps * gradient).sum(-1)
    length = _line_minimum(coef.expand_as(steps), steps, slope, curvature, l1.expand_as(slope))
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
    kept = inside
    for _ in range(6):
        wrong = kept & (target * sign <= 0)
        again = wrong.any(-1).nonzero()[:, 0]
        if not len(again):
            break
        kept = kept & ~wrong
        on = kept[again]
        reduced = torch.where(on[:, :, None] & on[:, None], hessian[again], 0.0)
        reduced.diagonal(dim1=-2, dim2=-1).add_(torch.where(on, 0.0, 1.0))
        solved = _solve(torch.linalg.cholesky_ex(reduced).L, torch.where(on, wanted[again], 0.0))
        target = target.index_copy(0, again, torch.where(on, solved, 0.0))
    return target


def _solve(
    factor: Float[Tensor, "live chosen chosen"], wanted: Float[Tensor, "live chosen"]
) -> Float[Tensor, "live chosen"]:
    half = torch.linalg.solve_triangular(factor, wanted[..., None], upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)[..., 0]


def _line_minimum(
    coef: Float[Tensor, "*live chosen"],
    step: Float[Tensor, "*live chosen"],
    slope: Float[Tensor, "*live"],
    curvature: Float[Tensor, "*live"],
    l1: Float[Tensor, "*live"],
) -> Float[Tensor, "*live"]:
    """Minimise a convex parabola plus `l1 |w + t step|_1` over t in [0, 1], exactly."""
    crossing = torch.where(coef * step < 0, -coef / step, 2.0)
    crossing, order = crossing.sort(-1)
    kinks = 2 * l1[..., None] * step.abs().gather(-1, order)
    start = slope + l1 * torch.where(coef != 0, coef.sign() * step, step.abs()).sum(-1)
    # Between two crossings the derivative is a line: its offset grows by the kinks passed.
    offset = start[..., None] + torch.nn.functional.pad(kinks.cumsum(-1), (1, 0))
    left = torch.nn.functional.pad(crossing, (1, 0), value=0.0)
    right = torch.nn.functional.pad(crossing, (0, 1), value=2.0)
    root = torch.minimum(torch.maximum(-offset / curvature[..., None], left), right)
    rising = (offset + curvature[..., None] * right >= 0).int().argmax(-1, keepdim=True)
    return torch.where(start < 0, root.gather(-1, rising)[..., 0].clamp(0, 1), 0.0)
