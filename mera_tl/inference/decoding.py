"""Tokens through a model under hooks: a left-padded prompt once, then token by token on its cache.

Before every pass the columns of that pass are described to the hooks through TransformerLens's own
per-hook store, `hook.ctx["window"]`: which columns are padding and how many belong to the prompt.
A hook thus knows where it is, with or without a cache, in a batch or alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mera_tl.inference.prefix import Prefix
from mera_tl.models.model import FwdHooks, Model, is_finite, resid_post
from mera_tl.models.partial import Part
from mera_tl.models.shared_prompt import KeysAndValues, Seats, SharedKeys, sharing


@dataclass(frozen=True, eq=False)
class Window:
    """The columns of one forward pass."""

    real: Bool[Tensor, "batch pos"]
    """False where a column is padding."""
    n_prompt: int
    """How many of the columns, counted from the left, belong to the prompt; more than there are
    where the prompt goes on in the next pass."""
    answers: Int[Tensor, " batch"] | None = None
    """The option each row is about to answer unsteered, once that is known."""
    labels: Int[Tensor, " batch"] | None = None
    """A number of the caller's for each row, which stays with it as rows come and go."""
    ends: Int[Tensor, " batch"] | None = None
    """`n_prompt` row by row, where prompts are padded on the right."""
    n_before: int = 0
    """How many generated tokens came in passes before this one."""
    scores: bool = False
    """Whether the columns are options that are scored, not a prompt or a reply."""


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
    moved, each hook for itself where a layer has several; `n_tokens` counts the tokens and
    `n_layers` the layers among those moved; `shift` sums up |shift| / |h| over the moved pairs;
    `max_score` is the highest score that they saw.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        fwd_hooks: FwdHooks,
        labels: Int[Tensor, " batch"] | None = None,
        prefix: Prefix | None = None,
    ) -> None:
        self.model = model
        self._points = [model.hooked.hook_dict[name] for name in dict(fwd_hooks)]
        known = () if prefix is None else prefix.tokens
        self._tokens, self._mask = left_pad([p[len(known) :] for p in prompts], model.device)
        self._cache = model.new_cache(len(prompts))
        if prefix is not None:
            self._cache = prefix.for_rows(len(prompts))
            shared = torch.tensor(known, device=model.device).expand(len(prompts), -1)
            self._tokens = torch.cat([shared, self._tokens], dim=1)
            self._mask = torch.cat([torch.ones_like(shared), self._mask], dim=1)
        self._eos = torch.tensor(model.eos_ids, dtype=torch.long, device=model.device)
        self._answers: Int[Tensor, " batch"] | None = None
        self._labels = labels
        self._scores = False
        self._n_before = 0
        # Rows of the cache are picked when they are next needed: many never are.
        self._picked: Int[Tensor, " batch"] | None = None
        self._own: dict[int, KeysAndValues] = {}
        self._beside = False
        self._start()

    def _start(self) -> None:
        self.rows = torch.arange(len(self._tokens), device=self._tokens.device)
        self.n_steered = torch.zeros_like(self.rows)
        self.n_steerable = torch.zeros_like(self.rows)
        self.n_tokens = torch.zeros_like(self.rows)
        self._moved = torch.zeros(len(self.rows), len(self._points)).bool().to(self.rows.device)
        self.shift = torch.zeros(self.rows.shape, device=self.rows.device)
        self.max_score = torch.full(self.rows.shape, -torch.inf, device=self.rows.device)

    @property
    def n_layers(self) -> Int[Tensor, " batch"]:
        """How many layers moved a token of each row."""
        return self._moved.sum(-1)

    def prompt(self) -> Float[Tensor, "batch d_vocab"]:
        """Run the prompts, less a prefix that was run; return the logits at their final tokens."""
        tokens, mask = (x[:, self.n_columns :] for x in (self._tokens, self._mask))
        return self._forward(tokens, mask, n_prompt=tokens.shape[1])

    def beginning(self) -> Prefix:
        """Return what a single prompt begins with, all but two tokens; the prompt has just run.

        Two are left to be run: a pass of one token is taken for a decoded one.
        """
        return Prefix(tuple(self._tokens[0, :-2].tolist()), self._cache.drop_last(2))

    def prompt_again(
        self, answers: Int[Tensor, " batch"], *, whole: bool = True
    ) -> Float[Tensor, "batch d_vocab"]:
        """Run the prompts, or their final token alone, once more, the unsteered answers known."""
        self._answers = answers
        return self._again(self._tokens.shape[1] if whole else 1)

    def _again(self, n_columns: int, part: Part | None = None) -> Float[Tensor, "batch some"]:
        """Run the last columns of the prompts once more, on the cache of what comes before."""
        self._settle()
        before, self._cache = self._cache, self._cache.drop_last(n_columns)
        tokens, mask = self._tokens[:, -n_columns:], self._mask[:, -n_columns:]
        logits = self._forward(tokens, mask, n_prompt=n_columns, part=part)
        if part is not None and part.after is not None:
            n_known = part.after + 1  # layers that were not run again keep what they knew
            self._cache.entries[:n_known] = before.entries[:n_known]
        return logits

    def resume(
        self,
        layer: int,
        resid: Float[Tensor, "batch pos d_model"],
        tokens: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch some"]:
        """Run the last columns of the prompts again, from the residual stream after `layer` on.

        `resid` is what the first run of the prompts left there. Hooks of that layer fire first; of
        lower layers none may act, which are not run again. Where the model can unembed `tokens`
        alone, the logits are of these.
        """
        n_columns = resid.shape[1]
        if self.model.engine == "hugging_face":
            known = Part(layer, resid, tokens) if self.model.resumes else Part(tokens=tokens)
            return self._again(n_columns, known)
        mask = self._mask[:, -n_columns:]
        self._describe(mask, n_columns)
        resid = self.model.hooked.hook_dict[resid_post(layer)](resid)
        if self._beside:
            whole = self._mask
            resid = self._beside_the_prompt(layer, lambda: self.model.resume(resid, layer, whole))
        else:
            resid = self._below_the_prompt(layer, resid)
        self._count(mask)
        logits = self.model.unembed(resid[:, -1], tokens).to(self.rows.device)
        if not is_finite(logits):  # a pass of all layers refuses that, and says where it begins
            logits = self._again(n_columns)
            return logits if tokens is None else logits[:, list(tokens)]
        return logits

    def _beside_the_prompt(self, layer: int, run: Callable[[], Tensor]) -> Tensor:
        """Run the layers above `layer` with attention to one copy of each prompt's cache."""
        rows = self.rows if self._picked is None else self._picked
        mask, prompts = self._cache.previous_attention_mask, rows.unique()
        seats = Seats.of(rows, mask)
        # Picking rows copies them; where all are needed they are read where they lie.
        some = slice(None) if len(prompts) == len(mask) else prompts
        layers = range(layer + 1, self.model.n_layers)
        entries = []
        for number in layers:
            entry = self._cache.entries[number]
            keys, values = entry.past_keys[some, :-1], entry.past_values[some, :-1]
            entries.append(SharedKeys(keys, values, seats, self._own.get(number)))
        with sharing(self.model.hooked.blocks[layer + 1 :], entries):
            resid = run()
        self._own |= {n: e.own for n, e in zip(layers, entries, strict=True) if e.own is not None}
        return resid

    def _below_the_prompt(self, layer: int, resid: Tensor) -> Tensor:
        n_columns, cache = resid.shape[1], self.model.new_cache(len(resid))
        rows = self.rows if self._picked is None else self._picked
        for new, old in zip(cache.entries, self._cache.entries, strict=True):
            new.past_keys = old.past_keys[:, :-n_columns][rows]
            new.past_values = old.past_values[:, :-n_columns][rows]
        resid = self.model.resume(resid, layer, self._mask, cache)
        self._own = {
            number: (entry.past_keys[:, -n_columns:], entry.past_values[:, -n_columns:])
            for number, entry in enumerate(cache.entries)
            if number > layer
        }
        return resid

    def fork(
        self,
        rows: Int[Tensor, " kept"],
        fwd_hooks: FwdHooks,
        *,
        answers: Int[Tensor, " kept"] | None = None,
        labels: Int[Tensor, " kept"] | None = None,
        beside: bool = False,
    ) -> "Decoding":
        """Return some rows of this batch, each as often as named, to be run on under other hooks.

        This one stays as it is: forwards replace the tensors of a cache and never write into them,
        so the two may share. Answers and labels are those of this batch unless given. `beside` lets
        the rows attend to one copy of each prompt's cache, where the model can, which pays where
        prompts are named often; no prompt token but the final one may then be run again.
        """
        other = copy(self)
        other._points = [self.model.hooked.hook_dict[name] for name in dict(fwd_hooks)]
        other._tokens, other._mask = self._tokens[rows], self._mask[rows]
        other._select(rows)
        other._answers = other._answers if answers is None else answers
        other._labels = other._labels if labels is None else labels
        other._beside = self._beside or (beside and self.model.shares_prompts)
        other._start()
        return other

    def branch(self, rows: Int[Tensor, " kept"]) -> "Decoding":
        """Return remaining rows, each as often as named, to try several tokens after them.

        This one stays as it is. What hooks do in a branch counts for the row that it comes from.
        Branches attend to one copy of their row's cache, where the model can.
        """
        if self.model.shares_prompts and not self._beside:
            self._settle()
        other = copy(self)
        other._beside = self._beside or self.model.shares_prompts
        other._select(rows)
        other.rows, other._scores = self.rows[rows], True
        return other

    @property
    def n_columns(self) -> int:
        """How many columns the cache holds."""
        return self._cache.previous_attention_mask.shape[1]

    @property
    def n_bytes(self) -> int:
        """What the cache takes in memory."""
        return sum(e.past_keys.nbytes + e.past_values.nbytes for e in self._cache.entries)

    def next(self, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_vocab"]:
        """Feed one token to every remaining row; return the logits that follow it."""
        columns = tokens[:, None]
        if self._beside:
            logits = self._next_beside(columns)
        else:
            logits = self._forward(columns, torch.ones_like(columns), n_prompt=0)
        self._n_before += 1
        return logits

    def _next_beside(self, columns: Int[Tensor, "batch 1"]) -> Float[Tensor, "batch d_vocab"]:
        rows = self.rows if self._picked is None else self._picked
        for number, entry in enumerate(self._cache.entries):
            if number not in self._own:  # its final prompt token is the unsteered one's
                last = (entry.past_keys[rows, -1:], entry.past_values[rows, -1:])
                self._own[number] = last
        n_own = max(keys.shape[1] for keys, _ in self._own.values())
        prompt = self._cache.previous_attention_mask[rows]
        seen = torch.cat([prompt, prompt.new_ones(len(rows), n_own - 1)], dim=1)
        new = torch.ones_like(columns)
        self._describe(new, 0)
        cache = self.model.stand_in_cache(seen)
        logits = self._beside_the_prompt(
            -1, lambda: self.model.next_token_logits(columns, new, cache)
        )
        self._count(new)
        return logits

    def keep(self, rows: Bool[Tensor, " batch"]) -> None:
        """Go on with some of the remaining rows only."""
        if rows.all():
            return
        self._select(rows)
        self.rows = self.rows[rows]

    def _select(self, rows: Tensor) -> None:
        """Keep some rows, by number or by truth value."""
        picked = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        self._picked = picked if self._picked is None else self._picked[picked]
        self._own = {layer: (k[picked], v[picked]) for layer, (k, v) in self._own.items()}
        self._answers = None if self._answers is None else self._answers[picked]
        self._labels = None if self._labels is None else self._labels[picked]

    def _settle(self) -> None:
        """Give the rows that were picked a cache of their own."""
        if self._picked is None:
            return
        rows, old = self._picked, self._cache
        entries = [copy(entry) for entry in old.entries]
        everything = torch.equal(rows, torch.arange(len(old.previous_attention_mask)).to(rows))
        for number, entry in enumerate(entries):
            for name, own in zip(
                ("past_keys", "past_values"), self._own.get(number, (None, None)), strict=True
            ):
                past = getattr(entry, name)
                past = past if own is None else past[:, : past.shape[1] - own.shape[1]]
                past = past if everything else past[rows.to(past.device)]
                setattr(entry, name, past if own is None else torch.cat([past, own], dim=1))
        mask = old.previous_attention_mask
        mask = mask if everything else mask[rows]
        self._cache = replace(old, entries=entries, previous_attention_mask=mask)
        self._picked, self._own = None, {}

    def is_end(self, tokens: Int[Tensor, " batch"]) -> Bool[Tensor, " batch"]:
        """Return where a token ends the reply."""
        return torch.isin(tokens, self._eos)

    def _forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"],
        n_prompt: int,
        part: Part | None = None,
    ) -> Float[Tensor, "batch some"]:
        self._settle()
        self._describe(mask, n_prompt)
        logits = self.model.next_token_logits(tokens, mask, self._cache, part)
        self._count(mask)
        return logits

    def _describe(self, mask: Int[Tensor, "batch pos"], n_prompt: int) -> None:
        """Tell the hooks about the columns of the coming pass."""
        given: dict[str, Any] = {"n_before": self._n_before, "scores": self._scores}
        window = Window(mask.bool(), n_prompt, self._answers, self._labels, **given)
        for point in self._points:
            point.ctx["window"] = window

    def _count(self, mask: Int[Tensor, "batch pos"]) -> None:
        """Add up what steering hooks left of the pass that they have just seen."""
        here, rows = self.rows.device, self.rows  # a row may be there several times, in branches
        moved = torch.zeros(mask.shape, dtype=torch.bool, device=here)
        for layer, point in enumerate(self._points):
            for left in point.ctx.pop("left", ()):  # by every hook that the layer has
                by_layer = left["moved"].to(here)
                moved |= by_layer
                self._moved[rows[by_layer.any(-1)], layer] = True
                self.n_steered.index_add_(0, rows, by_layer.sum(-1))
                self.n_steerable.index_add_(0, rows, left["steerable"].to(here))
                self.shift.index_add_(0, rows, left["shift"].to(here))
                self.max_score.scatter_reduce_(0, rows, left["max_score"].to(here), "amax")
        self.n_tokens.index_add_(0, rows, moved.sum(-1))


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
