"""A fingerprint covers every byte of the weights and what the config computes, and nothing else."""

import os
import shutil

import torch
from conftest import change_one_bit

from mera_tl import storage
from mera_tl.models import cache_folder, load_model


def fingerprint(folder):
    return load_model(str(folder), device="cpu", engine="hugging_face", check=False).fingerprint


def test_one_neuron_or_one_setting_is_another_model(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "copy")
    assert fingerprint(folder) == fingerprint(checkpoints["llama"])
    weights = storage.load_tensors(folder / "model.safetensors")
    ablated = {name: weight.clone() for name, weight in weights.items()}
    ablated["model.layers.1.mlp.down_proj.weight"][:, 7] = 0
    storage.save_tensors(folder / "model.safetensors", ablated, {"format": "pt"})
    assert fingerprint(folder) != fingerprint(checkpoints["llama"])
    shutil.copy(checkpoints["llama"] / "model.safetensors", folder)
    assert fingerprint(folder) == fingerprint(checkpoints["llama"])
    config = storage.read_json(folder / "config.json")
    storage.write_json(folder / "config.json", {**config, "rms_norm_eps": 1e-3})
    assert fingerprint(folder) != fingerprint(checkpoints["llama"])


def test_engines_and_dtypes_share_it(checkpoints):
    path = str(checkpoints["qwen2"])
    found = {
        load_model(path, device="cpu", engine="transformer_lens").fingerprint,
        load_model(path, device="cpu", engine="hugging_face", dtype="bfloat16").fingerprint,
    }
    assert len(found) == 1 and all(len(each) == 16 for each in found)


def test_a_hash_is_kept_until_the_file_changes(checkpoints, tmp_path, monkeypatch):
    from mera_tl.models import fingerprints

    read, hash_ = [], fingerprints._hash
    monkeypatch.setenv("MERA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "_hash", lambda path: read.append(path) or hash_(path))
    folder = shutil.copytree(checkpoints["gpt2"], tmp_path / "copy")
    assert fingerprint(folder) == fingerprint(folder)
    assert len(read) == 1 and list((cache_folder() / "hashes").iterdir())
    os.utime(folder / "model.safetensors", (1, 1))
    first = fingerprint(folder)
    assert len(read) == 2
    change_one_bit(folder / "model.safetensors")
    os.utime(folder / "model.safetensors", (1, 1))  # as a copy that keeps times
    assert fingerprint(folder) != first


def test_a_check_on_one_device_says_nothing_of_several(checkpoints, monkeypatch):
    from mera_tl.models import loading

    model = load_model(str(checkpoints["llama"]), device="cpu", engine="transformer_lens")
    monkeypatch.setattr(loading, "difference", lambda *_: "looked")
    assert loading._checked(model, None) == ""  # it was checked when it was loaded
    model.hooked.cfg.n_devices = 2
    assert loading._checked(model, None) == "looked"


def test_dtype_auto_is_the_checkpoints_own(checkpoints, tmp_path):
    from transformers import AutoModelForCausalLM

    half = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.bfloat16)
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "half")
    half.save_pretrained(folder)
    for engine in ("hugging_face", "transformer_lens"):
        model = load_model(str(folder), device="cpu", dtype="auto", engine=engine)
        assert model.manifest["dtype"] == "bfloat16"
        tokens = torch.tensor([[5, 6, 7]])
        logits = model.next_token_logits(tokens, torch.ones_like(tokens))
        with torch.no_grad():
            wanted = half(tokens).logits[:, -1]
        assert (logits - wanted).float().norm() < 0.05 * wanted.float().norm()
