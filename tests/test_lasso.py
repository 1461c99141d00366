"""The batched solvers reach the optimum: scikit-learn agrees, and the gap says so."""

import logging
import warnings

import pytest
import torch
from conftest import SHARED
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression, Ridge

from mera_tl.probes import Problems, lasso, lasso_path, logistic_path, ridge_path

PUBLISHED = (0.5, 0.25, 0.1, 0.05, 0.01, 0.005)


def draw(kind: str, *, n: int = 150, d: int = 24, layers: int = 2):
    """Planted regressions: features [layer example d], target, incorrect."""
    generator = torch.Generator().manual_seed(len(kind))
    x = torch.randn(layers, n, d, generator=generator, dtype=torch.float64)
    if kind == "collinear":
        x[..., 1::2] = x[..., ::2] + 1e-2 * x[..., 1::2]
    if kind == "deficient":
        x[..., d // 2 :] = x[..., : d - d // 2] @ torch.randn(
            d - d // 2, d - d // 2, generator=generator, dtype=torch.float64
        )
    planted = torch.randn(d, generator=generator, dtype=torch.float64) * (torch.arange(d) % 3 == 0)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    target = x[0] @ planted + 0.5 * noise + 0.7
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    return x, target, target + noise > 1


def whole(x, target) -> Problems:
    """One fold that uses every example."""
    return Problems(x, target.to(x), torch.ones(1, len(target), dtype=torch.bool))


@pytest.fixture(scope="module")
def real():
    """Residual stream and errors of a small trained model on real messages."""
    if not (SHARED / "models/sms-llama").exists():
        pytest.skip("needs the sms-llama model beside the repository")
    import mera_tl

    folder = SHARED / "models/sms-llama"
    model = mera_tl.load_model(str(folder))
    task = mera_tl.load_task(
        "sms_spam", data_dir=SHARED / "data", template=folder / "prompt_template.txt"
    ).subset(torch.arange(100).tolist())
    activations = mera_tl.collect(model, task)
    x = activations.resid("last")[[2, 6]].double()
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    target = torch.logit(activations.error.double(), eps=0.01)
    return x, target, activations.error > activations.error.median()


@pytest.fixture(params=["random", "collinear", "deficient", "real"])
def data(request):
    return request.getfixturevalue("real") if request.param == "real" else draw(request.param)


@pytest.fixture(params=["tall", "wide"])
def shape(request, monkeypatch):
    """Both ways to a solution, whatever the shape of the data would choose."""
    monkeypatch.setattr(Problems, "is_wide", request.param == "wide")


def agree(ours, theirs, *, rtol=1e-4):
    scale = max(1e-12, abs(theirs).max())
    assert abs(ours.numpy() - theirs).max() <= rtol * scale


def unique(x) -> bool:
    """Whether the coefficients of a least-squares fit are determined at all."""
    if x.shape[1] == 0:
        return False
    singular = torch.linalg.svdvals(x - x.mean(0))
    return bool(singular[-1] > 1e-5 * singular[0])


# --- agreement ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shape")
def test_least_squares_and_ridge_agree(data):
    x, target, _ = data
    penalties = (0.0, 0.001, 1.0, 100.0)
    solution = ridge_path(whole(x, target), penalties)
    assert solution.converged.all()
    for layer in range(len(x)):
        for i, penalty in enumerate(penalties):
            w, b = solution.coef[layer, 0, i], solution.intercept[layer, 0, i]
            model = Ridge(alpha=penalty * len(target)) if penalty else LinearRegression()
            reference = model.fit(x[layer], target)
            if penalty or unique(x[layer]):
                agree(w, reference.coef_)
                agree(b, reference.intercept_)
            theirs = torch.from_numpy(reference.predict(x[layer]))
            assert (x[layer] @ w + b - theirs).abs().max() < 1e-3


def test_least_squares_is_the_shortest_of_the_fits():
    x, target, _ = draw("deficient")
    reference = LinearRegression().fit(x[0], target).coef_
    agree(ridge_path(whole(x, target), (0.0,)).coef[0, 0, 0], reference)
    few = torch.arange(len(target))[None] < 15  # fewer examples than features
    problems = Problems(x, target, few)
    assert problems.is_wide
    ours = ridge_path(problems, (0.0,)).coef[0, 0, 0]
    agree(ours, LinearRegression().fit(x[0, :15], target[:15]).coef_)


def lasso_objective(x, target, w, b, penalty):
    return float((x @ w + b - target).square().mean() / 2 + penalty * w.abs().sum())


@pytest.mark.usefixtures("shape")
def test_lasso_agrees_at_all_published_penalties(data):
    x, target, _ = data
    solution = lasso_path(whole(x, target), PUBLISHED)
    assert solution.converged.all() and solution.gap.max() < 1e-8
    for layer in range(len(x)):
        for i, penalty in enumerate(PUBLISHED):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                reference = Lasso(alpha=penalty, tol=1e-13, max_iter=20_000).fit(x[layer], target)
            w, b = solution.coef[layer, 0, i], solution.intercept[layer, 0, i]
            ours = lasso_objective(x[layer], target, w, b, penalty)
            theirs = lasso_objective(
                x[layer], target, torch.from_numpy(reference.coef_), reference.intercept_, penalty
            )
            # Coordinate descent may run out of iterations; its own gap says by how much.
            assert -1e-9 <= theirs - ours <= 1e-6 + reference.dual_gap_
            if reference.dual_gap_ < 1e-12 and unique(x[layer][:, w != 0]):
                agree(w, reference.coef_)


def test_penalties_come_back_in_the_order_they_were_given_in():
    x, target, _ = draw("random")
    forth, back = (lasso_path(whole(x, target), p).coef for p in (PUBLISHED, PUBLISHED[::-1]))
    assert torch.equal(forth, back.flip(2)) and not torch.equal(forth, back)


def worst_subgradient(x, positive, w, b, penalty, *, l1):
    """Size of the smallest subgradient in units of the penalty, and that of the intercept."""
    residual = positive.to(x) - torch.sigmoid(x @ w + b)
    gradient = residual @ x
    if l1:
        off = torch.where(
            w != 0, (gradient - penalty * w.sign()).abs(), (gradient.abs() - penalty).clamp(min=0)
        )
    else:
        off = (gradient - penalty * w).abs()
    return float(off.max() / penalty), float(residual.sum().abs() / penalty)


@pytest.mark.parametrize("l1", [True, False])
def test_logistic_fits_are_optimal_and_their_intercept_is_free(data, l1):
    x, _, positive = data
    penalties, positive = (2.0, 10.0), positive.roll(3) if l1 else positive
    solution = logistic_path(whole(x, positive), penalties, l1=l1)
    for layer in range(len(x)):
        for i, penalty in enumerate(penalties):
            w, b = solution.coef[layer, 0, i], solution.intercept[layer, 0, i]
            weights, intercept = worst_subgradient(x[layer], positive, w, b, penalty, l1=l1)
            assert weights < (0.05 if l1 else 1e-4) and intercept < (0.05 if l1 else 1e-4)
            # Positive control: a little off is seen.
            assert worst_subgradient(x[layer], positive, w, b + 0.5, penalty, l1=l1)[1] > 0.05
    if not l1:
        reference = LogisticRegression(C=0.5, tol=1e-10, max_iter=10_000).fit(x[0], positive)
        agree(solution.coef[0, 0, 0], reference.coef_[0], rtol=1e-3)


# --- laws -----------------------------------------------------------------------------------------


def test_folds_are_the_same_problem_as_their_rows():
    x, target, positive = draw("random", n=80, d=12)
    use = torch.rand(3, 80, generator=torch.Generator().manual_seed(1)) < 0.6
    problems = Problems(x, target, use)
    classes = Problems(x, positive.to(x), use)
    logistic = logistic_path(classes, (3.0,), l1=False)
    for fold, rows in enumerate(use):
        alone = whole(x[:, rows], target[rows])
        for name in ("gram", "cross", "mean"):
            got = getattr(problems, name)[:, [fold]]
            assert torch.allclose(got, getattr(alone, name), atol=1e-9), name
        for name in ("variance", "target_mean"):
            assert torch.allclose(getattr(problems, name)[fold], getattr(alone, name)), name
        single = logistic_path(whole(x[:, rows], positive[rows]), (3.0,), l1=False)
        assert torch.allclose(logistic.coef[:, [fold]], single.coef, atol=1e-6)


def test_an_all_zero_lasso_predicts_the_mean():
    x, target, _ = draw("random")
    solution = lasso_path(whole(x, target), (1e3,))
    assert (solution.coef == 0).all() and solution.converged.all()
    assert torch.allclose(solution.intercept, target.mean())


@pytest.mark.usefixtures("shape")
def test_a_constant_target_needs_no_weights():
    x, target, _ = draw("random")
    problems = whole(x, torch.full_like(target, 0.4))
    for solution in (ridge_path(problems, (0.0, 3.0)), lasso_path(problems, (0.1,))):
        assert solution.coef.abs().max() < 1e-12 and solution.converged.all()
        assert torch.allclose(solution.intercept, torch.tensor(0.4, dtype=torch.float64))


def test_one_class_gets_smoothed_log_odds():
    x, _, positive = draw("random")
    use = torch.stack([positive, torch.ones_like(positive)])
    solution = logistic_path(Problems(x, positive.to(x), use), (1.0,), l1=True)
    n = int(positive.sum())
    assert (solution.coef[:, 0] == 0).all()
    assert float(solution.intercept[0, 0, 0].exp()) == pytest.approx((n + 0.5) / 0.5)
    assert (solution.coef[:, 1] != 0).any()  # control: with both classes it learns


def test_separable_classes_still_converge():
    x, target, _ = draw("random", n=40, d=60)
    for l1 in (False, True):
        solution = logistic_path(whole(x, target > 0.7), (1e-3,), l1=l1)
        assert solution.coef.isfinite().all() and (solution.coef != 0).any()


def test_dense_lasso_is_solved_too():
    """Half of 120 features matter: the support is large and must be found all the same."""
    x, target, _ = draw("random", n=200, d=120)
    solution = lasso_path(whole(x, target), (0.005,))
    assert (solution.coef != 0).sum(-1).min() > 60 and solution.gap.max() < 1e-9


@pytest.mark.parametrize("kind", ["random", "collinear"])
@pytest.mark.usefixtures("shape")
def test_float32_is_close(kind):
    x, target, _ = draw(kind)
    problems = whole(x, target), whole(x.float(), target.float())
    for solve in (lasso_path, ridge_path):
        exact, rough = (solve(each, (0.1,)) for each in problems)
        assert rough.coef.dtype == torch.float32 and rough.converged.all()
        assert (exact.coef - rough.coef).abs().max() < 2e-2 * exact.coef.abs().max()


def test_collinear_features_take_few_steps(monkeypatch):
    """Hundreds of coefficients among features whose variances fall as those of activations do."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, 401, dtype=torch.float64) ** -1.0
    axes = torch.linalg.qr(torch.randn(400, 400, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(300, 400, generator=generator, dtype=torch.float64) * spectrum @ axes
    x = (x - x.mean(0)) / x.std(0)
    target = torch.randn(300, generator=generator, dtype=torch.float64)
    problems = whole(x[None], target)

    def gap_after(n_steps):
        start = torch.zeros(1, 400, dtype=torch.float64)
        coef = lasso.active_newton(
            problems.gram[0], problems.cross[0], 0.005, start, max_steps=n_steps
        )
        gap = lasso.duality_gap(problems, coef[None, None], (0.005,))
        return float(gap), int((coef != 0).sum())

    gap, n_features = gap_after(25)
    assert gap < 1e-9 and n_features > 100
    monkeypatch.setattr(lasso, "_without_crossing", lambda *parts: parts[-1])
    assert gap_after(25)[0] > 1e-3  # positive control: clipped and not solved for again
    assert gap_after(1000)[0] < 1e-9  # it gets there, later


def test_stopping_early_is_measured_and_said(monkeypatch, caplog):
    x, target, _ = draw("random")
    problems = whole(x, target)
    with caplog.at_level(logging.WARNING):
        lasso_path(problems, (0.005,))
        assert not caplog.records  # control: nothing to say when it converges
        newton = lasso.active_newton
        monkeypatch.setattr(lasso, "active_newton", lambda *args: newton(*args, max_steps=2))
        solution = lasso_path(problems, (0.005,))
    assert not solution.converged.any() and solution.gap.min() > 1e-4
    assert "2 of 2 fits stopped" in caplog.text


def test_the_duality_gap_bounds_the_distance_to_the_optimum():
    x, target, _ = draw("random")
    problems = whole(x, target)
    best = lasso_path(problems, (0.05,)).coef

    def objective(coef):
        b = problems.intercept(coef)[0, 0, 0]
        return lasso_objective(x[0], target, coef[0, 0, 0], b, 0.05)

    generator = torch.Generator().manual_seed(0)
    for size in (0.0, 1e-3, 0.1, 1.0):
        noise = torch.randn(best.shape, generator=generator, dtype=torch.float64)
        other = best + size * noise
        gap = lasso.duality_gap(problems, other, (0.05,))[0, 0, 0] * problems.variance[0] / 2
        assert -1e-12 <= objective(other) - objective(best) <= gap + 1e-12
