"""A Hugging Face model as it is, with TransformerLens's hooks at `blocks.{layer}.hook_resid_post`.

For speed: attention stays Hugging Face's own (sdpa), and decoding does not rotate the cached keys
again at every token. Hooks, caches and tokens go in and come out as with `HookedTransformer`, so
steering is the same functions and the same numbers; there are no hook points but these.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.utilities.activation_functions import apply_softcap
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class _Block(torch.nn.Module):
    """Where TransformerLens looks for a block's hook point."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_resid_post = HookPoint()


class Plain(HookedRootModule):
    """What `mera_tl` uses of a `HookedTransformer`, done by the original model."""

    def __init__(self, original: Any, cfg: Any) -> None:
        super().__init__()
        body = original.base_model
        self.cfg, self.original = cfg, original
        self.blocks = torch.nn.ModuleList(_Block() for _ in range(cfg.n_layers))
        self.embed, self.unembed = original.get_input_embeddings(), original.get_output_embeddings()
        self.ln_final = body.ln_f if hasattr(body, "ln_f") else body.norm
        self._wanted, self._resid = 0, torch.empty(0)
        for number, layer in enumerate(body.h if hasattr(body, "h") else body.layers):
            layer.register_forward_hook(self._through(number))
        self.setup()

    def _through(self, number: int) -> Any:
        block: Any = self.blocks[number]
        point: HookPoint = block.hook_resid_post

        def through(module: Any, args: Any, output: Any) -> Any:  # noqa: ARG001
            resid = point(output[0] if isinstance(output, tuple) else output)
            if number == self._wanted:
                self._resid = resid
            return (resid, *output[1:]) if isinstance(output, tuple) else resid

        return through

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:  # noqa: N802  TransformerLens's name
        """The embedding."""
        return self.embed.weight

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"],
        past_kv_cache: TransformerLensKeyValueCache | None = None,
        stop_at_layer: int | None = None,
    ) -> Float[Tensor, "batch pos d"]:
        """Return the residual stream before `stop_at_layer`, or the logits of all positions."""
        mask = attention_mask
        if past_kv_cache is not None:
            mask = past_kv_cache.append_attention_mask(attention_mask)
        self._wanted = (self.cfg.n_layers if stop_at_layer is None else stop_at_layer) - 1
        past = None if past_kv_cache is None else _as_hugging_face(past_kv_cache)
        self.original.base_model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :],
            past_key_values=past,
            use_cache=past is not None,
        )
        if past is not None and past_kv_cache is not None:
            layers: list[Any] = past.layers
            for entry, layer in zip(past_kv_cache.entries, layers, strict=True):
                entry.past_keys = layer.keys.transpose(1, 2)
                entry.past_values = layer.values.transpose(1, 2)
        resid, self._resid = self._resid, torch.empty(0)
        if stop_at_layer is not None:
            return resid
        logits = self.unembed(self.ln_final(resid))
        return apply_softcap(logits, self.cfg.output_logits_soft_cap)


def _as_hugging_face(cache: TransformerLensKeyValueCache) -> DynamicCache:
    """Hold the same tensors, heads before positions; nothing is copied."""
    past = DynamicCache()
    for entry in cache.entries:
        if entry.past_keys.shape[1]:
            layer = DynamicLayer()
            layer.lazy_initialization(entry.past_keys, entry.past_values)
            layer.keys = entry.past_keys.transpose(1, 2)
            layer.values = entry.past_values.transpose(1, 2)
            past.layers.append(layer)
    return past
