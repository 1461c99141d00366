"""Checkpoints on disk as unprocessed `HookedTransformer`s.

A Hugging Face folder is read by its own config.json, field by field: TransformerLens's own lookup
goes by name and would take a folder called "llama" for an official model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mera_tl import storage

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel")
"""Architectures that load from a local Hugging Face folder."""


def load_embedded(folder: Path, where: Mapping[str, Any]) -> Any:
    """Load a folder that holds a `HookedTransformer` itself: its own config and weights."""
    from transformer_lens import HookedTransformerConfig

    settings = storage.read_json(folder / "config.json")
    cfg = HookedTransformerConfig.from_dict({**settings, **where})
    hooked = without_weights(cfg)
    if cfg.device != "meta":
        weights = storage.load_tensors(folder / "model.safetensors")
        _load_weights(hooked, {name: value.to(cfg.dtype) for name, value in weights.items()})
    return hooked


def load_folder(folder: Path, where: Mapping[str, Any]) -> tuple[Any, tuple[int, ...]]:
    """Load a local Hugging Face folder by its own config.json; return it with its end tokens.

    `where` are the fields dtype, device and n_devices of a `HookedTransformerConfig`.

    Raises:
        ValueError: if the folder holds no model of a known family.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json; pass the folder of a Hugging Face checkpoint "
            "(config.json, *.safetensors, tokenizer.json)."
        )
    config = storage.read_json(folder / "config.json")
    # Folders like the organism's hold a HookedTransformerConfig, which has this field instead.
    architecture = (config.get("architectures") or [config.get("original_architecture", "none")])[0]
    if architecture == "HookedTransformer":
        return load_embedded(folder, where), ()
    _require_family(folder, architecture)
    cfg = _config_of(folder, where)
    hooked = without_weights(cfg)
    if cfg.device == "meta":
        return hooked, ()
    original, eos_ids = _read(folder, cfg)
    _load_weights(hooked, _converters()[architecture](original, cfg))
    return hooked, eos_ids


def load_original(name: str, where: Mapping[str, Any]) -> tuple[Any, tuple[int, ...]]:
    """Load a checkpoint of a known family, a folder or an official name, to be run as it is.

    Raises:
        ValueError: if there is no such checkpoint, or several devices are asked for.
    """
    from mera_tl.models.hugging_face import Plain

    if where["n_devices"] > 1:
        raise ValueError(
            "The engine 'hugging_face' runs on one device; leave --engine out to use more."
        )
    cfg = _config_of(name, where)
    original, eos_ids = _read(name, cfg)
    return Plain(original.to(cfg.device), cfg), eos_ids


def _config_of(name: str | Path, where: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is no checkpoint ({str(error).splitlines()[0]}).") from None
    architecture = (config.architectures or ["model without a name"])[0]
    _require_family(name, architecture)
    return _hooked_config(config, where)


def _require_family(name: str | Path, architecture: str) -> None:
    if architecture not in FAMILIES:
        raise ValueError(f"{name} is a {architecture}; {', '.join(FAMILIES)} can be loaded.")


def _read(name: str | Path, cfg: Any) -> tuple[Any, tuple[int, ...]]:
    from transformers import AutoModelForCausalLM

    try:
        original = AutoModelForCausalLM.from_pretrained(name, dtype=cfg.dtype)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{name} does not load with transformers: {first}") from None
    eos = original.generation_config.eos_token_id
    return original, tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))


def without_weights(cfg: Any) -> Any:
    """Build the model of a configuration; on the device "meta" it has shapes and no memory."""
    from transformer_lens import HookedTransformer

    with torch.device("meta" if cfg.device == "meta" else "cpu"):
        return HookedTransformer(cfg, None, move_to_device=False)


def layout(hooked: "HookedTransformer") -> list[tuple[torch.nn.Module, torch.device]]:
    """Return on which device each part belongs, where forward passes look for it.

    TransformerLens 3.9 moves parts to whichever device has most memory left, but sends the
    residual stream of block i to the device of block i: with several devices the two disagree.
    """
    from transformer_lens.utilities.multi_gpu import get_device_for_block_index

    cfg = hooked.cfg
    devices = [get_device_for_block_index(i, cfg) for i in range(cfg.n_layers)]
    blocks = list(zip(hooked.blocks, devices, strict=True))
    first = [getattr(hooked, name) for name in ("embed", "pos_embed") if hasattr(hooked, name)]
    last = [hooked.ln_final, hooked.unembed]
    return [*((m, devices[0]) for m in first), *blocks, *((m, devices[-1]) for m in last)]


def _converters() -> dict[str, Any]:
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights
    from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
    from transformer_lens.pretrained.weight_conversions.qwen2 import convert_qwen2_weights

    return {
        "LlamaForCausalLM": convert_llama_weights,
        "Qwen2ForCausalLM": convert_qwen2_weights,
        "Gemma2ForCausalLM": convert_gemma_weights,
        "GPT2LMHeadModel": convert_gpt2_weights,
    }


def _load_weights(hooked: "HookedTransformer", weights: dict[str, Tensor]) -> None:
    hooked.load_and_process_state_dict(
        weights,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    )
    for part, device in layout(hooked):
        part.to(device)


def _hooked_config(hf: Any, where: Mapping[str, Any]) -> Any:
    """Translate a Hugging Face config, field by field, into TransformerLens's."""
    from transformer_lens import HookedTransformerConfig

    architecture = hf.architectures[0]
    fields = _gpt2_fields(hf) if architecture == "GPT2LMHeadModel" else _rotary_fields(hf)
    if architecture == "Gemma2ForCausalLM":
        fields |= _gemma2_fields(hf)
    return HookedTransformerConfig.from_dict(
        fields
        | {
            "d_vocab": hf.vocab_size,
            "original_architecture": architecture,
            "model_name": architecture,
            "init_weights": False,
            "default_prepend_bos": False,
            **where,
        }
    )


def _gpt2_fields(hf: Any) -> dict[str, Any]:
    return {
        "d_model": hf.n_embd,
        "n_layers": hf.n_layer,
        "n_heads": hf.n_head,
        "d_head": hf.n_embd // hf.n_head,
        "d_mlp": hf.n_inner or 4 * hf.n_embd,
        "n_ctx": hf.n_positions,
        "eps": hf.layer_norm_epsilon,
        "act_fn": hf.activation_function,
        "normalization_type": "LN",
        "use_attn_scale": hf.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": hf.scale_attn_by_inverse_layer_idx,
    }


def _rotary_fields(hf: Any) -> dict[str, Any]:
    """Fields of the RMS-norm, rotary, gated-MLP families: Llama, Qwen2, Gemma2."""
    rope = dict(getattr(hf, "rope_parameters", None) or {})
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ("default", "llama3"):
        raise ValueError(
            f"This checkpoint scales its rotary positions by {rope_type!r}; only 'default' and "
            "'llama3' give TransformerLens logits equal to Hugging Face, so it is not loaded."
        )
    d_head = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    grouped = hf.num_key_value_heads != hf.num_attention_heads
    fields = {
        "d_model": hf.hidden_size,
        "n_layers": hf.num_hidden_layers,
        "n_heads": hf.num_attention_heads,
        "n_key_value_heads": hf.num_key_value_heads if grouped else None,
        "d_head": d_head,
        "d_mlp": hf.intermediate_size,
        "n_ctx": hf.max_position_embeddings,
        "eps": hf.rms_norm_eps,
        "act_fn": getattr(hf, "hidden_act", None) or hf.hidden_activation,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": d_head,
        "rotary_base": rope.get("rope_theta", getattr(hf, "rope_theta", 10000.0)),
    }
    if rope_type == "llama3":
        fields |= {
            "use_NTK_by_parts_rope": True,
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_by_parts_factor": rope["factor"],
        }
    return fields


def _gemma2_fields(hf: Any) -> dict[str, Any]:
    local = {"sliding_attention": "local", "full_attention": "global"}
    return {
        "act_fn": "gelu_pytorch_tanh",
        "use_normalization_before_and_after": True,
        "use_attn_scale": True,
        "attn_scale": hf.query_pre_attn_scalar**0.5,
        "attn_scores_soft_cap": hf.attn_logit_softcapping,
        "output_logits_soft_cap": hf.final_logit_softcapping,
        "use_local_attn": True,
        "window_size": hf.sliding_window,
        "attn_types": [local[kind] for kind in hf.layer_types],
    }


@torch.no_grad()
def lay_out_for_decoding(hooked: "HookedTransformer") -> None:
    """Store weights transposed in memory, values and shapes unchanged.

    TransformerLens transposes its weights in every forward pass; on tensors that already lie that
    way this is a view, so a decode step copies no weights. Logits stay bit-equal.
    """

    def transpose(weight: Any) -> Tensor:
        return weight.transpose(-1, -2).contiguous().transpose(-1, -2)

    for block in hooked.blocks:
        attention = block.attn
        for name, weight in attention.named_parameters(recurse=False):
            if name.lstrip("_") in ("W_Q", "W_K", "W_V"):
                weight.data = transpose(weight.data)
            if name == "W_O":  # flattened to "d_model (head d_head)" by TransformerLens
                weight.data = weight.data.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        if hooked.cfg.gated_mlp:  # the plain MLP multiplies by its weights as they are stored
            for weight in (block.mlp.W_in, block.mlp.W_gate, block.mlp.W_out):
                weight.data = transpose(weight.data)
    hooked.unembed.W_U.data = transpose(hooked.unembed.W_U.data)
