"""The TransformerLens engine: a Hugging Face model's own weights in a `HookedTransformer`.

Every hook point of TransformerLens, for the families that it computes like Hugging Face. The config
is translated field by field (TransformerLens's own lookup goes by name, and would take a folder
called "llama" for an official model); weights are never processed, and most are not even copied:
they lie in memory as Hugging Face has them, which is how TransformerLens multiplies them.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mera_tl.models.cache import KeyValueCache, LayerCache, rotate_once
from mera_tl.models.hugging_face import shape_of

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

_CONVERTERS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma",
    "GPT2LMHeadModel": "gpt2",
}
"""Architectures, and TransformerLens's modules that rename their weights."""
FAMILIES = tuple(_CONVERTERS)
_SIZES = ("n_layers", "d_model", "d_vocab", "n_ctx", "n_heads", "d_head", "d_mlp", "dtype")
"""What both engines call alike."""


def why_not(architecture: str) -> str:
    """Return one sentence on why this engine cannot run an architecture, "" where it may."""
    if architecture not in (*FAMILIES, "HookedTransformer"):
        return (
            f"Architecture {architecture} is not supported by the TransformerLens engine "
            f"(supported: {', '.join(FAMILIES)}); try engine='hugging_face'."
        )
    try:
        major = int(version("transformer-lens").split(".")[0])
    except PackageNotFoundError:
        major = 0
    if major != 3:
        return (
            "The engine 'transformer_lens' needs transformer-lens 3 (4 has no HookedTransformer): "
            "pip install 'transformer-lens>=3.9,<4', or use engine='hugging_face'."
        )
    return ""


def build(original: Any, n_devices: int = 1) -> "HookedTransformer":
    """Put the weights of a Hugging Face model into a `HookedTransformer`.

    Raises:
        ValueError: if the engine does not know the architecture or one of its settings.
    """
    architecture = (original.config.architectures or [type(original).__name__])[0]
    if reason := why_not(architecture):
        raise ValueError(reason)
    from transformer_lens import HookedTransformer

    device = original.device
    cfg = _hooked_config(original, architecture, n_devices)
    with torch.device("meta" if device.type == "meta" else "cpu"):
        # Its own tensors are replaced before they are ever touched, so they take no memory.
        hooked = HookedTransformer(cfg, None, move_to_device=False)
        weights = _converter(architecture)(original, cfg)
    weights = {name: weight.detach().to(cfg.dtype) for name, weight in weights.items()}
    hooked.load_state_dict(weights, strict=False, assign=True)
    if device.type != "meta":
        for part, place in layout(hooked):
            part.to(place)
    lay_out_for_decoding(hooked)
    for block in hooked.blocks:
        rotate_once(block.attn)
    return hooked.eval().requires_grad_(False)


def empty_cache(hooked: "HookedTransformer", n_rows: int) -> KeyValueCache:
    """Return an empty key-value cache, whose keys are turned once where that is exact.

    Which takes a model that `build` made; another `HookedTransformer` turns them at every pass.
    """
    from transformer_lens.utilities.multi_gpu import get_device_for_block_index

    cfg = hooked.cfg
    turned = cfg.positional_embedding_type == "rotary" and not cfg.use_dynamic_ntk_rope
    turned = turned and isinstance(hooked.blocks[0].attn.apply_rotary, partial)
    device = hooked.W_E.device
    shape = (n_rows, 0, cfg.n_key_value_heads or cfg.n_heads, cfg.d_head)
    entries = []
    for layer in range(cfg.n_layers):
        place = get_device_for_block_index(layer, cfg, device)
        empty = torch.empty(shape, dtype=cfg.dtype, device=place)
        entries.append(LayerCache(empty, empty, turned))
    return KeyValueCache(entries, torch.empty((n_rows, 0), dtype=torch.int, device=device))


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


def _converter(architecture: str) -> Callable[[Any, Any], dict[str, Tensor]]:
    if architecture == "HookedTransformer":  # its weights bear TransformerLens's names already
        return lambda original, cfg: original.state_dict()  # noqa: ARG005
    name = _CONVERTERS[architecture]
    module = import_module(f"transformer_lens.pretrained.weight_conversions.{name}")
    return getattr(module, f"convert_{name}_weights")


def _hooked_config(original: Any, architecture: str, n_devices: int) -> Any:
    """Translate a Hugging Face config, field by field, into TransformerLens's."""
    from transformer_lens import HookedTransformerConfig

    hf = original.config
    shape = shape_of(original, hf.num_hidden_layers)
    fields = {name: getattr(shape, name) for name in _SIZES} | {"normalization_type": "RMS"}
    if architecture == "GPT2LMHeadModel":
        fields |= _gpt2_fields(hf)
    elif architecture == "HookedTransformer":
        fields |= {"eps": hf.eps, "act_fn": "relu", "positional_embedding_type": "standard"}
    else:
        fields |= _rotary_fields(hf, shape.d_head)
    if architecture == "Gemma2ForCausalLM":
        fields |= _gemma2_fields(hf)
    if architecture == "Qwen3ForCausalLM":
        fields |= {"use_qk_norm": True}
    return HookedTransformerConfig.from_dict(
        fields
        | {
            "original_architecture": architecture,
            "model_name": architecture,
            "init_weights": False,
            "default_prepend_bos": False,
            "device": str(original.device),
            "n_devices": n_devices,
        }
    )


def _gpt2_fields(hf: Any) -> dict[str, Any]:
    return {
        "d_mlp": hf.n_inner or 4 * hf.n_embd,
        "eps": hf.layer_norm_epsilon,
        "act_fn": hf.activation_function,
        "normalization_type": "LN",
        "use_attn_scale": hf.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": hf.scale_attn_by_inverse_layer_idx,
    }


def _rotary_fields(hf: Any, d_head: int) -> dict[str, Any]:
    """Fields of the RMS-norm, rotary, gated-MLP families: Llama, Mistral, Qwen2, Qwen3, Gemma2."""
    rope = dict(getattr(hf, "rope_parameters", None) or {})
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ("default", "llama3"):
        raise ValueError(
            f"This checkpoint scales its rotary positions by {rope_type!r}; only 'default' and "
            "'llama3' give TransformerLens logits equal to Hugging Face, so it is not loaded."
        )
    fields: dict[str, Any] = {
        # Grouped also where every head has its own keys: converters for one kind are enough.
        "n_key_value_heads": hf.num_key_value_heads,
        "eps": hf.rms_norm_eps,
        "act_fn": getattr(hf, "hidden_act", None) or hf.hidden_activation,
        "final_rms": True,
        "gated_mlp": True,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": d_head,
        "rotary_base": rope.get("rope_theta", getattr(hf, "rope_theta", 10000.0)),
    }
    if getattr(hf, "sliding_window", None):
        kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
        fields |= {
            "use_local_attn": True,
            "window_size": hf.sliding_window,
            "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in kinds],
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
    return {
        "act_fn": "gelu_pytorch_tanh",
        "use_normalization_before_and_after": True,
        "use_attn_scale": True,
        "attn_scale": hf.query_pre_attn_scalar**0.5,
        "attn_scores_soft_cap": hf.attn_logit_softcapping,
        "output_logits_soft_cap": hf.final_logit_softcapping,
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
