"""The TransformerLens engine is the original model: same logits and stream, whatever its folder."""

from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, original, random_probe, talking_task

from mera_tl.inference import ReadSettings, collect, evaluate
from mera_tl.models import lay_out_for_decoding, layout, load_model, resid_post
from mera_tl.steering import Steering

TOKENS = torch.tensor([[1, 5, 9, 30, 22, 7, 41, 13, 8, 19, 33, 6]])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_logits_and_residual_stream_equal_hugging_face(family, models, checkpoints):
    hf, model = original(checkpoints[family]), models[family]
    layers = hf.transformer.h if family == "gpt2" else hf.model.layers
    streams = []
    for layer in layers:
        layer.register_forward_hook(
            lambda _, __, out: streams.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        wanted = hf(TOKENS).logits
        logits, cache = model.hooked.run_with_cache(
            TOKENS, attention_mask=torch.ones_like(TOKENS), names_filter=lambda n: "resid_post" in n
        )
    assert wanted.std() > 0.05  # the comparison is not between two constants
    assert (logits - wanted).abs().max() < 1e-4
    for layer, stream in enumerate(streams):
        assert (cache[resid_post(layer)] - stream).abs().max() < 1e-4


def test_gemma_uses_its_soft_cap_and_window(models, checkpoints):
    """Positive control: the features named in the test above do change the logits."""
    model, hf = models["gemma2"], original(checkpoints["gemma2"])
    with torch.no_grad():
        wanted = hf(TOKENS).logits
        for name, value in (("final_logit_softcapping", None), ("sliding_window", 64)):
            other = original(checkpoints["gemma2"])
            setattr(other.config, name, value)
            assert (other(TOKENS).logits - wanted).abs().max() > 1e-3, name
    assert model.hooked.cfg.window_size == 4 < TOKENS.shape[1]


def test_next_token_logits_are_the_last_row_of_the_full_logits(model):
    mask = torch.ones_like(TOKENS)
    with torch.no_grad():
        full = model.hooked(TOKENS, attention_mask=mask)[:, -1]
        assert (model.next_token_logits(TOKENS, mask) - full).abs().max() < 1e-5


def test_layout_keeps_logits_bit_equal_and_copies_no_weights(checkpoints):
    model = load_model(str(checkpoints["llama"]), device="cpu", engine="transformer_lens")
    mask = torch.ones_like(TOKENS)
    with torch.no_grad():
        laid_out = model.hooked(TOKENS, attention_mask=mask)
        assert model.hooked.unembed.W_U.T.is_contiguous()
        plain = model.hooked.unembed.W_U
        plain.data = plain.data.clone(memory_format=torch.contiguous_format)
        assert not model.hooked.unembed.W_U.T.is_contiguous()  # so the call above would copy
        for block in model.hooked.blocks:
            for weight in block.parameters():
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)
        assert torch.equal(model.hooked(TOKENS, attention_mask=mask), laid_out)
        lay_out_for_decoding(model.hooked)
        assert torch.equal(model.hooked(TOKENS, attention_mask=mask), laid_out)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_cache_of_turned_keys_keeps_logits_bit_equal(family, models):
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    model, turned = models[family], []
    prompts = torch.tensor([[0, 0, 3, 9, 4], [7, 5, 2, 8, 6]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    theirs = TransformerLensKeyValueCache.init_cache(model.hooked.cfg, model.device, 2)
    with torch.inference_mode():
        for cache in (ours := model.new_cache(2), theirs):
            steps = [model.next_token_logits(prompts, mask, cache)]
            for _ in range(3):
                tokens, one = steps[-1].argmax(-1, keepdim=True), torch.ones(2, 1, dtype=torch.long)
                steps.append(model.next_token_logits(tokens, one, cache))
            turned.append(torch.stack(steps))
    assert torch.equal(*turned)
    assert ours.entries[0].past_keys.shape == theirs.entries[0].past_keys.shape
    same = torch.equal(ours.entries[0].past_keys, theirs.entries[0].past_keys)
    assert same == (family == "gpt2")  # which has no rotary embedding: nothing to turn


# --- several devices, none at all ---------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_weights_has_every_shape_of_the_real_one(family, models, checkpoints):
    outline = load_model(str(checkpoints[family]), device="meta", engine="transformer_lens")
    shapes = [
        {name: (tuple(p.shape), p.dtype) for name, p in model.hooked.named_parameters()}
        for model in (outline, models[family])
    ]
    assert shapes[0] == shapes[1]
    assert all(p.is_meta for p in outline.hooked.parameters())
    assert outline.tokenize(["the film"]) == models[family].tokenize(["the film"])


@pytest.mark.parametrize("n", [0, 2])
def test_more_devices_than_there_are_is_one_sentence(n):
    with pytest.raises(ValueError, match=rf"n_devices={n}, but there is 1 .*pass n_devices=1"):
        load_model("organism", device="cpu", n_devices=n)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_lies_where_forward_passes_look_for_it(family, checkpoints, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    path = str(checkpoints[family])
    hooked = load_model(path, device="meta", engine="transformer_lens", n_devices=2).hooked
    assert hooked.cfg.n_devices == 2
    hooked.cfg.device = "cuda"  # of this test's own model, which has no weights to move
    parts = layout(hooked)
    of = {part: str(device) for part, device in parts}
    assert [of[block] for block in hooked.blocks] == ["cuda:0", "cuda:0", "cuda:1"]
    assert (of[hooked.embed], of[hooked.unembed], of[hooked.ln_final]) == (
        "cuda:0",
        "cuda:1",
        "cuda:1",
    )
    placed = {id(weight) for part, _ in parts for weight in part.parameters()}
    assert placed == {id(weight) for weight in hooked.parameters()}


# --- the original model as the engine -----------------------------------------------------------


@pytest.fixture(scope="module")
def originals(checkpoints):
    return {
        family: load_model(str(path), device="cpu", engine="hugging_face")
        for family, path in checkpoints.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_either_engine_gives_the_same_numbers(family, models, originals):
    model, original = models[family], originals[family]
    # A readout that decodes, so that there are generated tokens to steer.
    task, read = talking_task(model), ReadSettings(readout="exact_anywhere")
    ours, theirs = (collect(each, task, settings=read) for each in (model, original))
    for position, resid in ours.by_position.items():
        assert (theirs.by_position[position] - resid).abs().max() < 1e-4
    assert torch.equal(ours.outcomes.predictions, theirs.outcomes.predictions)
    steering = Steering(random_probe(model)).at(0.5)
    for positions in ("all", "last", "generated"):
        hooks = replace(steering, positions=positions).fwd_hooks()
        runs = [evaluate(each, task, hooks, settings=read) for each in (model, original)]
        assert (runs[0].probs - runs[1].probs).abs().max() < 1e-4
        assert torch.equal(runs[0].n_steered, runs[1].n_steered)
        moved = (runs[0].probs - ours.outcomes.probs).abs().max()
        assert runs[0].n_steered.sum() > 0 and moved > 1e-4  # positive control: steering shows


def test_the_original_has_one_hook_point_a_layer(originals):
    assert list(originals["llama"].hooked.hook_dict) == [resid_post(i) for i in range(3)]
