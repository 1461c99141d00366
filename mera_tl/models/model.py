"""Models as `HookedTransformer`: loading, tokens, one forward pass.

The only module that imports TransformerLens. Weights are never processed (no folded norms, no
centring), so `blocks.{layer}.hook_resid_post` is the residual stream of the original model. The
tokenizer stays outside the `HookedTransformer`: every pass gets explicit ids and an attention
mask, which rules out double BOS tokens and padding on the wrong side.
"""

import difflib
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mera_tl import storage
from mera_tl.models.chat import Turn, encode_plain
from mera_tl.models.decode_speed import RotatedKeys, rotate_once
from mera_tl.models.families import (
    lay_out_for_decoding,
    layout,
    load_embedded,
    load_folder,
    load_original,
    without_weights,
)
from mera_tl.models.shared_prompt import can_share
from mera_tl.organism import FOLDER as ORGANISM_FOLDER

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]
Engine = Literal["transformer_lens", "hugging_face"]
"""What runs the forward passes; the hooks and, to rounding, the numbers are the same."""
FwdHooks = Sequence[tuple[str, Any]]
"""TransformerLens hooks: pairs of a hook name and a function `(activation, hook) -> activation`."""

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
    system: str | None = None
    """The system prompt; None leaves the template's own, if it has one."""
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
            "system": self.system,
        }

    def tokenize(self, prompts: Sequence[str], *, prefix: str = "") -> list[list[int]]:
        """Return the ids of each prompt, with the special tokens its tokenizer asks for.

        With a chat template every prompt is the user's turn, in which control tokens are text, and
        `prefix` begins the assistant's turn ("Answer:"); otherwise it is appended to the prompt.
        """
        if self.chat:
            return Turn.of(self.tokenizer, self.system).encode(
                self.tokenizer, prompts, prefix=prefix
            )
        return encode_plain(self.tokenizer, prompts, prefix=prefix)

    def next_token_logits(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], cache: Any = None
    ) -> Float[Tensor, "batch d_vocab"]:
        """Run the model and unembed the last position only.

        Equal to the last row of the full logits, without ever holding "batch pos d_vocab". With a
        `cache` (see `new_cache`), `tokens` and `mask` are the new ones alone.
        """
        resid = self.hooked(
            tokens, attention_mask=mask, past_kv_cache=cache, stop_at_layer=self.n_layers
        )
        return self.unembed(resid[:, -1]).to(tokens.device)

    def unembed(self, resid: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_vocab"]:
        """Return the logits that a final residual stream gives, soft cap and all."""
        from transformer_lens.utilities.activation_functions import apply_softcap

        logits = self.hooked.unembed(self.hooked.ln_final(resid[:, None]))
        return apply_softcap(logits, self.hooked.cfg.output_logits_soft_cap)[:, 0]

    @property
    def resumes(self) -> bool:
        """Whether a pass can start from the residual stream of some layer."""
        return not hasattr(self.hooked, "original")

    @property
    def shares_prompts(self) -> bool:
        """Whether many variants of a prompt's final token can attend to one copy of its cache."""
        return self.resumes and can_share(self.hooked.cfg)

    def resume(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        layer: int,
        mask: Int[Tensor, "batch all"] | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run the layers above `layer`, from what that one left; `mask` is of all columns."""
        return self.hooked(
            resid,
            start_at_layer=layer + 1,
            stop_at_layer=self.n_layers,
            attention_mask=mask,
            past_kv_cache=cache,
        )

    def new_cache(self, n_rows: int) -> Any:
        """Return an empty key-value cache for a batch of `n_rows`."""
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(self.hooked.cfg, self.device, n_rows)
        if self.rotates_once:
            empty = [(entry.past_keys, entry.past_values) for entry in cache.entries]
            return replace(cache, entries=[RotatedKeys(*pair) for pair in empty])
        return cache

    @property
    def rotates_once(self) -> bool:
        """Whether a key's rotary angle never changes, so that the cache may hold turned keys."""
        cfg = self.hooked.cfg
        return cfg.positional_embedding_type == "rotary" and not cfg.use_dynamic_ntk_rope


def resid_post(layer: int) -> str:
    """Return the hook name of the residual stream after `layer`."""
    return f"blocks.{layer}.hook_resid_post"


# --- loading ----------------------------------------------------------------------------------


def load_model(
    name: str,
    *,
    dtype: Dtype = "float32",
    device: str | None = None,
    chat: bool | None = None,
    system: str | None = None,
    n_devices: int = 1,
    engine: Engine = "transformer_lens",
) -> Model:
    """Load a model, unprocessed, as `HookedTransformer`.

    `name` is "organism" (the embedded model), a local Hugging Face folder of one of the families
    in `checkpoints.FAMILIES` (read by its own config.json, never by its name, and without
    network), or any official name that TransformerLens knows. Its layers are spread over
    `n_devices` GPUs. Prompts go into the tokenizer's chat template where it has one; `chat=False`
    turns it off, `system` is the system prompt. On the device "meta" it has every shape and no
    weights. The `engine` "hugging_face" runs the original model, which decodes faster, with the
    hooks `resid_post` only.

    Raises:
        ValueError: if the name is unknown, the folder does not hold such a model, or there are
            fewer devices.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _require_devices(device, n_devices)
    where = {"dtype": _torch_dtype(dtype), "device": device, "n_devices": n_devices}
    eos_ids: tuple[int, ...] = ()
    with warnings.catch_warnings():
        # TransformerLens announces HookedTransformer's end in 4.0 at every construction.
        warnings.simplefilter("ignore", DeprecationWarning)
        if name == "organism" and engine == "hugging_face":
            raise ValueError("The organism is no Hugging Face checkpoint; leave engine out.")
        if name == "organism":
            hooked, source = load_embedded(ORGANISM_FOLDER, where), str(ORGANISM_FOLDER)
        elif engine == "hugging_face" and device != "meta":
            (hooked, eos_ids), source = load_original(name, where), name
        elif Path(name).exists():
            (hooked, eos_ids), source = load_folder(Path(name), where), name
        else:
            hooked, source = _load_official(name, where), name
    hooked.eval().requires_grad_(False)
    if engine == "transformer_lens":
        lay_out_for_decoding(hooked)
        for block in hooked.blocks:
            rotate_once(block.attn)
    tokenizer = _load_tokenizer(source)
    chat = _whether_to_chat(tokenizer, name, chat, system)
    if not eos_ids and tokenizer.eos_token_id is not None:
        eos_ids = (tokenizer.eos_token_id,)
    label = Path(name).resolve().name if Path(name).exists() and name != "organism" else name
    fingerprint = "" if device == "meta" else _fingerprint(hooked)
    return Model(hooked, tokenizer, label, eos_ids, chat, system, fingerprint)


def _whether_to_chat(tokenizer: Any, name: str, chat: bool | None, system: str | None) -> bool:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ValueError(f"The tokenizer of {name!r} has no chat template; leave chat off.")
    chat = has_template if chat is None else chat
    if system is not None and not chat:
        raise ValueError(f"A system prompt needs a chat template, which {name!r} does not use.")
    if chat:
        Turn.of(tokenizer, system)  # says at once what is wrong with the template
    return chat


def _require_devices(device: str, n_devices: int) -> None:
    there = torch.cuda.device_count() if device.startswith("cuda") else 1
    if not 1 <= n_devices <= there:
        raise ValueError(
            f"n_devices={n_devices}, but there {'is' if there == 1 else 'are'} {there} of the kind "
            f"{device!r}; pass n_devices={there}, or run where there are more GPUs."
        )


def model_names() -> list[str]:
    """Return every name that `load_model` knows, the embedded and the paper's models first."""
    from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES

    aliases = [alias for names in MODEL_ALIASES.values() for alias in names]
    return list(dict.fromkeys(["organism", *PAPER_MODELS, *OFFICIAL_MODEL_NAMES, *aliases]))


def _torch_dtype(dtype: str) -> torch.dtype:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            f"dtype {dtype!r} is not float32, bfloat16 or float16; choose one of them."
        )
    return getattr(torch, dtype)


def _load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        settings = Path(source) / "tokenizer_config.json"
        if settings.is_file():
            kind = storage.read_json(settings).get("tokenizer_class")
            if kind in ("PreTrainedTokenizerFast", "TokenizersBackend"):
                # AutoTokenizer would go by the model's family and rebuild another tokenizer.
                return PreTrainedTokenizerFast.from_pretrained(source)
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{source} has no tokenizer that transformers can read ({first}); "
            "put its tokenizer.json and tokenizer_config.json beside the weights."
        ) from None


def _load_official(name: str, where: Mapping[str, Any]) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config

    known = model_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ValueError(
            f"{name!r} is neither a folder nor a model that TransformerLens knows; "
            f"nearest names: {', '.join(near) or 'none'} (`mera models` lists all)."
        )
    try:
        if where["device"] == "meta":
            return without_weights(get_pretrained_model_config(name, **where))
        hooked = HookedTransformer.from_pretrained_no_processing(
            name, **where, default_prepend_bos=False
        )
    except OSError as error:
        raise ValueError(
            f"{name} could not be fetched ({str(error).splitlines()[0]}); "
            "connect to the hub once, or pass a local folder with its files."
        ) from None
    for part, device in layout(hooked):
        part.to(device)
    hooked.tokenizer = None
    return hooked


def _fingerprint(hooked: "HookedTransformer") -> str:
    """Hash the shape and a sample of up to 64 evenly spaced values of every weight."""
    sample = {}
    for name, weight in hooked.named_parameters():
        flat = weight.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        sample[name] = [list(weight.shape), [round(value, 6) for value in values.tolist()]]
    return storage.fingerprint(sample)
