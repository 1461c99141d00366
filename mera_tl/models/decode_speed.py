"""A key-value cache whose keys are rotated once.

TransformerLens caches keys as they were before the rotary embedding and turns all of them again at
every token. A key's angle depends on how many tokens came before it, which never changes: so the
cache may hold turned keys, and a decode step turns one. Logits stay bit-equal.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class RotatedKeys:
    """One layer's cache, for TransformerLens in place of its own entry."""

    past_keys: Float[Tensor, "batch pos head d_head"]
    past_values: Float[Tensor, "batch pos head d_head"]

    def append(
        self,
        new_keys: Float[Tensor, "batch new head d_head"],
        new_values: Float[Tensor, "batch new head d_head"],
    ) -> tuple[Float[Tensor, "batch new head d_head"], Float[Tensor, "batch all head d_head"]]:
        """Return the new keys, marked as belonging here, and all values."""
        self.past_values = torch.cat([self.past_values, new_values], dim=1)
        new_keys = new_keys.view_as(new_keys)
        new_keys.belongs_to = self  # pyright: ignore[reportAttributeAccessIssue]
        return new_keys, self.past_values

    def extend(self, turned: Float[Tensor, "batch new head d_head"]) -> Tensor:
        """Return all keys, the new ones turned by now."""
        self.past_keys = torch.cat([self.past_keys, turned], dim=1)
        return self.past_keys


def rotate_once(attention: Any) -> None:
    """Let an attention layer turn only what its cache has not turned before."""
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
