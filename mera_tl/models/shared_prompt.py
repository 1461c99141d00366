"""Many variants of the final prompt token over one copy of the prompt's keys and values.

A search tries hundreds of shifts of the same final token. As rows of an ordinary batch each would
bring a copy of its prompt's cache, and copying that takes longer than running the token. Here the
rows go through norms, projections and MLP as one flat batch, and in attention they take seats
beside their prompt, whose keys and values are read in place.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

KeysAndValues = tuple[Tensor, Tensor]


def can_share(cfg: Any) -> bool:
    """Return whether attention is what `_attend` computes: a softmax of scaled products alone."""
    extras = ("use_dynamic_ntk_rope", "use_attention_sinks", "use_logn_attn", "load_in_4bit")
    extras += ("use_attn_result", "use_attn_in", "use_split_qkv_input", "clip_qkv")
    olmo = str(getattr(cfg, "original_architecture", "")).startswith("Olmo")
    plain = cfg.positional_embedding_type in ("standard", "rotary")
    return plain and not olmo and not any(getattr(cfg, name, None) for name in extras)


@dataclass(frozen=True, eq=False)
class Seats:
    """Which prompt each row is a variant of, and its place among the variants of that prompt."""

    prompt: Int[Tensor, " row"]
    seat: Int[Tensor, " row"]
    n_seats: int
    mask: Int[Tensor, "prompt pos"]
    """Of the whole prompts, the final column included."""

    @staticmethod
    def of(prompt: Int[Tensor, " row"], mask: Int[Tensor, "prompt pos"]) -> "Seats":
        """Seat rows beside the prompts they belong to; only prompts that have rows are kept."""
        kept, place = prompt.unique(return_inverse=True)
        order = place.argsort(stable=True)
        count = place.bincount(minlength=len(kept))
        first = count.cumsum(0) - count
        seat = torch.empty_like(order)
        seat[order] = torch.arange(len(order), device=order.device) - first[place[order]]
        n_seats = int(count.max()) if len(count) else 0  # a readout may ask for no row at all
        return Seats(place, seat, n_seats, mask[kept])


@dataclass(eq=False)
class SharedKeys:
    """One layer's keys and values: of prompts without their final column, and of the rows."""

    keys: Float[Tensor, "prompt pos kv_head d_head"]
    """Turned already where they are rotary."""
    values: Float[Tensor, "prompt pos kv_head d_head"]
    seats: Seats
    own: KeysAndValues | None = None
    """"row column kv_head d_head" of the columns that each row has run by itself."""

    def append(self, new_keys: Tensor, new_values: Tensor, n_own: int) -> KeysAndValues:
        """Add a column of every row as number `n_own`; return all of the rows' own.

        A column that is run again, to see where it went wrong, takes its own place.
        """
        new = (new_keys, new_values)
        if self.own is not None:
            pairs = zip(self.own, new, strict=True)
            new = tuple(torch.cat([old[:, : n_own - 1], column], dim=1) for old, column in pairs)
        self.own = (new[0], new[1])
        return self.own


@contextmanager
def sharing(blocks: Iterable[Any], entries: Sequence[SharedKeys]) -> Iterator[None]:
    """Let some blocks attend to shared keys, for the length of a `with` block."""
    attentions = [block.attn for block in blocks]
    try:
        for attention, entry in zip(attentions, entries, strict=True):
            attention.forward = partial(_attend, attention, entry)
        yield
    finally:
        for attention in attentions:
            attention.__dict__.pop("forward", None)


def _attend(
    attention: Any,
    entry: SharedKeys,
    query_input: Float[Tensor, "row 1 d_model"],
    attention_mask: Int[Tensor, "row all"],
    **_: Any,
) -> Float[Tensor, "row 1 d_model"]:
    """Attend from every row to its prompt and to itself; as TransformerLens's own forward."""
    from transformer_lens.utilities.activation_functions import apply_softcap

    cfg, seats, n_past = attention.cfg, entry.seats, entry.keys.shape[1]
    q, k, v = attention.calculate_qkv_matrices(query_input, query_input, query_input)
    if cfg.positional_embedding_type == "rotary":
        before = attention_mask.shape[1] - 1
        q, k = (attention.apply_rotary(x, before, attention_mask) for x in (q, k))
    keys, values = entry.append(k, v, attention_mask.shape[1] - n_past)
    q = rearrange(q, "row 1 (kv group) d -> row kv group d", kv=k.shape[2])
    # Rows take their seats for what they share, and stand alone for what they do not.
    grid = q.new_zeros(len(seats.mask), seats.n_seats, *q.shape[1:])
    grid[seats.prompt, seats.seat] = q
    past = einsum(
        grid, entry.keys, "prompt seat kv group d, prompt pos kv d -> prompt seat kv group pos"
    )[seats.prompt, seats.seat]
    own = einsum(q, keys, "row kv group d, row pos kv d -> row kv group pos")
    scores = torch.cat([past, own], dim=-1) / attention.attn_scale
    scores = apply_softcap(scores, cfg.attn_scores_soft_cap)
    scores = scores.masked_fill(~_visible(attention, attention_mask)[:, None, None], -torch.inf)
    pattern = scores.softmax(-1)
    grid = pattern.new_zeros(len(seats.mask), seats.n_seats, *pattern.shape[1:-1], n_past)
    grid[seats.prompt, seats.seat] = pattern[..., :n_past]
    z = einsum(
        grid, entry.values, "prompt seat kv group pos, prompt pos kv d -> prompt seat kv group d"
    )[seats.prompt, seats.seat]
    z = z + einsum(
        pattern[..., n_past:], values, "row kv group pos, row pos kv d -> row kv group d"
    )
    out = rearrange(attention.W_O, "head d_head d_model -> d_model (head d_head)")
    z = rearrange(z, "row kv group d -> row 1 (kv group d)")
    return torch.nn.functional.linear(z, out, attention.b_O)


def _visible(attention: Any, mask: Int[Tensor, "row all"]) -> Bool[Tensor, "row all"]:
    """Return which columns the newest sees: no padding, and in local layers a window."""
    visible, width = mask.bool(), mask.shape[1]
    if attention.attn_type == "local":
        near = torch.arange(width, device=visible.device) > width - 1 - attention.cfg.window_size
        visible = visible & near
    return visible
