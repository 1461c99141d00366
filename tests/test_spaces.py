"""The laws of SAE space, on tiny SAEs of every architecture and on the organism's own."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_outcomes, make_task, organism, random_probe

from mera_tl.inference import Activations, collect, evaluate
from mera_tl.models import resid_post
from mera_tl.probes import fit_error_probe, metrics
from mera_tl.sae import check, fit_latent_probe, load_saes, reconstruction
from mera_tl.steering import Adaptive, Additive, ResidualSpace, SAESpace, Steering

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments._latent_predictions import predictions  # noqa: E402

LAYER, WIDTH, D_SAE = 1, 32, 96
ARCHITECTURES = ("standard", "jumprelu", "topk", "topk_unit_rows", "batchtopk")


def new_sae(architecture: str, *, layer: int = LAYER, d_in: int = WIDTH, **settings):
    """An SAE with random weights, a decoder of uneven rows, and some latents on."""
    from sae_lens.saes import jumprelu_sae, standard_sae, topk_sae

    torch.manual_seed(layer)
    own = {"topk": {"k": 8}, "topk_unit_rows": {"k": 8, "rescale_acts_by_decoder_norm": True}}
    sae_class, config_class = {
        "standard": (standard_sae.StandardSAE, standard_sae.StandardSAEConfig),
        "topk": (topk_sae.TopKSAE, topk_sae.TopKSAEConfig),
        "topk_unit_rows": (topk_sae.TopKSAE, topk_sae.TopKSAEConfig),
    }.get(architecture, (jumprelu_sae.JumpReLUSAE, jumprelu_sae.JumpReLUSAEConfig))
    config = config_class(d_in=d_in, d_sae=D_SAE, **own.get(architecture, {}), **settings)
    config.metadata.hook_name = resid_post(layer)
    config.metadata.prepend_bos = False
    config.metadata.model_name = "tiny"
    if architecture == "batchtopk":  # is saved as a JumpReLU that says what it was
        config.metadata.training_architecture = "batchtopk"
    sae = sae_class(config)
    with torch.no_grad():
        for weight in (sae.W_enc, sae.W_dec):
            weight.copy_(torch.randn_like(weight) / 6)
        sae.W_dec.mul_(torch.linspace(0.5, 1.5, D_SAE)[:, None])
        sae.b_enc.copy_(torch.randn(D_SAE) / 10)
        sae.b_dec.copy_(torch.randn(d_in) / 10)
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.4)
    return sae


@pytest.fixture(params=ARCHITECTURES)
def space(request):
    return SAESpace({LAYER: new_sae(request.param)})


@pytest.fixture(scope="module")
def resid():
    return torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(0)) * 2


def some_shift(latents, size=1.0):
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)) * size


# --- reading and writing ------------------------------------------------------------------------


def test_an_edit_keeps_what_the_sae_does_not_explain(space, resid):
    """`write` equals `decode(a') + (h - decode(a))`, by sae-lens's own decoder."""
    sae = space.saes[LAYER]
    latents = space.read(resid, LAYER)
    shift = some_shift(latents)
    target = space.target(latents, shift, LAYER)
    written = space.write(resid, latents, shift, LAYER)
    expected = sae.decode(target) + (resid - sae.decode(latents))
    assert (written - resid).abs().max() > 0.5  # there is an edit
    assert (resid - sae.decode(latents)).abs().max() > 0.5  # and something unexplained
    assert (written - expected).abs().max() < 1e-4


def test_few_latents_are_written_as_all_of_them(space, resid):
    """The short way, through the touched rows of the decoder only, gives the same."""
    sae, latents = space.saes[LAYER], space.read(resid, LAYER)
    shift = torch.zeros_like(latents)
    shift[:, latents.sum(0).topk(3).indices] = -0.3
    written = space.write(resid, latents, shift, LAYER)
    change = sae.decode(space.target(latents, shift, LAYER)) - sae.decode(latents)
    assert change.abs().max() > 0.01
    assert (written - resid - change).abs().max() < 1e-5


@pytest.mark.parametrize("correction", ["none", "gain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_shift_leaves_the_activation_bit_equal(space, resid, dtype, correction):
    space, h = replace(space, correction=correction), resid.to(dtype)
    latents = space.read(h, LAYER)
    assert latents.dtype == torch.float32
    written = space.write(h, latents, torch.zeros_like(latents), LAYER)
    assert written.dtype == dtype
    assert torch.equal(written, h)
    # Control: replacing the activation by its reconstruction is another thing.
    assert not torch.allclose(space.reconstruct(h, LAYER), h, atol=0.1)


def test_latents_stay_at_zero_or_above_and_topk_keeps_its_support(space, resid):
    latents = space.read(resid, LAYER)
    shift = some_shift(latents, 5.0)
    target = space.target(latents, shift, LAYER)
    assert (latents + shift).min() < 0
    assert target.min() >= 0
    newly_on = (target > 0) & (latents == 0)
    assert newly_on.any() != space.keeps_support(LAYER)


def test_which_architectures_keep_their_support():
    kept = {a: SAESpace({LAYER: new_sae(a)}).keeps_support(LAYER) for a in ARCHITECTURES}
    assert kept == {
        "standard": False,
        "jumprelu": False,
        "topk": True,
        "topk_unit_rows": True,
        "batchtopk": True,
    }


def test_gain_is_found_again_to_first_order(resid):
    """A small shift of one latent that is on re-encodes to itself, which it else does not."""
    plain = SAESpace({LAYER: new_sae("standard")})
    latents = plain.read(resid, LAYER)
    on = (latents > 1).nonzero()[:20]
    shift = torch.zeros(len(on), D_SAE)
    shift[torch.arange(len(on)), on[:, 1]] = 0.01
    found = {}
    for correction in ("none", "gain"):
        space = replace(plain, correction=correction)
        written = space.write(resid[on[:, 0]], latents[on[:, 0]], shift, LAYER)
        again = space.read(written, LAYER) - latents[on[:, 0]]
        found[correction] = again[torch.arange(len(on)), on[:, 1]]
    encoder, decoder = plain.saes[LAYER].W_enc.T, plain.saes[LAYER].W_dec
    gain = (encoder * decoder).sum(-1)[on[:, 1]]
    usable = gain > 0.1  # below, a shift is not stretched further
    assert usable.any()
    assert (found["none"] / 0.01 - gain).abs().max() < 1e-2
    assert (found["none"] / 0.01 - 1).abs().max() > 0.2
    assert (found["gain"][usable] / 0.01 - 1).abs().max() < 2e-2


def test_strength_is_in_units_of_the_residual_stream(space):
    """Additive steering is as long in the stream as it is in raw space, before clipping."""
    direction = some_shift(torch.zeros(D_SAE))
    unit = torch.tensor(7.0) * space.stretch(direction, LAYER)
    step = Additive(1.0).step(direction, direction, unit)
    assert space.decode(step, LAYER).norm().item() == pytest.approx(7.0, rel=1e-4)
    raw = ResidualSpace()
    assert torch.equal(raw.stretch(direction, LAYER), torch.tensor(1.0))
    assert torch.equal(space.stretch(torch.zeros(D_SAE), LAYER), torch.tensor(0.0))


# --- inside a model -----------------------------------------------------------------------------


def latent_probe(model, *, bias=0.0):
    """A probe that knows nothing, on latents of layer 1 alone."""
    probe = random_probe(model)
    weights = torch.zeros(model.n_layers, D_SAE)
    weights[LAYER] = torch.randn(D_SAE, generator=torch.Generator().manual_seed(3))
    return replace(probe, weights=weights, bias=torch.full((model.n_layers,), bias))


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_only_tokens_above_the_limit_change_inside_a_model(models, architecture):
    model = models["llama"]
    space = SAESpace({LAYER: new_sae(architecture)})
    steering = Steering(latent_probe(model), space=space)
    assert [name for name, _ in steering.fwd_hooks()] == [resid_post(LAYER)]
    seen = []

    def look(resid, hook):  # noqa: ARG001
        seen.append(resid.clone())

    tokens = torch.randint(4, 40, (6, 9), generator=torch.Generator().manual_seed(0))
    weights = steering.probe.weights[LAYER]
    hooks = replace(steering, rule=Adaptive(0.5)).fwd_hooks()
    for each in ([], hooks):
        with torch.no_grad(), model.hooked.hooks(fwd_hooks=[*each, (resid_post(LAYER), look)]):
            model.hooked(tokens, attention_mask=torch.ones_like(tokens))
    score = space.read(seen[0], LAYER) @ weights
    assert (score > 0.5).any()
    assert (score <= 0.5).any()
    changed = (seen[0] != seen[1]).any(-1)
    assert changed.any()
    assert not changed[score <= 0.5].any()
    # In latents the score falls; how far is left after re-encoding is measured, not promised.
    latents = space.read(seen[0], LAYER)
    shift = Adaptive(0.5).amount(score)[..., None] * Adaptive(0.5).step(
        weights, weights, torch.tensor(1.0)
    )
    after = space.target(latents, shift, LAYER) @ weights
    assert (after[changed] < score[changed]).all()


def test_an_infinite_limit_is_no_steering_bit_for_bit(models):
    model = models["llama"]
    task = make_task(8)
    space = SAESpace({LAYER: new_sae("standard")})
    steering = Steering(latent_probe(model), space=space)
    plain = evaluate(model, task)
    abstained = evaluate(model, task, steering.fwd_hooks())
    moved = evaluate(model, task, replace(steering, rule=Adaptive(-9.0)).fwd_hooks())
    assert torch.equal(plain.probs, abstained.probs)
    assert abstained.max_score.isfinite().all()
    assert moved.n_steered.sum() > 0


def test_layers_without_an_sae_are_not_steered(models):
    model = models["llama"]
    space = SAESpace({LAYER: new_sae("standard")})
    assert Steering(latent_probe(model), space=space).layer_numbers == (LAYER,)
    with pytest.raises(ValueError, match="layers=best but there is no SAE of layer 2, only of 1"):
        Steering(replace(latent_probe(model), best_layer=2), space=space, layers="best")
    with pytest.raises(ValueError, match="no SAE of layer 0, only of 1"):
        Steering(latent_probe(model), space=space, layers=(0, 1))


# --- probes on latents --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    """Activations of a three-layer model in which one latent of layer 1 tells the error."""
    n, space = 300, SAESpace({1: new_sae("standard"), 2: new_sae("standard", layer=2)})
    resid = torch.randn(n, 3, WIDTH, generator=torch.Generator().manual_seed(5)) * 2
    latents = space.read(resid[:, 1], 1)
    firing = (latents > 0).float().mean(0)
    latent = int((firing - 0.5).abs().argmin())
    error = torch.where(latents[:, latent] > 0.3, 0.9, 0.1)
    correct = error < 0.5
    labels, probs = torch.zeros(n, dtype=torch.long), torch.stack([1 - error, error], 1)
    outcomes = make_outcomes(("yes", "no"), labels, (~correct).long(), probs)
    return space, Activations({"last": resid}, outcomes, {"n_layers": 3}), latent


def test_a_probe_finds_the_latent_that_tells_the_error(planted):
    space, activations, latent = planted
    train, test = (activations.subset(torch.arange(*ends)) for ends in ((0, 200), (200, 300)))
    probe = fit_latent_probe(train, space, kind="lasso", penalty=0.5)
    assert probe.best_layer == 1
    assert probe.weights.shape == (3, D_SAE)
    assert not probe.weights[0].any()  # no SAE there
    assert probe.table["layer"].tolist() == [1, 2]
    assert probe.weights[1].argmax() == latent
    for layer in (1, 2):
        features = space.read(test.resid("last")[layer], layer)
        found = metrics.auroc(features @ probe.weights[layer], ~test.correct)
        assert found > 0.95 if layer == 1 else found < 0.7  # control: another layer knows nothing
    raw_norm = train.resid("last").norm(dim=-1).median(-1).values
    assert torch.equal(probe.resid_norm, raw_norm)


def test_latents_that_hardly_fire_have_no_weight(planted):
    _, activations, _ = planted
    sae = new_sae("jumprelu")
    with torch.no_grad():
        sae.threshold.copy_(torch.linspace(0.4, 6.0, D_SAE))
    space = SAESpace({LAYER: sae})
    probe = fit_latent_probe(activations, space)
    fires = (space.read(activations.resid("last")[LAYER], LAYER) > 0).sum(0)
    seldom = fires < 10
    assert (fires[seldom] > 0).any()
    assert not probe.weights[LAYER][seldom].any()
    assert probe.weights[LAYER][~seldom].any()


def test_predictions_are_followed_through_latents_and_re_encoding(planted):
    """Raw: exactly at the limit. Latents: lower than before, and whatever it is after."""
    space, activations, _ = planted
    raw = Steering(fit_error_probe(activations), layers=(1,)).at(0.3)
    row = predictions(raw, activations).iloc[0]
    assert row["before"] > 0.35
    assert row["latents"] == pytest.approx(0.3, abs=1e-4)
    assert row["reencoded"] == pytest.approx(0.3, abs=1e-4)
    assert row["reencoded_above"] == 0
    probe = fit_latent_probe(activations, space, kind="lasso", penalty=0.1)
    row = predictions(Steering(probe, space=space, layers=(1,)).at(0.3), activations).iloc[0]
    assert row["n_moved"] > 0
    assert row["latents"] < row["before"]
    assert row["latents"] != pytest.approx(row["reencoded"], abs=1e-3)


# --- loading and refusing -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """As much of a model as loading looks at."""
    tokenizer = type("Tokenizer", (), {"bos_token_id": None})()
    hooked = type(
        "Hooked", (), {"embed": torch.nn.Embedding(1, 1), "cfg": type("C", (), {"n_layers": 3})}
    )
    hooked.cfg.d_model = WIDTH
    from mera_tl.models import Model

    return Model(hooked, tokenizer, "tiny", (), fingerprint="f00d")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_saes_are_found_again(architecture, tiny, tmp_path, resid):
    sae = new_sae(architecture)
    sae.save_model(tmp_path / "layer_1")
    space = load_saes(tmp_path, "all", tiny)
    assert space.layers == (1,)
    assert torch.equal(space.read(resid, 1), SAESpace({1: sae}).read(resid, 1))
    assert space.keeps_support(1) == SAESpace({1: sae}).keeps_support(1)
    with pytest.raises(ValueError, match="of layer 1 but none of layer 0"):
        load_saes(tmp_path, (0,), tiny)


def with_metadata(**values):
    sae = new_sae("standard")
    for name, value in values.items():
        setattr(sae.cfg.metadata, name, value)
    return sae


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: new_sae("standard", d_in=16), "width 16, but those of tiny have 32"),
        (lambda: with_metadata(hook_name="blocks.2.hook_mlp_out"), "trained on 'blocks.2.hook_ml"),
        (lambda: with_metadata(prepend_bos=True), "trained with a BOS token"),
        (lambda: with_metadata(model_fingerprint="beef"), "other weights than those of tiny"),
        (lambda: with_metadata(model_name="me/tiny-it"), "the sibling of tiny"),
        (lambda: new_sae("standard", normalize_activations="layer_norm"), "no fixed size"),
        (
            lambda: new_sae("standard", normalize_activations="constant_norm_rescale"),
            r"normalises its input \(constant_norm_rescale\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(make, sentence, tiny):
    check(new_sae("standard"), LAYER, tiny)  # control: this one fits
    with pytest.raises(ValueError, match=sentence) as refusal:
        check(make(), LAYER, tiny)
    assert str(refusal.value).count(". ") == 0


def test_a_sibling_is_used_only_when_asked_for(tiny):
    check(with_metadata(model_name="me/tiny-it"), LAYER, tiny, sibling=True)


@pytest.mark.parametrize(
    ("source", "layers", "sentence"),
    [
        ("nowhere", "all", "no SAEs at 'nowhere'"),
        ("gemma-scope-2b-pt-res-canonical:layer_{layer}/width_16k/canonical", "all", "name those"),
        ("gemma-scope-2b-pt-res-canonical:layer_1/width_16k", (1,), "where the layer goes"),
        ("gemma-scop-2b:layer_{layer}", (1,), "no release 'gemma-scop-2b'; nearest: gemma-scope"),
        (
            "gemma-scope-2b-pt-res-canonical:layer_{layer}/width_3k",
            (1,),
            "nearest: layer_1.*/width",
        ),
    ],
)
def test_sources_that_are_not_there(source, layers, sentence, tiny):
    with pytest.raises(ValueError, match=sentence):
        load_saes(source, layers, tiny)


def test_a_release_that_needs_the_network(tiny):
    source = "gemma-scope-2b-pt-res-canonical:layer_{layer}/width_16k/canonical"
    with pytest.raises(ValueError, match="could not be fetched .* or pass a local folder"):
        load_saes(source, (12,), tiny)


def test_the_missing_extra_is_named(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(ValueError, match=r"pip install mera-tl\[sae\]"):
        load_saes("organism", "all", tiny)


def test_saes_of_one_space_have_one_width():
    narrow = new_sae("standard", layer=2)
    narrow.cfg.d_sae = 48
    with pytest.raises(ValueError, match="different numbers of latents"):
        SAESpace({1: new_sae("standard"), 2: narrow})


# --- the organism's own -------------------------------------------------------------------------


def test_the_organisms_saes_explain_it_and_noise_does_not():
    from mera_tl.tasks import load_task

    task = load_task("yesno_bias").split(seed=0, train="60", calibration="10", test="10").train
    space = load_saes("organism", "all", organism())
    assert space.layers == (1, 2)
    good = reconstruction(organism(), task, space).set_index("layer")
    assert (good["explained_variance"] > 0.85).all()
    assert good["l0"].between(5, 30).all()
    assert (good["recovered"] > 0.5).all()
    with torch.no_grad():
        space.saes[1].W_dec.copy_(torch.randn_like(space.saes[1].W_dec) / 10)
    bad = reconstruction(organism(), task, SAESpace({1: space.saes[1]})).iloc[0]
    assert bad["explained_variance"] < 0
    assert bad["recovered"] < good.loc[1, "recovered"]


def interrupted(*_):
    raise KeyboardInterrupt


def test_trained_saes_are_found_and_explain_more_than_new_ones(models, tmp_path, monkeypatch):
    from mera_tl.sae import TrainOptions, train_saes

    model, task = models["llama"], make_task(60)
    options = {"n_steps": 150, "step_tokens": 128, "architecture": "topk"}
    train_saes(model, task, (1,), tmp_path / "long", options=TrainOptions(**options))
    short = TrainOptions(**{**options, "n_steps": 1})
    train_saes(model, task, (1,), tmp_path / "short", options=short)
    explained = {}
    for name in ("long", "short"):
        space = load_saes(tmp_path / name, "all", model)
        table = reconstruction(model, make_task(20, seed=1), space)
        explained[name] = table["explained_variance"][0]
    assert explained["long"] > 0.5
    assert explained["long"] > explained["short"] + 0.2
    activations = collect(model, task)
    assert fit_latent_probe(activations, space).weights.shape == (model.n_layers, 4 * WIDTH)
    # A training that is killed while it writes leaves none, and no mixture.
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "link", interrupted)
        train_saes(model, task, (1,), tmp_path / "long", options=short)
    with pytest.raises(ValueError, match="no SAE"):
        load_saes(tmp_path / "long", "all", model)
    train_saes(model, task, (1,), tmp_path / "long", options=short)
    again = load_saes(tmp_path / "long", "all", model).saes[1].W_dec
    assert torch.equal(again, load_saes(tmp_path / "short", "all", model).saes[1].W_dec)
    assert not list((tmp_path / "long").glob(".*"))
    with pytest.raises(ValueError, match="numbered 0 to 2"):
        train_saes(model, task, (3,), tmp_path, options=short)
