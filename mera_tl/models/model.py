"""A model as the rooms above see it: token ids in, logits of the next token out, hooks on the way.

The tokenizer stays outside the network: every pass gets explicit ids and an attention mask, which
rules out double BOS tokens and padding on the wrong side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mera_tl.models.cache import KeyValueCache
from mera_tl.models.chat import Turn, encode_plain
from mera_tl.models.hooks import FwdHooks, resid_post
from mera_tl.models.hugging_face import HookedCausalLM
from mera_tl.models.partial import Part
from mera_tl.models.shared_prompt import can_share

Tokens = Int[Tensor, "batch pos"]
"""Token ids, or one for every token and zero for padding."""
Engine = Literal["transformer_lens", "hugging_face"]
"""What runs the forward passes; the hooks and, to rounding, the numbers are the same."""

_ELSEWHERE = {
    "generate": "mera_tl.generate(model, [prompt]) writes replies",
    "to_tokens": "model.tokenize([prompt]) gives lists of ids",
    "to_str_tokens": "model.tokenizer.decode(id) is the text of one",
    "to_string": "model.tokenizer.decode(ids) is their text",
    "forward": "model.hooked(tokens) gives logits, and mera_tl.evaluate(model, task) answers",
}
"""What people of TransformerLens or transformers call on a model, and how that is done here."""
_OF_HOOKED = ("run_with_cache", "run_with_hooks", "W_E", "W_U", "W_out", "W_in", "hook_dict")
"""What they look for that only the engine transformer_lens has."""

__all__ = ["Engine", "FwdHooks", "Model", "resid_post"]


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A network with hook points, and the tokenizer that stays outside it.

    `hooked` is a `HookedTransformer` under the engine transformer_lens, whose methods take token
    ids: `model.hooked.run_with_cache(torch.tensor(model.tokenize(["a prompt"])))`.
    """

    hooked: Any
    """A `HookedTransformer` or a `HookedCausalLM`, which are called alike."""
    tokenizer: Any
    name: str
    eos_ids: tuple[int, ...]
    """Tokens that end a reply."""
    chat: bool = False
    """Wrap every prompt in the tokenizer's chat template."""
    system: str | None = None
    """The system prompt; None leaves the template's own, if it has one."""
    fingerprint: str = field(default="", repr=False)
    """Hash of the configuration and of every byte of the weights."""

    if not TYPE_CHECKING:  # which is to go on refusing what is not there

        def __getattr__(self, name: str) -> Any:
            hooked, advice = vars(self).get("hooked"), _ELSEWHERE.get(name, "")
            if not advice and name[0] != "_" and name in dir(hooked):
                advice = f"model.hooked has, and takes token ids: model.hooked.{name}"
            elif not advice and name in _OF_HOOKED:
                advice = "a HookedTransformer has: load_model(..., engine='transformer_lens')"
            raise AttributeError(f"A Model has no {name!r}; {advice}.".replace("; .", "."))

    @property
    def engine(self) -> Engine:
        """What runs the forward passes."""
        return "hugging_face" if isinstance(self.hooked, HookedCausalLM) else "transformer_lens"

    def __repr__(self) -> str:
        return (
            f"Model({self.name}, {self.n_layers} layers, d_model {self.d_model}, "
            f"{self.device.type}{', chat' if self.chat else ''})"
        )

    def _repr_html_(self) -> str:
        return (
            f"<b>{escape(repr(self))}</b><br>residual stream at blocks.0.hook_resid_post to "
            f"blocks.{self.n_layers - 1}.hook_resid_post, context of {self.n_ctx} tokens"
        )

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.hooked.cfg.n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.hooked.cfg.d_model

    @property
    def d_vocab(self) -> int:
        """Number of tokens in the vocabulary."""
        return self.hooked.cfg.d_vocab

    @property
    def n_ctx(self) -> int:
        """Longest sequence of tokens the model accepts."""
        return self.hooked.cfg.n_ctx

    @property
    def device(self) -> torch.device:
        """Where the embedding lies, and so where tokens must go."""
        return next(self.hooked.embed.parameters()).device

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
            "eos_ids": list(self.eos_ids),
        }

    def tokenize(self, prompts: Sequence[str], *, prefix: str = "") -> list[list[int]]:
        """Return the ids of each prompt, with the special tokens its tokenizer asks for.

        With a chat template every prompt is the user's turn, in which control tokens are text, and
        `prefix` begins the assistant's turn ("Answer:"). Without one a prompt is taken as it is
        written, control tokens that are typed in it included, and `prefix` is appended to it.

        Raises:
            ValueError: if `prompts` is one text, or a prompt of it has no token or holds half a
                character.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r:.60} is no list of texts; pass one, as [prompt].")
        for number, prompt in enumerate(prompts):
            if not prompt.isascii() and prompt != prompt.encode(errors="replace").decode():
                raise ValueError(
                    f"Prompt {number}, {prompt!r:.60}, holds half a character; correct it."
                )
        if self.chat:
            turn = Turn.of(self.tokenizer, self.system)
            ids = turn.encode(self.tokenizer, prompts, prefix=prefix)
        else:
            ids = encode_plain(self.tokenizer, prompts, prefix=prefix)
        if [] in ids:  # what a model says to padding alone hangs on the engine
            raise ValueError(
                f"Prompt {ids.index([])} is empty: {self.name} makes no token of it; leave it out."
            )
        return ids

    def next_token_logits(
        self, tokens: Tokens, mask: Tokens, cache: Any = None, part: Part | None = None
    ) -> Float[Tensor, "batch some"]:
        """Run the model and unembed the last position only.

        Equal to the last row of the full logits, without ever holding "batch pos d_vocab". With a
        `cache` (see `new_cache`), `tokens` and `mask` are the new ones alone. With `part`, only
        that is run, by the engine hugging_face.

        Raises:
            ValueError: if a logit is not finite, naming the layer where that begins.
        """
        logits = self._last_logits(tokens, mask, cache, part)
        if not is_finite(logits):
            raise ValueError(self._where_not_finite(tokens, mask, cache))
        return logits.to(tokens.device)  # of several devices, the last has unembedded

    def _last_logits(
        self, tokens: Tokens, mask: Tokens, cache: Any, part: Part | None = None
    ) -> Float[Tensor, "batch some"]:
        hooked = self.hooked
        if isinstance(hooked, HookedCausalLM):
            logits = hooked(tokens, attention_mask=mask, past_kv_cache=cache, n_last=1, part=part)
            return logits[:, 0]
        stop = self.n_layers
        resid: Any = hooked(tokens, attention_mask=mask, past_kv_cache=cache, stop_at_layer=stop)
        return self.unembed(resid[:, -1])

    def unembed(
        self, resid: Float[Tensor, "batch d_model"], tokens: Sequence[int] | None = None
    ) -> Float[Tensor, "batch some"]:
        """Return the logits that a final residual stream gives; of the engine transformer_lens.

        Of all tokens, or of some alone: a vocabulary may cost as much as many layers.
        """
        from transformer_lens.utilities.activation_functions import apply_softcap

        stream, head = self.hooked.ln_final(resid[:, None]), self.hooked.unembed
        if tokens is None:
            logits = head(stream)
        else:
            logits = stream @ head.W_U[:, list(tokens)] + head.b_U[list(tokens)]
        return apply_softcap(logits, self.hooked.cfg.output_logits_soft_cap)[:, 0]

    @property
    def resumes(self) -> bool:
        """Whether a pass can start from the residual stream of some layer."""
        return not isinstance(self.hooked, HookedCausalLM) or self.hooked.resumes

    @property
    def shares_prompts(self) -> bool:
        """Whether many variants of a prompt's final token can attend to one copy of its cache."""
        return not isinstance(self.hooked, HookedCausalLM) and can_share(self.hooked.cfg)

    def allows_gaps(self, n_columns: int) -> bool:
        """Return whether padding may stand amid so many columns: none measures distance in them."""
        cfg, hooked = self.hooked.cfg, self.hooked
        if isinstance(hooked, HookedCausalLM):
            counted = hooked.takes_positions
        else:
            counted = cfg.positional_embedding_type in ("standard", "rotary")
        return counted and n_columns <= (getattr(cfg, "window_size", None) or n_columns)

    def resume(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        layer: int,
        mask: Int[Tensor, "batch all"] | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run the layers above `layer`, from what that one left; `mask` is of all columns.

        Of the engine transformer_lens; the other one takes a `Part`.
        """
        return self.hooked(
            resid,
            start_at_layer=layer + 1,
            stop_at_layer=self.n_layers,
            attention_mask=mask,
            past_kv_cache=cache,
        )

    def _where_not_finite(self, tokens: Tokens, mask: Tokens, cache: Any) -> str:
        """Run the same tokens again and say after which layer the stream is no longer finite."""
        bad: list[int] = []

        def look(resid: Tensor, hook: Any) -> None:
            if not torch.isfinite(resid[mask.bool().to(resid.device)]).all():
                bad.append(hook.layer())

        with self.hooked.hooks(fwd_hooks=[(resid_post(i), look) for i in range(self.n_layers)]):
            before = None if cache is None else cache.drop_last(tokens.shape[1])
            self._last_logits(tokens, mask, before)
        where = f"from layer {bad[0]} on" if bad else "from the unembedding on"
        return (
            f"{self.name} gives numbers that are not finite {where} (NaN or infinity, in "
            f"{self.manifest['dtype']}): check its weights, a steering that is too strong, or a "
            "dtype of too small a range."
        )

    def new_cache(self, n_rows: int) -> KeyValueCache:
        """Return an empty key-value cache for a batch of `n_rows`."""
        if isinstance(self.hooked, HookedCausalLM):
            empty = torch.empty((n_rows, 0), dtype=torch.int, device=self.device)
            return KeyValueCache([], empty)
        from mera_tl.models.families import empty_cache

        return empty_cache(self.hooked, n_rows)

    def stand_in_cache(self, mask: Tokens) -> KeyValueCache:
        """Return a cache of that shape which holds nothing, for attention that brings its own."""

        def nothing(past: Tensor) -> Tensor:
            return past.new_zeros(1, 1, 1, 1).expand(*mask.shape, *past.shape[2:])

        return self.new_cache(0).each(nothing, mask)


def is_finite(logits: Float[Tensor, "*any"]) -> bool:
    """Return whether there is neither a NaN nor an infinity."""
    # One anywhere makes the sum of the absolute values NaN or infinite.
    return logits.is_meta or bool(torch.isfinite(logits.abs().sum(dtype=torch.float32)))
