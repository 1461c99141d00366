"""The check at load finds what an engine computes wrong, says where, and is paid once."""

import logging
import os
from contextlib import contextmanager

import pytest
import torch
from conftest import SHAPE, save_random_checkpoint
from test_hugging_face import BIASES, GEMMA

from mera_tl.models import cache_folder, load_model


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("check") / "biased"
    return str(save_random_checkpoint(LlamaConfig(**SHAPE, **BIASES), folder))


def test_a_silently_wrong_engine_is_refused_with_the_layer(biased):
    with pytest.raises(ValueError, match="differs from layer 0 on .*try engine='hugging_face'"):
        load_model(biased, device="cpu", engine="transformer_lens")
    wrong = load_model(biased, device="cpu", engine="transformer_lens", check=False)
    right = load_model(biased, device="cpu", engine="hugging_face")
    tokens = torch.tensor([[5, 6, 7]])
    logits = [m.next_token_logits(tokens, torch.ones_like(tokens)) for m in (wrong, right)]
    assert (logits[0] - logits[1]).abs().max() > 0.01  # the control: it is wrong indeed


def test_auto_says_which_engine_it_took_and_why(biased, checkpoints, caplog):
    with caplog.at_level(logging.INFO, logger="mera_tl"):
        load_model(biased, device="cpu")
        load_model(str(checkpoints["llama"]), device="cpu")
    assert "engine hugging_face" in caplog.text and "differs from layer 0" in caplog.text
    assert "runs on the engine transformer_lens" in caplog.text


def test_the_window_is_exceeded_where_that_is_cheap(tmp_path):
    """Break the window of one engine only: tokens beyond it must be among those compared."""
    from transformers import Gemma2Config

    from mera_tl.models import difference

    folder = save_random_checkpoint(Gemma2Config(**SHAPE, **GEMMA), tmp_path)
    right = load_model(str(folder), device="cpu", engine="hugging_face", check=False)
    model = load_model(str(folder), device="cpu", engine="transformer_lens", check=False)
    assert difference(model, right.hooked.original) == ""
    for block in model.hooked.blocks:
        block.attn.mask.fill_(True).tril_()
        block.attn.attn_type = "global"
    assert "differs from layer" in difference(model, right.hooked.original)


def test_hooks_that_do_nothing_or_stay_are_found(checkpoints, monkeypatch):
    from mera_tl.models import HookedCausalLM, HookPoint, difference

    def read_only(point, activation):
        for function in point.functions:
            function(activation, hook=point)
        return activation

    @contextmanager
    def forever(hooked, fwd_hooks):
        for name, function in fwd_hooks:
            hooked.hook_dict[name].functions.append(function)
        yield

    model = load_model(str(checkpoints["gpt2"]), device="cpu", engine="hugging_face")
    with monkeypatch.context() as patch:
        patch.setattr(HookPoint, "__call__", read_only)
        assert "hooks write does not reach" in difference(model, model.hooked.original)
    with monkeypatch.context() as patch:
        patch.setattr(HookedCausalLM, "hooks", forever)
        assert "hooks stay on" in difference(model, model.hooked.original)


def test_a_result_is_kept_and_paid_once(checkpoints, tmp_path, monkeypatch):
    from mera_tl.models import loading

    calls = []
    monkeypatch.setenv("MERA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "difference", lambda *_: calls.append(1) or "")
    for _ in range(2):
        load_model(str(checkpoints["llama"]), device="cpu", engine="hugging_face")
    assert len(calls) == 1 and cache_folder() == tmp_path / "cache"
    load_model(str(checkpoints["llama"]), device="cpu", engine="hugging_face", dtype="bfloat16")
    assert len(calls) == 2  # another dtype is another computation
    monkeypatch.setenv("MERA_CACHE", os.devnull + "/nowhere")  # cannot be written: nothing is kept
    load_model(str(checkpoints["llama"]), device="cpu", engine="hugging_face")
    assert len(calls) == 3


@pytest.mark.parametrize("engine", ["hugging_face", "transformer_lens"])
def test_numbers_that_are_not_finite_name_their_layer(checkpoints, engine):
    model = load_model(str(checkpoints["llama"]), device="cpu", engine=engine)
    tokens = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]])
    mask, memory = (tokens > 0).long(), model.new_cache(2)
    model.next_token_logits(tokens, mask, memory)

    def overflow(resid, hook):
        return resid * torch.inf

    hooks = [("blocks.1.hook_resid_post", overflow)]
    with (
        model.hooked.hooks(fwd_hooks=hooks),
        pytest.raises(ValueError, match="not finite from layer 1 on"),
    ):
        model.next_token_logits(tokens[:, -1:], mask[:, -1:], memory)
