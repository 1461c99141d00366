"""What all prompts of a run begin with, run once: a system prompt, a template, worked examples.

Every prompt attends to the same keys and values there. That is exact as long as no hook moves those
tokens, which steering of the whole prompt does, and no sliding window cuts them off.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mera_tl.models.cache import KeyValueCache
from mera_tl.models.model import FwdHooks, Model

MIN_TOKENS = 8
"""A shorter beginning is not worth a pass of its own."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens and the cache that they leave."""

    tokens: tuple[int, ...]
    cache: KeyValueCache

    @staticmethod
    def of(model: Model, prompts: Sequence[Sequence[int]], n_after: int) -> "Prefix | None":
        """Run what the prompts share, without hooks; None where that is little, or not the same.

        `n_after` is how many tokens may follow a prompt.
        """
        # Each prompt keeps two tokens of its own: a pass of one is taken for a decoded token.
        shared = os.path.commonprefix([list(prompt)[:-2] for prompt in prompts])
        few = min(len(prompts), len(shared)) < MIN_TOKENS
        # The rest is padded behind what is shared, and so in the middle of a row.
        if few or not model.allows_gaps(max(map(len, prompts)) + n_after):
            return None
        tokens, cache = torch.tensor([shared], device=model.device), model.new_cache(1)
        with torch.no_grad():
            model.next_token_logits(tokens, torch.ones_like(tokens), cache)
        return Prefix(tuple(shared), cache)

    def for_rows(self, n_rows: int) -> KeyValueCache:
        """Return the cache of that many prompts; nothing is copied."""
        mask = self.cache.previous_attention_mask.expand(n_rows, -1)
        return self.cache.each(lambda past: past.expand(n_rows, -1, -1, -1), mask)


def moves_none_before_the_last(fwd_hooks: FwdHooks) -> bool:
    """Return whether all hooks are known to leave prompts alone up to their final token."""
    return all(getattr(hook, "positions", "all") != "all" for _, hook in fwd_hooks)
