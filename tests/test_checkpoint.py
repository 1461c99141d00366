"""A checkpoint that is not whole, not plain or not safe is one sentence, and nothing is run."""

import json
import shutil
import sys

import pytest
import torch
from conftest import SHAPE, SHARED, save_random_checkpoint

from mera_tl import storage
from mera_tl.models import load_model, manifest_of


@pytest.fixture
def folder(checkpoints, tmp_path):
    return shutil.copytree(checkpoints["llama"], tmp_path / "copy")


def change(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def weights_of(folder):
    return storage.load_tensors(folder / "model.safetensors")


def save(folder, weights):
    storage.save_tensors(folder / "model.safetensors", weights, {"format": "pt"})


def refusal(folder, **arguments):
    with pytest.raises(ValueError) as caught:
        load_model(str(folder), device="cpu", engine="hugging_face", **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


NORM = "model.layers.1.input_layernorm.weight"


def test_weights_that_are_missing_unknown_or_misshapen_are_named(folder):
    weights = weights_of(folder)
    save(folder, {name: w for name, w in weights.items() if name != NORM})
    assert "lacks weights" in (said := refusal(folder)) and NORM in said
    save(folder, {**weights, "model.extra.weight": torch.ones(3)})
    assert "no place for: model.extra.weight" in refusal(folder)
    save(folder, {**weights, NORM: torch.ones(31)})
    assert f"{NORM} of shape (31,)" in (said := refusal(folder)) and "(32,)" in said
    save(folder, weights)
    load_model(str(folder), device="cpu", engine="hugging_face")


def test_a_renamed_tensor_is_named(folder):
    weights = weights_of(folder)
    save(folder, {name.replace("layernorm", "norm"): w for name, w in weights.items()})
    assert "and 2 more" in (said := refusal(folder)) and "input_layernorm" in said


def test_weights_that_are_not_finite_are_named(folder):
    weights = weights_of(folder)
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    save(folder, weights)
    assert "not finite (model.layers.2.mlp.up_proj.weight)" in refusal(folder)


def test_damaged_files_are_one_sentence(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "does not load" in refusal(folder)
    path.unlink()
    assert "holds no model.safetensors" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "part-1.safetensors"}}'
    )
    assert "lacks part-1.safetensors" in refusal(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "no tokenizer that transformers can read" in refusal(folder)


def test_pickled_and_quantised_weights_are_refused(folder):
    change(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert "quantised weights" in refusal(folder)
    change(folder, quantization_config=None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled weights (pytorch_model.bin)" in refusal(folder)


def test_code_in_a_checkpoint_is_never_run(folder):
    trace = folder / "ran"
    (folder / "modeling_own.py").write_text(f"open({str(trace)!r}, 'w').close()")
    own = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.OwnLM"}
    change(folder, auto_map=own)
    load_model(str(folder), device="cpu", engine="hugging_face")  # transformers' own Llama
    change(folder, auto_map=own, model_type="own", architectures=["OwnLM"])
    assert "brings its own code (modeling_own.py), which is not run" in refusal(folder)
    assert not trace.exists()


def test_what_is_no_causal_language_model_is_named(tmp_path, folder):
    with pytest.raises(ValueError, match=r"no config\.json and no \.gguf file"):
        load_model(str(tmp_path))
    change(folder, architectures=["BertModel"], model_type="bert")
    assert "BertModel" in refusal(folder)
    with pytest.raises(ValueError, match=r"no \.gguf file; pass the model's folder"):
        load_model(str(folder / "config.json"))


def test_an_adapter_is_not_taken_for_the_model_beside_it(folder):
    """transformers would load what the adapter names, and no hash would know of either."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    assert "holds an adapter" in refusal(folder)


# --- .gguf ------------------------------------------------------------------------------------


def write_gguf(path, folder):
    """Write the llama checkpoint as llama.cpp would, with the tokenizer's words."""
    gguf = pytest.importorskip("gguf")
    config, weights = json.loads((folder / "config.json").read_text()), weights_of(folder)
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(config["vocab_size"])
    words = ["w", "1", "w1", *(f"word{i}" for i in range(config["vocab_size"] - 3))]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(words)
    out.add_token_merges(["w 1"])
    out.add_token_types([1] * len(words))
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in weights.items():
        for part, n in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:  # llama.cpp interleaves the halves that rotary embeddings turn
                halves = weight.reshape(n, 2, -1, weight.shape[1])
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
        out.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def test_a_gguf_file_or_its_folder_loads(tmp_path, checkpoints):
    from transformers import AutoModelForCausalLM, LlamaConfig

    plain = save_random_checkpoint(LlamaConfig(**SHAPE), tmp_path / "plain")
    there = tmp_path / "gguf"
    there.mkdir()
    write_gguf(there / "tiny.gguf", plain)
    tokens = torch.tensor([[5, 6, 7, 8]])
    wanted = load_model(str(plain), device="cpu", engine="hugging_face")
    wanted = wanted.next_token_logits(tokens, torch.ones_like(tokens))
    for name in (there, there / "tiny.gguf"):
        model = load_model(str(name), device="cpu", engine="hugging_face")
        logits = model.next_token_logits(tokens, torch.ones_like(tokens))
        assert (logits - wanted).abs().max() < 1e-4
    for known in (True, False):  # whether it was looked at before it was changed
        loaded = AutoModelForCausalLM.from_pretrained(there, gguf_file="tiny.gguf")
        assert not known or manifest_of(loaded)["model_fingerprint"] == model.fingerprint
        loaded.model.layers[1].mlp.up_proj.weight.data[3] = 0
        assert "other than those" in manifest_of(loaded)["model_fingerprint"]
    shutil.copy(there / "tiny.gguf", there / "other.gguf")
    with pytest.raises(ValueError, match=r"several \.gguf files \(other.gguf, tiny.gguf\)"):
        load_model(str(there))


def test_without_the_package_a_gguf_file_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'mera-tl\[gguf\]'"):
        load_model(str(tmp_path))


@pytest.mark.skipif(not (SHARED / "models").exists(), reason="../shared/models is not there")
def test_real_checkpoints_are_not_refused():
    for name in ("sms-llama", "stories260K"):
        load_model(str(SHARED / "models" / name), device="cpu", engine="hugging_face")
