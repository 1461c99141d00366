"""The key-value cache of both engines: a list of tensors that forwards replace and never write to.

So two caches may share tensors, which makes a fork free. In TransformerLens's engine the keys lie
here as the rotary embedding has turned them: it would cache them unturned and turn all of them
again at every token, though a key's angle depends on how many tokens came before it, which never
changes. A decode step then turns one key, and the logits stay bit-equal.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class LayerCache:
    """The keys and values of one layer; TransformerLens takes it in place of its own entry."""

    past_keys: Float[Tensor, "batch pos head d_head"]
    past_values: Float[Tensor, "batch pos head d_value"]
    is_turned: bool = False
    """Whether the keys are kept as the rotary embedding has turned them."""

    def append(
        self,
        new_keys: Float[Tensor, "batch new head d_head"],
        new_values: Float[Tensor, "batch new head d_value"],
    ) -> tuple[Float[Tensor, "batch some head d_head"], Float[Tensor, "batch all head d_value"]]:
        """Return all keys and all values; of keys still to be turned the new ones, marked."""
        self.past_values = torch.cat([self.past_values, new_values], dim=1)
        if not self.is_turned:
            return self.extend(new_keys), self.past_values
        new_keys = new_keys.view_as(new_keys)
        new_keys.belongs_to = self  # pyright: ignore[reportAttributeAccessIssue]
        return new_keys, self.past_values

    def extend(self, keys: Float[Tensor, "batch new head d_head"]) -> Tensor:
        """Return all keys, the given ones last."""
        self.past_keys = torch.cat([self.past_keys, keys], dim=1)
        return self.past_keys


@dataclass
class KeyValueCache:
    """What the layers have computed of the tokens so far, for a batch of rows."""

    entries: list[LayerCache]
    previous_attention_mask: Int[Tensor, "batch pos"]
    frozen: bool = False
    """TransformerLens looks at it; ours are never frozen."""

    def __getitem__(self, layer: int) -> LayerCache:
        return self.entries[layer]

    def append_attention_mask(self, mask: Int[Tensor, "batch new"]) -> Int[Tensor, "batch all"]:
        """Return the mask of all tokens, the new ones included from now on."""
        mask = mask.to(self.previous_attention_mask.device)
        self.previous_attention_mask = torch.cat([self.previous_attention_mask, mask], dim=-1)
        return self.previous_attention_mask

    def each(
        self, change: Callable[[Tensor], Tensor], mask: Int[Tensor, "batch pos"]
    ) -> "KeyValueCache":
        """Return a cache with another mask, whose keys and values have been changed alike."""
        entries = [
            replace(entry, past_keys=change(entry.past_keys), past_values=change(entry.past_values))
            for entry in self.entries
        ]
        return replace(self, entries=entries, previous_attention_mask=mask)

    def drop_last(self, n: int = 1) -> "KeyValueCache":
        """Return a cache that has not seen the last `n` tokens."""
        return self.each(lambda past: past[:, :-n], self.previous_attention_mask[:, :-n])


def rotate_once(attention: Any) -> None:
    """Let an attention layer of TransformerLens turn only what its cache has not turned before."""
    attention.apply_rotary = partial(_apply_rotary, attention.apply_rotary)


def _apply_rotary(
    rotate: Callable[..., Tensor],
    x: Float[Tensor, "batch pos head d_head"],
    past_kv_pos_offset: int = 0,
    attention_mask: Int[Tensor, "batch all"] | None = None,
) -> Tensor:
    cache = getattr(x, "belongs_to", None)
    if cache is None:  # queries, and keys without a cache or in one of TransformerLens
        return rotate(x, past_kv_pos_offset, attention_mask)
    return cache.extend(rotate(x, cache.past_keys.shape[1], attention_mask))
