"""The batched solvers reach the optimum: scikit-learn agrees, and the gap says so."""

import logging
import warnings
from pathlib import Path

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression, Ridge

from mera_tl.probes import (
    Moments,
    Quadratic,
    lasso_path,
    logistic_path,
    ridge_path,
    solvers,
)
from mera_tl.probes import lasso as sparse
from mera_tl.probes import least_squares as wide
from mera_tl.probes.solvers import least_squares

SHARED = Path(__file__).resolve().parents[2] / "shared"
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
    ).subset(torch.arange(160).tolist())
    activations = mera_tl.collect(model, task)
    x = activations.resid("last")[[2, 6]].double()
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    target = torch.logit(activations.error.double(), eps=0.01)
    return x, target, activations.error > activations.error.median()


@pytest.fixture(params=["random", "collinear", "deficient", "real"])
def data(request):
    return request.getfixturevalue("real") if request.param == "real" else draw(request.param)


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


def test_least_squares_agrees(data):
    x, target, _ = data
    everyone = torch.ones(1, len(target), dtype=torch.bool)
    rows = wide.least_squares_from_rows(x, target, everyone)
    for solution in (least_squares(Quadratic.of(x, target)), rows):
        assert solution.converged.all()
        for layer in range(len(x)):
            reference = LinearRegression().fit(x[layer], target)
            w, b = solution.coef[layer, 0], solution.intercept[layer, 0]
            if unique(x[layer]):
                agree(w, reference.coef_)
            residual = (x[layer] @ w + b - target).square().mean()
            theirs = (torch.from_numpy(reference.predict(x[layer])) - target).square().mean()
            assert abs(residual - theirs) <= 1e-6


def test_least_squares_is_the_shortest_of_the_fits():
    x, target, _ = draw("deficient")
    reference = LinearRegression().fit(x[0], target).coef_
    agree(least_squares(Quadratic.of(x, target)).coef[0, 0], reference)
    few = torch.zeros(1, len(target), dtype=torch.bool)
    few[0, :15] = True  # fewer examples than features
    ours = wide.least_squares_from_rows(x, target, few).coef[0, 0]
    agree(ours, LinearRegression().fit(x[0, :15], target[:15]).coef_)
    agree(ours, least_squares(Quadratic.of(x[:, :15], target[:15])).coef[0, 0].numpy())


@pytest.mark.parametrize("penalty", [0.001, 1.0, 100.0])
def test_ridge_agrees(data, penalty):
    x, target, _ = data
    solution = ridge_path(Quadratic.of(x, target), torch.tensor([penalty]))
    assert solution.converged.all()
    for layer in range(len(x)):
        reference = Ridge(alpha=penalty * len(target)).fit(x[layer], target)
        agree(solution.coef[layer, 0], reference.coef_)
        agree(solution.intercept[layer, 0], reference.intercept_)


def lasso_objective(x, target, w, b, penalty):
    return float((x @ w + b - target).square().mean() / 2 + penalty * w.abs().sum())


def test_lasso_agrees_at_all_published_penalties(data):
    x, target, _ = data
    everyone = torch.ones(1, len(target), dtype=torch.bool)
    solution = lasso_path(Quadratic.of(x, target), torch.tensor(PUBLISHED))
    rows = wide.lasso_from_rows(x, target, everyone, torch.tensor(PUBLISHED))
    for each in (solution, rows):
        assert each.converged.all() and each.gap.max() < 1e-8
        assert float(each.coef.abs().sum()) == pytest.approx(float(rows.coef.abs().sum()), rel=1e-4)
    for layer in range(len(x)):
        for i, penalty in enumerate(PUBLISHED):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                reference = Lasso(alpha=penalty, tol=1e-13, max_iter=100_000).fit(x[layer], target)
            w, b = solution.coef[layer, i], solution.intercept[layer, i]
            ours = lasso_objective(x[layer], target, w, b, penalty)
            theirs = lasso_objective(
                x[layer], target, torch.from_numpy(reference.coef_), reference.intercept_, penalty
            )
            # Coordinate descent may run out of iterations; its own gap says by how much.
            assert -1e-9 <= theirs - ours <= 1e-6 + reference.dual_gap_
            if reference.dual_gap_ < 1e-12 and unique(x[layer][:, w != 0]):
                agree(w, reference.coef_)


def logistic_objective(x, positive, w, b, penalty, l1_share):
    margin = x @ w + b
    loss = torch.nn.functional.softplus(margin).sum() - margin[positive].sum()
    size = l1_share * w.abs().sum() + (1 - l1_share) * w.square().sum() / 2
    return float(loss + penalty * size)


@pytest.mark.parametrize("l1_share", [1.0, 0.0, 0.5])
def test_logistic_agrees(data, l1_share):
    x, _, positive = data
    penalties = torch.tensor([2.0, 10.0])
    everyone = torch.ones(1, len(positive), dtype=torch.bool)
    solution = logistic_path(x, positive, everyone, penalties, l1_share=l1_share)
    assert solution.converged.all()
    options = {"solver": "saga", "max_iter": 3000, "l1_ratio": l1_share}
    if l1_share == 0:
        options = {"solver": "newton-cholesky", "max_iter": 1000}
    for layer in range(len(x)):
        for i, penalty in enumerate(penalties.tolist()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reference = LogisticRegression(C=1 / penalty, tol=1e-12, random_state=0, **options)
                reference.fit(x[layer], positive)
            w, b = solution.coef[layer, i], solution.intercept[layer, i]
            theirs = torch.from_numpy(reference.coef_[0]), torch.from_numpy(reference.intercept_)
            ours = logistic_objective(x[layer], positive, w, b, penalty, l1_share)
            gap = logistic_objective(x[layer], positive, *theirs, penalty, l1_share) - ours
            # saga stops early on collinear features; ours may be lower, never higher.
            assert gap >= -1e-6
            if not reference.coef_.any():  # then it ends before the intercept is right
                assert not w.any()
            elif reference.n_iter_[0] < options["max_iter"]:
                assert gap <= 1e-6 * max(1, ours)
                if unique(x[layer][:, w != 0]):
                    agree(w, reference.coef_[0], rtol=1e-3 if l1_share else 1e-4)


# --- laws -----------------------------------------------------------------------------------------


def test_folds_and_batches_are_the_same_problem_as_their_rows():
    x, target, positive = draw("random")
    block = torch.arange(len(target)) % 10
    use = torch.rand(3, 10, generator=torch.Generator().manual_seed(1)) < 0.6
    moments = Moments(x[:, 0] * 5, n_blocks=10)  # an origin far from the mean
    for start in range(0, len(target), 37):
        stop = start + 37
        moments.add(x[:, start:stop], target[start:stop], block[start:stop])
    pooled = moments.pool(use)
    logistic = logistic_path(x, positive, use[:, block], torch.tensor([3.0]))
    for fold in range(3):
        rows = use[fold, block]
        alone = Quadratic.of(x[:, rows], target[rows])
        for name in ("gram", "cross", "variance", "mean", "target_mean"):
            got = getattr(pooled, name)[fold::3]
            assert torch.allclose(got, getattr(alone, name), atol=1e-9), name
        everyone = torch.ones(1, int(rows.sum()), dtype=torch.bool)
        single = logistic_path(x[:, rows], positive[rows], everyone, torch.tensor([3.0]))
        assert torch.allclose(logistic.coef[fold::3], single.coef, atol=1e-6)


def test_an_all_zero_lasso_predicts_the_mean():
    x, target, _ = draw("random")
    solution = lasso_path(Quadratic.of(x, target), torch.tensor([1e3]))
    assert (solution.coef == 0).all() and solution.converged.all()
    assert torch.allclose(solution.intercept, target.mean().expand(2, 1))


def test_a_constant_target_needs_no_weights():
    x, target, _ = draw("random")
    problems = Quadratic.of(x, torch.full_like(target, 0.4))
    for solution in (
        least_squares(problems),
        ridge_path(problems, torch.tensor([3.0])),
        lasso_path(problems, torch.tensor([0.1])),
    ):
        assert solution.coef.abs().max() < 1e-12 and solution.converged.all()
        assert torch.allclose(solution.intercept, torch.tensor(0.4, dtype=torch.float64))


def test_one_class_gets_smoothed_log_odds():
    x, _, positive = draw("random")
    use = torch.stack([positive, torch.ones_like(positive)])
    solution = logistic_path(x, positive, use, torch.tensor([1.0]))
    n = int(positive.sum())
    assert (solution.coef[::2] == 0).all() and solution.converged.all()
    assert torch.allclose(solution.intercept[0, 0].exp(), torch.tensor((n + 0.5) / 0.5).double())
    assert (solution.coef[1::2] != 0).any()  # control: with both classes it learns


def test_separable_classes_still_converge():
    x, target, _ = draw("random", n=40, d=60)
    everyone = torch.ones(1, 40, dtype=torch.bool)
    for share in (0.0, 1.0):
        solution = logistic_path(x, target > 0.7, everyone, torch.tensor([1e-3]), l1_share=share)
        assert solution.converged.all() and solution.coef.isfinite().all()


def test_dense_lasso_is_solved_too():
    """Half of 120 features matter: the support is large and must be found all the same."""
    x, target, _ = draw("random", n=200, d=120)
    solution = lasso_path(Quadratic.of(x, target), torch.tensor([0.005]))
    assert (solution.coef != 0).sum(-1).min() > 60 and solution.gap.max() < 1e-9


@pytest.mark.parametrize("kind", ["random", "collinear"])
def test_float32_is_close(kind):
    x, target, positive = draw(kind)
    problems = Quadratic.of(x, target), Quadratic.of(x.float(), target.float())
    penalty = torch.tensor([0.1])
    for solve in (lasso_path, ridge_path):
        exact, rough = (solve(each, penalty) for each in problems)
        assert rough.coef.dtype == torch.float32 and rough.converged.all()
        assert (exact.coef - rough.coef).abs().max() < 2e-2 * exact.coef.abs().max()
    everyone = torch.ones(1, len(target), dtype=torch.bool)
    rough = logistic_path(x.float(), positive, everyone, torch.tensor([5.0]))
    assert rough.converged.all()


def test_collinear_features_take_few_steps(monkeypatch):
    """Hundreds of coefficients among features whose variances fall as those of activations do."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, 401, dtype=torch.float64) ** -1.0
    axes = torch.linalg.qr(torch.randn(400, 400, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(300, 400, generator=generator, dtype=torch.float64) * spectrum @ axes
    x = (x - x.mean(0)) / x.std(0)
    problems = Quadratic.of(x[None], torch.randn(300, generator=generator, dtype=torch.float64))
    l1 = torch.tensor([[0.005]], dtype=torch.float64)

    def gap_after(n_steps):
        start = torch.zeros(1, 1, 400, dtype=torch.float64)
        coef = sparse.active_newton(problems.gram, problems.cross, l1, start, max_steps=n_steps)
        correlation = problems.cross[:, None] - coef @ problems.gram
        gap = solvers.duality_gap(correlation, coef, problems.cross, problems.variance, l1)
        return float(gap), int((coef != 0).sum())

    gap, n_features = gap_after(25)
    assert gap < 1e-9 and n_features > 100
    monkeypatch.setattr(sparse, "_without_crossing", lambda *parts: parts[-1])
    assert gap_after(25)[0] > 1e-3  # positive control: clipped and not solved for again
    assert gap_after(1000)[0] < 1e-9  # it gets there, later


def test_stopping_early_is_measured_and_said(monkeypatch, caplog):
    x, target, _ = draw("random")
    problems, penalty = Quadratic.of(x, target), torch.tensor([0.005])
    with caplog.at_level(logging.WARNING):
        lasso_path(problems, penalty)
        assert not caplog.records  # control: nothing to say when it converges
        stop = sparse.active_newton
        monkeypatch.setattr(solvers, "active_newton", lambda *args: stop(*args, max_steps=2))
        solution = lasso_path(problems, penalty)
    assert not solution.converged.any() and solution.gap.min() > 1e-4
    assert "2 of 2 fits stopped" in caplog.text


def test_the_duality_gap_bounds_the_distance_to_the_optimum():
    x, target, _ = draw("random")
    problems = Quadratic.of(x, target)
    l1 = torch.full((2, 1), 0.05, dtype=torch.float64)
    best = lasso_path(problems, torch.tensor([0.05])).coef
    generator = torch.Generator().manual_seed(0)
    for size in (0.0, 1e-3, 0.1, 1.0):
        noise = torch.randn(best.shape, generator=generator, dtype=torch.float64)
        other = best + size * noise
        correlation = problems.cross[:, None] - other @ problems.gram
        parts = (correlation, other, problems.cross, problems.variance, l1)
        gap = solvers.duality_gap(*parts)[0, 0] * problems.variance[0] / 2
        b = problems.intercept(other)[0, 0]
        excess = lasso_objective(x[0], target, other[0, 0], b, 0.05) - lasso_objective(
            x[0], target, best[0, 0], problems.intercept(best)[0, 0], 0.05
        )
        assert -1e-12 <= excess <= gap + 1e-12
