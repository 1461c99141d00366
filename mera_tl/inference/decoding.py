"""Tokens through a model under hooks: a left-padded prompt once, then token by token on its cache.

Before every pass the columns of that pass are described to the hooks through TransformerLens's own
per-hook store, `hook.ctx["window"]`: which columns are padding and how many belong to the prompt.
A hook thus knows where it is, with or without a cache, in a batch or alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mera_tl.models.model import FwdHooks, Model


@dataclass(frozen=True, eq=False)
class Window:
    """The columns of one forward pass."""

    real: Bool[Tensor, "batch pos"]
    """False where a column is padding."""
    n_prompt: int
    """How many of the columns, counted from the left, belong to the prompt."""
    answers: Int[Tensor, " batch"] | None = None
    """The option each row is about to answer unsteered, once that is known."""


@contextmanager
def hooked_pass(model: Model, fwd_hooks: FwdHooks) -> Iterator[None]:
    """Put hooks on for the length of a `with` block; they are gone afterwards, also on exceptions.

    Raises:
        ValueError: if a hook names no hook point of the model, and so would never fire.
    """
    points = model.hooked.hook_dict
    for name, _ in fwd_hooks:
        if name not in points:
            raise ValueError(
                f"Hook {name!r} matches no hook point of {model.name}, which has layers 0 to "
                f"{model.n_layers - 1}; steering hooks are named blocks.{{layer}}.hook_resid_post."
            )
    try:
        with model.hooked.hooks(fwd_hooks=list(fwd_hooks)):
            yield
    finally:
        for name, _ in fwd_hooks:
            points[name].ctx.clear()


class Decoding:
    """A batch of prompts on its way through a model. Use inside `hooked_pass`.

    `rows` are the batch rows still on their way. Of what steering hooks did, per batch row:
    `n_steered` and `n_steerable` count the (layer, token) pairs that they moved or could have
    moved, `n_tokens` the tokens and `n_layers` the layers among those moved; `shift` sums up
    |shift| / |h| over the moved pairs; `peak` is the highest score that they saw.
    """

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], fwd_hooks: FwdHooks) -> None:
        self.model = model
        self._points = [model.hooked.hook_dict[name] for name in dict(fwd_hooks)]
        self._tokens, self._mask = left_pad(prompts, model.device)
        self._cache = model.new_cache(len(prompts))
        self._eos = torch.tensor(model.eos_ids, dtype=torch.long, device=model.device)
        self._start()

    def _start(self) -> None:
        self._answers: Int[Tensor, " batch"] | None = None
        self.rows = torch.arange(len(self._tokens), device=self._tokens.device)
        self.n_steered = torch.zeros_like(self.rows)
        self.n_steerable = torch.zeros_like(self.rows)
        self.n_tokens = torch.zeros_like(self.rows)
        self._moved = torch.zeros(len(self.rows), len(self._points)).bool().to(self.rows.device)
        self.shift = torch.zeros(self.rows.shape, device=self.rows.device)
        self.peak = torch.full(self.rows.shape, -torch.inf, device=self.rows.device)

    @property
    def n_layers(self) -> Int[Tensor, " batch"]:
        """How many layers moved a token of each row."""
        return self._moved.sum(-1)

    def prompt(self) -> Float[Tensor, "batch d_vocab"]:
        """Run the prompts; return the logits at their final tokens."""
        return self._forward(self._tokens, self._mask, n_prompt=self._tokens.shape[1])

    def last_token_again(self, answers: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_vocab"]:
        """Run the final prompt token once more on the same cache, the unsteered answers known."""
        for entry in self._cache.entries:
            entry.past_keys = entry.past_keys[:, :-1]
            entry.past_values = entry.past_values[:, :-1]
        self._cache.previous_attention_mask = self._cache.previous_attention_mask[:, :-1]
        self._answers = answers
        return self._forward(self._tokens[:, -1:], self._mask[:, -1:], n_prompt=1)

    def prompt_again(self, answers: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_vocab"]:
        """Run the prompts once more from their start, the unsteered answers known."""
        self._cache = self.model.new_cache(len(self._tokens))
        self._answers = answers
        return self._forward(self._tokens, self._mask, n_prompt=self._tokens.shape[1])

    def fork(self, rows: Int[Tensor, " kept"], fwd_hooks: FwdHooks) -> "Decoding":
        """Return some rows of this batch, to be run on under other hooks; this one stays as it is.

        Forwards replace the tensors of a cache and never write into them, so the two may share.
        """
        other = copy(self)
        other._points = [self.model.hooked.hook_dict[name] for name in dict(fwd_hooks)]
        other._tokens, other._mask = self._tokens[rows], self._mask[rows]
        other._cache = replace(self._cache, entries=[copy(entry) for entry in self._cache.entries])
        other._start()
        if len(rows) < len(self._tokens) or not torch.equal(rows, self.rows):
            other._select(rows)
        return other

    def next(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_vocab"]:
        """Feed one token to every remaining row; return the logits that follow it."""
        columns = tokens[:, None]
        return self._forward(columns, torch.ones_like(columns), n_prompt=0)

    def keep(self, rows: Bool[Tensor, " batch"]) -> None:
        """Go on with some of the remaining rows only."""
        if rows.all():
            return
        self._select(rows)
        self._answers = None if self._answers is None else self._answers[rows]
        self.rows = self.rows[rows]

    def _select(self, rows: Tensor) -> None:
        """Keep some rows of the cache, by number or by truth value."""
        for entry in self._cache.entries:
            here = rows.to(entry.past_keys.device)
            entry.past_keys = entry.past_keys[here]
            entry.past_values = entry.past_values[here]
        self._cache.previous_attention_mask = self._cache.previous_attention_mask[rows]

    def is_end(self, tokens: Int[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        """Return where a token ends the reply."""
        return torch.isin(tokens, self._eos)

    def _forward(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], n_prompt: int
    ) -> Float[Tensor, "batch d_vocab"]:
        window = Window(mask.bool(), n_prompt, self._answers)
        for point in self._points:
            point.ctx["window"] = window
        logits = self.model.next_token_logits(tokens, mask, self._cache)
        self._count(mask)
        return logits

    def _count(self, mask: Int[Tensor, "batch pos"]) -> None:
        """Add up what steering hooks left of the pass that they have just seen."""
        here, rows = self.rows.device, self.rows
        moved = torch.zeros(mask.shape, dtype=torch.bool, device=here)
        for layer, point in enumerate(self._points):
            if "moved" in (left := point.ctx):
                by_layer = left.pop("moved").to(here)
                moved |= by_layer
                self._moved[rows, layer] |= by_layer.any(-1)
                self.n_steered[rows] += by_layer.sum(-1)
                self.n_steerable[rows] += left.pop("steerable").to(here)
                self.shift[rows] += left.pop("shift").to(here)
                self.peak[rows] = self.peak[rows].maximum(left.pop("peak").to(here))
        self.n_tokens[rows] += moved.sum(-1)


def left_pad(
    prompts: Sequence[Sequence[int]], device: torch.device | str
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Stack prompts of unequal length, padded on the left; return tokens and attention mask."""
    # At least two columns: without a window a hook takes a pass of one column for a decode step.
    width = max(2, *(len(prompt) for prompt in prompts))
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return tokens.to(device), mask.to(device)
