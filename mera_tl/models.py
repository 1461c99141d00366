"""Models as `HookedTransformer`: loading, tokens, one forward pass.

The only module that imports TransformerLens. Weights are never processed (no folded norms, no
centring), so `blocks.{layer}.hook_resid_post` is the residual stream of the original model. The
tokenizer stays outside the `HookedTransformer`: every pass gets explicit ids and an attention
mask, which rules out double BOS tokens and padding on the wrong side.
"""

import difflib
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mera_tl import store
from mera_tl.organism import FOLDER as ORGANISM_FOLDER

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]
FwdHooks = Sequence[tuple[str, Any]]
"""TransformerLens hooks: pairs of a hook name and a function `(activation, hook) -> activation`."""

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel")
"""Architectures that load from a local Hugging Face folder."""

PAPER_MODELS = (
    "google/gemma-2-2b",
    "google/gemma-2-2b-it",
    "Qwen/Qwen2.5-3B",
    "Qwen/Qwen2.5-3B-Instruct",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-1B-Instruct",
)


@dataclass(frozen=True, eq=False)
class Model:
    """A `HookedTransformer` with the tokenizer that stays outside it."""

    hooked: "HookedTransformer"
    tokenizer: Any
    name: str
    eos_ids: tuple[int, ...]
    """Tokens that end a reply."""
    chat: bool = False
    """Wrap every prompt in the tokenizer's chat template."""
    fingerprint: str = field(default="", repr=False)
    """Hash of the configuration and of a sample of every weight."""

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.hooked.cfg.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.hooked.cfg.d_model

    @property
    def n_ctx(self) -> int:
        """Longest sequence of tokens the model accepts."""
        return self.hooked.cfg.n_ctx

    @property
    def device(self) -> torch.device:
        """Where the embedding lies, and so where tokens must go."""
        return self.hooked.W_E.device

    @property
    def manifest(self) -> dict[str, Any]:
        """What identifies this model in records and saved probes."""
        return {
            "model": self.name,
            "model_fingerprint": self.fingerprint,
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "dtype": str(self.hooked.cfg.dtype).removeprefix("torch."),
            "chat": self.chat,
        }

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each prompt, with the special tokens its tokenizer asks for."""
        if not self.chat:
            return self.tokenizer(list(prompts))["input_ids"]
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        # The template has written the special tokens already.
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def next_token_logits(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], cache: Any = None
    ) -> Float[Tensor, "batch d_vocab"]:
        """Run the model and unembed the last position only.

        Equal to the last row of the full logits, without ever holding "batch pos d_vocab". With a
        `cache` (see `new_cache`), `tokens` and `mask` are the new ones alone.
        """
        from transformer_lens.utilities.activation_functions import apply_softcap

        hooked = self.hooked
        resid = hooked(
            tokens, attention_mask=mask, past_kv_cache=cache, stop_at_layer=hooked.cfg.n_layers
        )
        logits = hooked.unembed(hooked.ln_final(resid[:, -1:]))
        return apply_softcap(logits, hooked.cfg.output_logits_soft_cap)[:, 0]

    def new_cache(self, n_rows: int) -> Any:
        """Return an empty key-value cache for a batch of `n_rows`."""
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.hooked.cfg, self.device, n_rows)


def resid_post(layer: int) -> str:
    """Return the hook name of the residual stream after `layer`."""
    return f"blocks.{layer}.hook_resid_post"


# --- loading ----------------------------------------------------------------------------------


def load_model(
    name: str, *, dtype: Dtype = "float32", device: str | None = None, chat: bool = False
) -> Model:
    """Load a model, unprocessed, as `HookedTransformer`.

    `name` is "organism" (the embedded model), a local Hugging Face folder of one of the families
    in `FAMILIES` (read by its own config.json, never by its name, and without network), or any
    official name that TransformerLens knows.

    Raises:
        ValueError: if the name is unknown or the folder does not hold such a model.
    """
    torch_dtype = _torch_dtype(dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with warnings.catch_warnings():
        # TransformerLens announces HookedTransformer's end in 4.0 at every construction.
        warnings.simplefilter("ignore", DeprecationWarning)
        if name == "organism":
            hooked, eos_ids = _load_organism(ORGANISM_FOLDER, torch_dtype, device)
            source = str(ORGANISM_FOLDER)
        elif Path(name).exists():
            hooked, eos_ids = _load_folder(Path(name), torch_dtype, device)
            source = name
        else:
            hooked, eos_ids = _load_official(name, torch_dtype, device)
            source = name
    hooked.eval().requires_grad_(False)
    _lay_out_for_decoding(hooked)
    tokenizer = _load_tokenizer(source)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"The tokenizer of {name!r} has no chat template; leave chat off.")
    if not eos_ids and tokenizer.eos_token_id is not None:
        eos_ids = (tokenizer.eos_token_id,)
    label = Path(name).resolve().name if Path(name).exists() and name != "organism" else name
    return Model(hooked, tokenizer, label, eos_ids, chat, _fingerprint(hooked))


def _torch_dtype(dtype: str) -> torch.dtype:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            f"dtype {dtype!r} is not float32, bfloat16 or float16; choose one of them."
        )
    return getattr(torch, dtype)


def _load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{source} has no tokenizer that transformers can read ({first}); "
            "put its tokenizer.json and tokenizer_config.json beside the weights."
        ) from None


def _load_official(name: str, dtype: torch.dtype, device: str) -> tuple[Any, tuple[int, ...]]:
    from transformer_lens import HookedTransformer
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    known = [
        *OFFICIAL_MODEL_NAMES,
        *(alias for aliases in MODEL_ALIASES.values() for alias in aliases),
    ]
    if name not in known:
        near = difflib.get_close_matches(name, [*known, "organism"], n=3, cutoff=0.4)
        raise ValueError(
            f"{name!r} is neither a folder nor a model that TransformerLens knows; "
            f"nearest names: {', '.join(near) or 'none'} (`mera models` lists all)."
        )
    try:
        hooked = HookedTransformer.from_pretrained_no_processing(
            name, dtype=dtype, device=device, default_prepend_bos=False
        )
    except OSError as error:
        raise ValueError(
            f"{name} could not be fetched ({str(error).splitlines()[0]}); "
            "connect to the hub once, or pass a local folder with its files."
        ) from None
    hooked.tokenizer = None
    return hooked, ()


def _load_organism(folder: Path, dtype: torch.dtype, device: str) -> tuple[Any, tuple[int, ...]]:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    settings = store.read_json(folder / "config.json")
    cfg = HookedTransformerConfig.from_dict({**settings, "dtype": dtype, "device": device})
    hooked = HookedTransformer(cfg, None, move_to_device=False)
    weights = store.load_tensors(folder / "model.safetensors")
    _load_weights(hooked, {name: value.to(dtype) for name, value in weights.items()})
    return hooked, ()


def _load_folder(folder: Path, dtype: torch.dtype, device: str) -> tuple[Any, tuple[int, ...]]:
    from transformer_lens import HookedTransformer
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json; pass the folder of a Hugging Face checkpoint "
            "(config.json, *.safetensors, tokenizer.json)."
        )
    architecture = (store.read_json(folder / "config.json").get("architectures") or ["none"])[0]
    if architecture == "HookedTransformer":
        return _load_organism(folder, dtype, device)
    if architecture not in FAMILIES:
        raise ValueError(
            f"{folder} is a {architecture}; local folders of {', '.join(FAMILIES)} can be loaded."
        )
    try:
        original = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{folder} does not load with transformers: {first}") from None
    cfg = _hooked_config(original.config, dtype, device)
    hooked = HookedTransformer(cfg, None, move_to_device=False)
    _load_weights(hooked, _converters()[architecture](original, cfg))
    eos = original.generation_config.eos_token_id
    eos_ids = tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))
    return hooked, eos_ids


def _converters() -> dict[str, Any]:
    from transformer_lens.pretrained import weight_conversions as convert

    return {
        "LlamaForCausalLM": convert.convert_llama_weights,
        "Qwen2ForCausalLM": convert.convert_qwen2_weights,
        "Gemma2ForCausalLM": convert.convert_gemma_weights,
        "GPT2LMHeadModel": convert.convert_gpt2_weights,
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
    hooked.move_model_modules_to_device()


def _hooked_config(hf: Any, dtype: torch.dtype, device: str) -> Any:
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
            "dtype": dtype,
            "device": device,
            "default_prepend_bos": False,
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
def _lay_out_for_decoding(hooked: "HookedTransformer") -> None:
    """Store weights transposed in memory, values and shapes unchanged.

    TransformerLens transposes its weights in every forward pass; on tensors that already lie that
    way this is a view, so a decode step copies no weights. Logits stay bit-equal.
    """

    def transpose(weight: Tensor) -> Tensor:
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


def _fingerprint(hooked: "HookedTransformer") -> str:
    """Hash the shape and a sample of up to 64 evenly spaced values of every weight."""
    sample = {}
    for name, weight in hooked.named_parameters():
        flat = weight.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        sample[name] = [list(weight.shape), [round(value, 6) for value in values.tolist()]]
    return store.fingerprint(sample)
