"""From a name to a model: folders, hub names, embedded ones; engines, dtypes, errors."""

import json
import os
import shutil

import pytest
import torch
from conftest import SHARED, original, python

from mera_tl.models import load_model

TOKENS = torch.tensor([[1, 5, 9, 30, 22, 7, 41, 13, 8, 19, 33, 6]])


@pytest.mark.parametrize("engine", ["transformer_lens", "hugging_face"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_an_argument(checkpoints, dtype, engine):
    model = load_model(str(checkpoints["qwen2"]), dtype=dtype, device="cpu", engine=engine)
    logits = model.next_token_logits(TOKENS, torch.ones_like(TOKENS))
    assert logits.dtype == getattr(torch, dtype)
    assert model.manifest["dtype"] == dtype
    with torch.no_grad():
        wanted = original(checkpoints["qwen2"])(TOKENS).logits[:, -1]
    assert (logits.float() - wanted).norm() / wanted.norm() < 0.1


def test_a_hub_name_loads_from_the_hubs_cache_without_network(tmp_path, checkpoints):
    """A Qwen2.5-3B snapshot (of tiny size) in the cache: by its name and revision, offline."""
    snapshot = tmp_path / "hub/models--Qwen--Qwen2.5-3B/snapshots/0123"
    shutil.copytree(checkpoints["qwen2"], snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    (refs / "v2").write_text("0123")
    script = (
        "import torch, json; from mera_tl.models import load_model, describe_models;"
        "m = load_model('Qwen/Qwen2.5-3B', device='cpu', revision='v2', engine='hugging_face');"
        f"t = torch.tensor({TOKENS.tolist()});"
        "print(describe_models('Qwen2.5-3B')[0]['offline']);"
        "print(json.dumps(m.next_token_logits(t, torch.ones_like(t)).tolist()))"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)
    offline, printed = python(script, env=env).stdout.splitlines()[-2:]
    assert offline == "True"
    with torch.no_grad():
        wanted = original(checkpoints["qwen2"])(TOKENS).logits[:, -1]
    assert (torch.tensor(json.loads(printed)) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("google/gemma-2-2", "google/gemma-2-2b"),
        ("no/such-model", "neither a folder nor a model"),
        ("organsm", "organism"),
        ("google/gemma-2-2b", "connect to the hub once"),
    ],
)
def test_unknown_name_is_one_sentence_with_the_nearest(name, words):
    with pytest.raises(ValueError, match=words):
        load_model(name)


def test_chat_and_system_prompt_need_a_template(checkpoints):
    path = str(checkpoints["llama"])
    with pytest.raises(ValueError, match="no chat template"):
        load_model(path, device="cpu", chat=True)
    with pytest.raises(ValueError, match="system prompt needs a chat template"):
        load_model(path, device="cpu", system="Be brief.")
    assert load_model(path, device="cpu", engine="hugging_face").chat is False


@pytest.mark.skipif(not (SHARED / "models").exists(), reason="../shared/models is not there")
def test_real_folders_equal_hugging_face():
    for name in ("sms-llama", "stories260K"):
        path = SHARED / "models" / name
        model = load_model(str(path), device="cpu")
        with torch.no_grad():
            wanted = original(path)(TOKENS).logits[:, -1]
        logits = model.next_token_logits(TOKENS, torch.ones_like(TOKENS))
        assert (logits - wanted).abs().max() < 1e-4
