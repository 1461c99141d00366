"""Probes read what was planted, say what cannot be read, and report on what no fit has seen."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_outcomes, random_probe
from pandas.testing import assert_frame_equal
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score

from mera_tl.inference import Activations
from mera_tl.probes import (
    Examples,
    LinearProbe,
    as_parts,
    choose_fits,
    cross_validation,
    fit_error_probe,
    fit_grid,
    fit_ranked_probe,
    held_out_table,
    metrics,
    probe_path,
    read_examples,
)

KINDS = ("ridge", "least_squares", "lasso", "logistic", "logistic_l2", "contrastive")
MANIFEST = {"model": "planted", "model_fingerprint": "f00d", "task": "toy", "data_hash": "1"}


def planted(
    n: int = 300, *, layer: int = 1, noise: float = 0.3, seed: int = 0, unanswered: int = 0
) -> Activations:
    """Three layers of width 16; the error is a linear function of one of them."""
    generator = torch.Generator().manual_seed(seed)
    resid = torch.randn(n, 3, 16, generator=generator) * torch.linspace(0.5, 20, 16) + 3
    direction = torch.linspace(-1, 1, 16) / torch.linspace(0.5, 20, 16)
    score = (resid[:, layer] - 3) @ direction - 0.5
    score = 1.2 * score + noise * torch.randn(n, generator=generator)
    return answers(resid, torch.sigmoid(score), unanswered)


def answers(resid, error, unanswered: int = 0) -> Activations:
    """Wrap activations [example layer d] and errors; the last examples give no answer."""
    n = len(error)
    probs = torch.stack([1 - error, error], 1)
    predictions = (error > 0.5).long()
    if unanswered:
        probs[-unanswered:], predictions[-unanswered:] = 0.0, -1
    outcomes = make_outcomes("ab", torch.zeros(n, dtype=torch.long), predictions, probs)
    exact = resid.clone()
    exact[n - unanswered :] = 0
    return Activations({"last": resid, "exact": exact}, outcomes, dict(MANIFEST))


# --- reading what is there ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_direction_is_found_and_noise_is_not(kind):
    probe = fit_error_probe(planted(), kind=kind)
    assert probe.best_layer == 1
    fresh = probe.measure(planted(seed=1))
    assert fresh["auroc"][1] > 0.75
    assert abs(fresh["auroc"][[0, 2]] - 0.5).max() < 0.12


@pytest.mark.parametrize(
    ("kind", "penalty"),
    [("ridge", None), ("ridge", 100.0), ("least_squares", None), ("lasso", None)],
)
def test_scores_are_log_odds_of_error_however_strong_the_penalty(kind, penalty):
    probe = fit_error_probe(planted(n=600), kind=kind, penalty=penalty)
    fresh = planted(n=600, seed=1)
    score, target = probe.score(fresh.resid("last"))[1], torch.logit(fresh.error, eps=0.01)
    slope = torch.cov(torch.stack([score, target]))[0, 1] / score.var()
    assert abs(slope - 1) < 0.1 and abs((score - target).mean()) < 0.2
    assert torch.allclose(probe.predicted_error(fresh.resid("last"))[1], torch.sigmoid(score))


def test_what_cannot_be_read_is_predicted_no_worse_than_by_the_mean():
    """An in-sample slope would make noise look like signal: see the second half."""
    noise = planted(n=60, layer=1)
    examples = Examples(noise.resid("last")[[0, 2]], noise.error, ~noise.correct)
    fits = fit_grid(examples, {"ridge": (3.0,), "least_squares": (0.0,)}, clip=0.01, seed=0)
    table = held_out_table(examples, fits, clip=0.01, seed=0)
    r2 = table.set_index(["kind", "layer"])["score_r2"]
    assert r2["ridge"].min() > -0.2
    assert r2["least_squares"].max() < -0.2  # control: capacity enough to overfit


def test_probes_act_on_raw_activations():
    """Rescaling and moving the features changes the weights, not the scores."""
    plain = planted()
    scale, move = torch.logspace(-2, 2, 16), torch.linspace(-50, 50, 16)
    moved = answers(plain.by_position["last"] * scale + move, plain.error)
    for kind in ("ridge", "least_squares", "lasso", "logistic"):
        first, second = fit_error_probe(plain, kind=kind), fit_error_probe(moved, kind=kind)
        scores = first.score(plain.resid("last")), second.score(moved.resid("last"))
        assert torch.allclose(*scores, atol=2e-2), kind
        assert not torch.allclose(first.weights, second.weights)


def test_logistic_reads_incorrectness_not_correctness():
    probe, fresh = fit_error_probe(planted(), kind="logistic"), planted(seed=1)
    score = probe.score(fresh.resid("last"))[1]
    assert score[~fresh.correct].mean() > score[fresh.correct].mean() + 1


def test_contrastive_is_the_difference_of_means():
    data = planted()
    for pairs in (0.0, 50.0, 1000.0):
        probe = fit_error_probe(data, kind="contrastive", penalty=pairs)
        order = data.error.argsort()
        k = min(int(pairs) or 150, 150)
        resid = data.resid("last")[1]
        difference = resid[order[-k:]].mean(0) - resid[order[:k]].mean(0)
        assert torch.cosine_similarity(probe.weights[1], difference, dim=0) > 0.9999


# --- choosing and reporting -----------------------------------------------------------------------


def test_folds_hold_out_thirty_percent_and_balance_the_classes():
    incorrect = torch.arange(200) % 5 == 0
    use = cross_validation.folds(incorrect, seed=3)
    assert (use.sum(1) == 140).all() and (~use).any(0).all()
    assert (use & incorrect).sum(1).eq(28).all()
    assert not torch.equal(use, cross_validation.folds(incorrect, seed=4))


def test_copies_of_a_text_are_never_held_out_from_each_other():
    """Noise, six times each: a copy among the fitted ones would make it look like signal."""
    one = planted(n=30, layer=1)
    shuffled = Examples(one.resid("last")[[0, 2]], one.error, ~one.correct).shuffled(0)
    order = torch.arange(30).repeat(6)
    copied = answers(shuffled.resid.transpose(0, 1)[order], shuffled.error[order])
    same = [[text + 30 * copy for copy in range(6)] for text in range(30)]
    told = replace(copied, manifest=MANIFEST | {"repeats": same})
    some = told.subset(torch.arange(179, -1, -1))  # rows keep their texts in any order
    for each in (told, some):
        examples = read_examples(each, "last")
        assert examples.texts is not None and len(examples.texts.unique()) == 30
        use = cross_validation.folds(examples.incorrect, 0, examples.texts)
        for text in range(30):
            assert (use[:, examples.texts == text].double().std(1) == 0).all()
        assert abs(use.double().mean() - 0.7) < 0.02
    grid = {"least_squares": (0.0,)}
    believed = [probe_path(each, grid=grid)["auroc"].mean() for each in (told, some, copied)]
    assert max(believed[:2]) < 0.65 < 0.75 < believed[2]  # control: nothing said of copies
    kept = fit_error_probe(told).manifest
    assert kept == MANIFEST | {"rows": "0-179"}  # it says what it saw, not every copy of it


def test_metrics_agree_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    error = torch.rand(200, generator=generator).double()
    score = torch.randn(3, 200, generator=generator).double().round(decimals=1)  # with ties
    incorrect = torch.rand(200, generator=generator) < error
    got = metrics.measure(score, error, incorrect, clip=0.01)
    for i in range(3):
        predicted = torch.sigmoid(score[i])
        assert got["auroc"][i] == pytest.approx(roc_auc_score(incorrect, score[i]))
        assert got["r2"][i] == pytest.approx(r2_score(error, predicted))
        assert got["rmse"][i] ** 2 == pytest.approx(got["mse"][i].item())
        target = torch.logit(error, eps=0.01)
        assert got["score_r2"][i] == pytest.approx(r2_score(target, score[i]))
        expected = balanced_accuracy_score(incorrect, predicted > 0.5)
        assert got["balanced_accuracy"][i] == pytest.approx(expected)
    score += 0.013  # off the edges of bins
    ece = metrics.calibration_error(torch.sigmoid(score), incorrect.double())
    share = torch.histc(torch.sigmoid(score[0]), 10, 0, 1) / 200
    observed, predicted = calibration_curve(incorrect, torch.sigmoid(score[0]), n_bins=10)
    bins = abs(torch.from_numpy(observed - predicted))
    assert ece[0] == pytest.approx((share[share > 0] * bins).sum().item())


def test_a_perfect_and_a_constant_score_have_the_metrics_they_must_have():
    error = torch.linspace(0.02, 0.98, 50).double()
    perfect, constant = torch.logit(error), torch.zeros(50).double()
    best = metrics.measure(perfect, error, error > 0.5, clip=0.01)
    none = metrics.measure(constant, error, error > 0.5, clip=0.01)
    assert best["rmse"] < 1e-9 and best["auroc"] == 1 and best["ece"] < 1e-9 and best["r2"] == 1
    assert none["auroc"] == 0.5 and none["balanced_accuracy"] == 0.5 and abs(none["r2"]) < 1e-9


def test_choosing_and_reporting_do_not_share_examples():
    """With no signal the best of many held-out fits looks good by luck; untouched ones do not."""
    noise = planted(n=60, layer=1, noise=0.0)
    shuffled = Examples(noise.resid("last"), noise.error, ~noise.correct).shuffled(0)
    data = answers(noise.by_position["last"], shuffled.error)
    fresh = planted(n=2000, seed=5)
    fresh = answers(fresh.by_position["last"], fresh.error[torch.randperm(2000)])
    table = probe_path(data, untouched=fresh, positions=("last", "exact"))
    chosen = choose_fits(table[table.position == "last"], by="auroc")
    assert chosen["auroc"].mean() > chosen["untouched_auroc"].mean() + 0.02
    assert abs(chosen["untouched_auroc"].mean() - 0.5) < 0.05
    # Both positions hold the same values here, so their rows must be the same too.
    one, two = (table[table.position == p].drop(columns="position") for p in ("last", "exact"))
    assert_frame_equal(one.reset_index(drop=True), two.reset_index(drop=True), atol=1e-9)


def test_folds_without_an_error_leave_the_choice_to_the_others():
    """Of five errors some folds hold out none, and an AUROC needs one."""
    data = planted(n=120, noise=0.0)
    rare = torch.zeros(120, dtype=torch.bool)
    rare[data.error.argsort()[-5:]] = True
    few = answers(data.by_position["last"], torch.where(rare, 0.9, 0.1))
    held_out = ~cross_validation.folds(~few.correct, 0)
    assert any(not few.correct[rows].logical_not().any() for rows in held_out)  # control
    probe = fit_error_probe(few, kind="logistic_l2")
    auroc = probe.table["auroc"]
    assert auroc.notna().all() and probe.best_layer == auroc.argmax() != 2


def test_best_median_and_worst_are_ranked_by_the_score():
    data = planted()
    table = probe_path(data, grid=cross_validation.REGRESSIONS)
    probes = {rank: fit_ranked_probe(data, rank) for rank in ("best", "median", "worst")}
    rmse = {rank: [row["rmse"] for row in probe.metrics] for rank, probe in probes.items()}
    for layer in range(3):
        ordered = sorted(table[table.layer == layer]["rmse"])
        ranked = [rmse[rank][layer] for rank in ("best", "median", "worst")]
        assert ranked == pytest.approx([ordered[0], ordered[3], ordered[-1]], rel=1e-9)
    # The errata of the published code: the best layer is not the first one.
    assert probes["best"].best_layer == 1


def test_transfer_and_mixture():
    tasks = {"one": planted(layer=1), "two": planted(layer=1, seed=9), "other": planted(layer=2)}
    probes = {name: fit_error_probe(data) for name, data in tasks.items()}
    best = {name: probe.measure(tasks["two"])["auroc"] for name, probe in probes.items()}
    assert best["one"][1] > 0.8 > 0.65 > best["other"][probes["other"].best_layer]
    mixed = fit_error_probe([tasks["one"], tasks["two"]])
    assert [part["task"] for part in mixed.manifest["mixture"]] == ["toy", "toy"]
    assert mixed.measure(planted(seed=7))["auroc"][1] > 0.8


def test_shuffled_targets_leave_nothing_to_read():
    examples = read_examples(planted(), "last")
    auroc = [
        held_out_table(each, fit_grid(each, {"ridge": (3.0,)}, **options), **options)["auroc"]
        for options in ({"clip": 0.01, "seed": 0},)
        for each in (examples, examples.shuffled(0))
    ]
    assert auroc[0][1] > 0.8 and abs(auroc[1] - 0.5).max() < 0.2


# --- what cannot be done is said ------------------------------------------------------------------


def test_unanswered_examples_count_at_last_and_are_left_out_at_exact(caplog):
    data = planted(unanswered=40)
    with caplog.at_level(logging.INFO):
        assert fit_error_probe(data, position="last").best_layer == 1
        assert "not answered" not in caplog.text
        exact = fit_error_probe(data, position="exact")
    assert "40 of 300 examples were not answered" in caplog.text
    answered = fit_error_probe(data.subset(torch.arange(260)), position="exact")
    assert torch.equal(exact.weights, answered.weights)  # not one number of the 40 is used
    with pytest.raises(ValueError, match="None of 30 examples has a 'exact' position"):
        fit_error_probe(planted(n=30, unanswered=30), position="exact")


def test_one_class_is_an_error_for_logistic_only():
    resid = planted(n=50).by_position["last"]
    data = answers(resid, 0.1 + 0.3 * torch.rand(50, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="all 50 are correct.*kind='ridge'"):
        fit_error_probe(data, kind="logistic")
    table = fit_error_probe(data, kind="ridge").table
    assert table["auroc"].isna().all() and table["rmse"].notna().all()


def test_a_constant_error_gives_no_direction_and_says_so(caplog):
    data = answers(planted(n=50).by_position["last"], torch.full((50,), 0.25))
    for kind in ("ridge", "least_squares", "lasso", "contrastive"):
        caplog.clear()
        probe = fit_error_probe(data, kind=kind)
        assert "there is nothing to read" in caplog.text
        assert probe.weights.abs().max() < 1e-6
        predicted = probe.predicted_error(data.resid("last"))
        assert torch.allclose(predicted, torch.tensor(0.25), atol=1e-4)


def test_an_all_zero_lasso_has_no_direction_and_says_so(caplog):
    probe = fit_error_probe(planted(), kind="lasso", penalty=1e3)
    assert (probe.weights == 0).all() and probe.table["auroc"].eq(0.5).all()
    assert "Nothing could be read in any layer" in caplog.text


@pytest.mark.parametrize("wrong", [None, "task", [planted(n=20), 3], []])
def test_what_is_not_activations_is_named(wrong):
    # Below the type checker of the tests, as a user's call is.
    with pytest.raises(ValueError, match=r"on activations, but got .*collect\(model, task\)"):
        as_parts(wrong)


def test_nan_few_examples_and_mixed_models_are_errors():
    broken = planted(n=50)
    broken.by_position["last"][7, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="layer 2, example 7"):
        fit_error_probe(broken)
    with pytest.raises(ValueError, match="at least 10 examples.*got 9"):
        fit_error_probe(planted(n=9))
    alike = replace(planted(n=20), manifest={"repeats": [list(range(11))]})
    with pytest.raises(ValueError, match="different texts.*got 9"):
        fit_error_probe(replace(alike, manifest={"repeats": [list(range(12))]}))
    assert fit_error_probe(alike).n_layers == 3  # ten texts are enough
    other = replace(planted(), manifest=MANIFEST | {"model_fingerprint": "beef"})
    with pytest.raises(ValueError, match="come from 2"):
        fit_error_probe([planted(), other])


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_examples_than_features_is_fine(kind):
    generator = torch.Generator().manual_seed(0)
    resid = torch.randn(60, 2, 120, generator=generator)
    data = answers(resid, torch.sigmoid(2 * resid[:, 1, 0] + resid[:, 1, 1]))
    probe = fit_error_probe(data, kind=kind)
    assert probe.weights.isfinite().all() and probe.bias.isfinite().all()
    if kind == "least_squares":  # it interpolates
        target = torch.logit(data.error, eps=0.01)
        assert torch.allclose(probe.score(data.resid("last"))[1], target, atol=1e-3)


def test_constant_features_get_weight_zero():
    data = planted()
    data.by_position["last"][:, :, 5] = 0.1
    for kind in ("ridge", "least_squares", "logistic"):
        probe = fit_error_probe(data, kind=kind)
        assert (probe.weights[:, 5] == 0).all() and probe.weights[1].abs().sum() > 0


def test_layers_in_chunks_are_the_layers_at_once(monkeypatch):
    whole = fit_error_probe(planted(), kind="lasso")
    monkeypatch.setattr(cross_validation, "CHUNK_BYTES", 1)
    assert torch.allclose(fit_error_probe(planted(), kind="lasso").weights, whole.weights)


# --- keeping a probe ------------------------------------------------------------------------------


def test_a_saved_probe_comes_back_whole_and_knows_its_model(tmp_path, models):
    data = replace(planted(), manifest=MANIFEST | models["gpt2"].manifest)
    probe = fit_error_probe(data)
    back = LinearProbe.load(probe.save(tmp_path / "probe"))
    for name in ("weights", "bias", "resid_norm"):
        assert torch.equal(getattr(probe, name), getattr(back, name))
    assert repr(back) == repr(probe) and back.table.equals(probe.table)
    assert back.manifest == probe.manifest and "best layer 1 of 3" in back._repr_html_()
    back.check(models["gpt2"])  # control: the right model passes
    with pytest.raises(ValueError, match="model_fingerprint .* but .* fit a probe on this model"):
        back.check(models["qwen2"])
    with pytest.raises(ValueError, match="There is no file"):
        LinearProbe.load(tmp_path / "elsewhere")


def test_a_probe_per_answer_is_a_probe(tmp_path):
    generator = torch.Generator().manual_seed(0)
    resid = torch.randn(2, 12, 3, generator=generator)
    tiny = SimpleNamespace(n_layers=2, d_model=3)
    one, other = (
        replace(random_probe(tiny, seed=seed), bias=torch.randn(2, generator=generator))
        for seed in (1, 2)
    )
    both = LinearProbe.of_answers(one, (one, other))
    answers = torch.tensor([0, 1, -1] * 4)
    expected = torch.where(answers == 1, other.score(resid), one.score(resid))
    assert torch.allclose(both.score(resid, answers), expected, atol=1e-6)
    assert not torch.allclose(both.score(resid, (answers != 1).long()), expected)
    assert both.per_answer and both.n_layers == one.n_layers == 2 and not one.per_answer
    loaded = LinearProbe.load(both.save(tmp_path))
    assert torch.equal(loaded.predicted_error(resid, answers), both.predicted_error(resid, answers))
    with pytest.raises(ValueError, match="pass the unsteered answers"):
        both.score(resid)
