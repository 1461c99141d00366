"""L1, L2 and elastic logistic regression, for every layer, fold and penalty at once.

Proximal Newton: the log loss is replaced by its parabola at the current fit, on the nonzero
coefficients and the most promising others, and `sparse.active_newton` minimises that plus the
penalty. The intercept is eliminated exactly. Unlike a regression, a logistic fit has no sufficient
statistics, so it needs the examples; all folds read the same copy of them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from mera_tl.probes.lasso import active_newton
from mera_tl.probes.solvers import Solution, lower_products, relative, reported, tolerance_for


def logistic_path(
    resid: Float[Tensor, "layer example d_model"],
    positive: Bool[Tensor, " example"],
    use: Bool[Tensor, "fold example"],
    penalties: Float[Tensor, " penalty"],
    *,
    l1_share: float = 1.0,
) -> Solution:
    """Minimise the summed log loss + penalty * (l1_share |w|_1 + (1 - l1_share) |w|^2 / 2).

    Problems are layers times folds, folds varying fastest. This is scikit-learn's objective with
    `C = 1 / penalty` (> 0) and a free intercept. A fold with one class only gets its smoothed
    log-odds and no weights.
    """
    n_layers, count = len(resid), use.sum(-1).to(resid).repeat(len(resid))
    loss = _LogLoss(
        resid,
        resid.mT.contiguous(),
        positive.to(resid),
        (use.to(resid) / use.sum(-1, keepdim=True)).repeat(n_layers, 1),
        torch.arange(n_layers, device=resid.device).repeat_interleave(len(use)),
    )
    share = (loss.weight @ loss.positive * count + 0.5) / (count + 1)
    coef, intercept = resid.new_zeros(len(count), resid.shape[-1]), torch.logit(share)
    path: dict[float, tuple[Tensor, Tensor, Tensor]] = {}
    for penalty in sorted(set(penalties.tolist()), reverse=True):
        l1, l2 = penalty * l1_share / count, penalty * (1 - l1_share) / count
        path[penalty] = coef, intercept, _ = _minimise(loss, l1, l2, coef, intercept)
    fits = [path[penalty] for penalty in penalties.tolist()]
    coefs, intercepts, gaps = (torch.stack(part, 1) for part in zip(*fits, strict=True))
    return reported(Solution(coefs, intercepts, gaps, tolerance_for(resid)))


@dataclass(frozen=True, eq=False)
class _LogLoss:
    """The mean log loss of every problem, as a function of its margins (scores)."""

    rows: Float[Tensor, "layer example d_model"]
    columns: Float[Tensor, "layer d_model example"]
    positive: Float[Tensor, " example"]
    weight: Float[Tensor, "problem example"]
    """1/n for the n examples of a problem's fold, else zero."""
    layer: Int[Tensor, " problem"]

    def margin(
        self, coef: Float[Tensor, "problem d_model"], intercept: Float[Tensor, " problem"]
    ) -> Float[Tensor, "problem example"]:
        """Return the scores of all examples."""
        margin = intercept[:, None].expand_as(self.weight).clone()
        for layer in self.layer.unique().tolist():
            mine = self.layer == layer
            margin[mine] += coef[mine] @ self.columns[layer]
        return margin

    def residual(
        self, margin: Float[Tensor, "live example"], live: Int[Tensor, " live"]
    ) -> Float[Tensor, "live example"]:
        """Return the derivative of the loss by each margin."""
        return (torch.sigmoid(margin) - self.positive) * self.weight[live]

    def gradient(
        self, residual: Float[Tensor, "live example"], live: Int[Tensor, " live"]
    ) -> Float[Tensor, "live d_model"]:
        """Return the derivative of the loss by each coefficient."""
        layers = self.layer[live]
        gradient = residual.new_empty(len(live), self.rows.shape[-1])
        for layer in layers.unique().tolist():
            gradient[layers == layer] = residual[layers == layer] @ self.rows[layer]
        return gradient

    def value(
        self, margin: Float[Tensor, "live example"], live: Int[Tensor, " live"]
    ) -> Float[Tensor, " live"]:
        """Return the mean log loss."""
        return ((softplus(margin) - self.positive * margin) * self.weight[live]).sum(-1)


def _minimise(
    loss: _LogLoss,
    l1: Float[Tensor, " problem"],
    l2: Float[Tensor, " problem"],
    coef: Float[Tensor, "problem d_model"],
    intercept: Float[Tensor, " problem"],
    *,
    max_steps: int = 100,
) -> tuple[Float[Tensor, "problem d_model"], Float[Tensor, " problem"], Float[Tensor, " problem"]]:
    """Return coefficients, intercepts and the smallest subgradients relative to those at zero."""
    coef, intercept = coef.clone(), intercept.clone()
    share = loss.weight @ loss.positive
    everyone = torch.arange(len(coef), device=coef.device)
    at_zero = torch.logit(share)[:, None].expand_as(loss.weight)
    scale = loss.gradient(loss.residual(at_zero, everyone), everyone).abs().amax(-1)
    mixed = (share > 0) & (share < 1 - 1e-9)
    precision = 1e-8 if coef.dtype == torch.float64 else 1e-4
    slack = precision * torch.maximum(l1, 1e-3 * scale)
    gap, live = torch.zeros_like(scale), everyone[mixed]
    margin = loss.margin(coef, intercept)
    for _ in range(max_steps):
        residual = loss.residual(margin[live], live)
        gradient = loss.gradient(residual, live) + l2[live, None] * coef[live]
        excess = _excess(coef[live], gradient, l1[live])
        worst = torch.maximum(excess.amax(-1), residual.sum(-1).abs())
        gap[live] = relative(worst, scale[live])
        unfinished = worst > slack[live]
        if not unfinished.any():
            break
        live, residual, gradient, excess = (
            v[unfinished] for v in (live, residual, gradient, excess)
        )
        support = coef[live] != 0
        largest = int(support.sum(-1).max())
        size = largest + max(4, largest // 4) if l1.any() else coef.shape[1]
        chosen = torch.where(support, torch.inf, excess).topk(min(size, coef.shape[1])).indices
        parabola = _Parabola.at(loss, live, chosen, margin[live])
        w, rates = coef[live].gather(1, chosen), (l1[live], l2[live])
        step, shift = parabola.step(w, gradient.gather(1, chosen), residual.sum(-1), *rates)
        towards = (step[:, None] @ parabola.columns)[:, 0] + shift[:, None]
        length = _Line(loss, live, margin[live], towards, w, step, *rates).descend()
        coef[live] = coef[live].scatter(1, chosen, w + length[:, None] * step)
        intercept[live] += length * shift
        margin[live] += length[:, None] * towards
    return coef, intercept, gap


def _excess(
    coef: Float[Tensor, "live d_model"],
    gradient: Float[Tensor, "live d_model"],
    l1: Float[Tensor, " live"],
) -> Float[Tensor, "live d_model"]:
    """Return the size of the smallest subgradient, coefficient by coefficient."""
    at_zero = (gradient.abs() - l1[:, None]).clamp(min=0)
    return torch.where(coef != 0, (gradient + l1[:, None] * coef.sign()).abs(), at_zero)


@dataclass(frozen=True, eq=False)
class _Line:
    """The objective of each live problem along its step."""

    loss: _LogLoss
    live: Int[Tensor, " live"]
    margin: Float[Tensor, "live example"]
    towards: Float[Tensor, "live example"]
    coef: Float[Tensor, "live chosen"]
    step: Float[Tensor, "live chosen"]
    l1: Float[Tensor, " live"]
    l2: Float[Tensor, " live"]

    def value(self, length: Float[Tensor, " live"]) -> Float[Tensor, " live"]:
        """Return mean loss plus penalties of the coefficients in play."""
        coef = self.coef + length[:, None] * self.step
        penalty = self.l1 * coef.abs().sum(-1) + self.l2 * coef.square().sum(-1) / 2
        return self.loss.value(self.margin + length[:, None] * self.towards, self.live) + penalty

    def descend(self) -> Float[Tensor, " live"]:
        """Halve each step until the objective does not rise; zero where it always does."""
        length = torch.ones_like(self.l1)
        start = self.value(torch.zeros_like(length))
        # Near the minimum, differences drown in rounding: a rise that small is none.
        allowed = start + 4 * torch.finfo(start.dtype).eps * start.abs()
        for _ in range(30):
            too_far = ~(self.value(length) <= allowed)
            if not too_far.any():
                return length
            length = torch.where(too_far, length / 2, length)
        return torch.where(self.value(length) <= allowed, length, 0.0)


@dataclass(frozen=True, eq=False)
class _Parabola:
    """The second-order model of the log loss in a few coefficients and the intercept."""

    columns: Float[Tensor, "live chosen example"]
    hessian: Float[Tensor, "live chosen chosen"]
    """In the coefficients, the intercept following them."""
    centre: Float[Tensor, "live chosen"]
    total: Float[Tensor, " live"]

    @staticmethod
    def at(
        loss: _LogLoss,
        live: Int[Tensor, " live"],
        chosen: Int[Tensor, "live chosen"],
        margin: Float[Tensor, "live example"],
    ) -> "_Parabola":
        """Expand the loss at the current margins."""
        columns = loss.columns[loss.layer[live][:, None], chosen]
        chance = torch.sigmoid(margin)
        curvature = (chance * (1 - chance) * loss.weight[live]).clamp(min=1e-30)
        total = curvature.sum(-1)
        centre = (columns @ curvature[..., None])[..., 0] / total[:, None]
        hessian = _weighted_products(columns, curvature, loss.weight[live] > 0)
        hessian.baddbmm_((centre * total[:, None])[:, :, None], centre[:, None], alpha=-1)
        return _Parabola(columns, hessian, centre, total)

    def step(
        self,
        coef: Float[Tensor, "live chosen"],
        gradient: Float[Tensor, "live chosen"],
        pull: Float[Tensor, " live"],
        l1: Float[Tensor, " live"],
        l2: Float[Tensor, " live"],
    ) -> tuple[Float[Tensor, "live chosen"], Float[Tensor, " live"]]:
        """Minimise parabola and penalty; `pull` is the derivative by the intercept."""
        hessian = self.hessian + torch.diag_embed(l2[:, None].expand_as(coef))
        slope = gradient - self.centre * pull[:, None]
        if l1.any():
            cross = (hessian @ coef[..., None])[..., 0] - slope
            # The parabola is only a model: some steps on it are as good as its exact minimum.
            w = active_newton(hessian, cross, l1[:, None], coef[:, None], max_steps=12)
            step = w[:, 0] - coef
        else:
            step = -torch.linalg.solve_ex(hessian, slope).result
        return step, -pull / self.total - (self.centre * step).sum(-1)


def _weighted_products(
    columns: Float[Tensor, "live chosen example"],
    weight: Float[Tensor, "live example"],
    used: Bool[Tensor, "live example"],
) -> Float[Tensor, "live chosen chosen"]:
    """Return the sums over examples of `weight x x'`."""
    if columns.shape[1] < 128:
        return (columns * weight[:, None]) @ columns.mT
    # Many features: half of the products, of the examples that have weight, is worth the copies.
    products = columns.new_empty(*columns.shape[:2], columns.shape[1])
    for i, rows in enumerate(used):
        half = lower_products(columns[i][:, rows] * weight[i, rows].sqrt())
        products[i] = half.tril() + half.tril(-1).T
    return products
