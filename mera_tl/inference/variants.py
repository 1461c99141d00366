"""Options as tokens: the ways in which each option may be said, under a model's tokenizer.

A *variant* is an option in its own spelling, in lower, UPPER and Capitalised form, with and without
a leading space. An option of one character is read in its own spelling alone when its variants are
scored whole: " a" is an article, not choice A.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mera_tl.models.model import Model
from mera_tl.tasks.task import Task

TokenIds = tuple[int, ...]
N_CUE = 24
"""Characters at the end of a prompt in whose context a variant is tokenized."""


@dataclass(frozen=True, eq=False)
class OptionTokens:
    """The tokens through which each option is read."""

    options: tuple[str, ...]
    tokenizer: Any = field(repr=False)
    tokens: tuple[TokenIds, ...] = ()
    """Per option, the tokens that speak for it where one token is read, all different."""
    continuations: tuple[tuple[TokenIds, ...], ...] = ()
    """Per option, its variants as they follow a prompt, for readout `options`; all different."""
    ends: TokenIds = ()
    """Tokens that end a reply, for readout `reply`."""

    def class_logits(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch option"]:
        """Return the maximum over each option's tokens, in float32."""
        columns = [logits[:, list(ids)].float().amax(-1) for ids in self.tokens]
        return torch.stack(columns, dim=-1)

    def option_of(self, tokens: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Return the option each token speaks for, or -1."""
        answer = torch.full_like(tokens, -1)
        for option, ids in enumerate(self.tokens):
            answer[torch.isin(tokens, torch.tensor(ids, device=tokens.device))] = option
        return answer

    def texts(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Return replies as text, without tokens that only end them."""
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def whole_options(
    model: Model, options: Sequence[str], cue: str
) -> tuple[tuple[TokenIds, ...], ...]:
    """Tokenize every variant of every option as it follows a prompt that ends in `cue`.

    A variant's ids are those of the text `cue + variant` after those of `cue`, as
    lm-evaluation-harness takes them. Where the tokenizer joins the two, as the last space of
    "Answer: " and "ham", there are no such ids, and the variant is tokenized by itself: the prompt
    stays as it was run. A variant that two options share counts for the option whose own spelling
    it is, else for neither.

    Raises:
        ValueError: if an option is not in the vocabulary, or has no variant of its own.
    """
    forms = {o: _forms(o) if len(o) > 1 else [o] for o in options}
    encoded = {o: _after(model.tokenizer, cue, _spaced(forms[o])) for o in options}
    own = {o: _after(model.tokenizer, cue, _spaced([o])) for o in options}
    for option in options:
        _require_known(model, option, encoded[option])
        shared = {ids for other in options if other != option for ids in encoded[other]}
        foreign = {ids for other in options if other != option for ids in own[other]}
        kept = [i for i in encoded[option] if i not in shared or i in {*own[option]} - foreign]
        encoded[option] = kept
        if not kept:
            _refuse_shared(model, option, {token for ids in own[option] for token in ids})
    return tuple(tuple(encoded[option]) for option in options)


def single_tokens(model: Model, options: Sequence[str], *, first: bool) -> tuple[TokenIds, ...]:
    """Return, per option, its variants of one token: what the paper reads.

    An option without one has the first tokens of its variants that no other option shares; with
    `first` every option has these, too.

    Raises:
        ValueError: if two options cannot be told apart, naming them and their tokens.
    """
    encoded = {o: _alone(model.tokenizer, _spaced(_forms(o))) for o in options}
    whole = {o: {ids[0] for ids in encoded[o] if len(ids) == 1} for o in options}
    begin = {o: {ids[0] for ids in encoded[o]} for o in options}
    chosen = {}
    for option in options:
        _require_known(model, option, encoded[option])
        others: set[int] = set().union(*(whole[o] or begin[o] for o in options if o != option))
        chosen[option] = whole[option] or begin[option] - others
        if not chosen[option] or whole[option] & others:
            _refuse_shared(model, option, (whole[option] or begin[option]) & others)
        if first:
            others = set().union(*(begin[o] for o in options if o != option))
            chosen[option] = chosen[option] | begin[option] - others
    return tuple(tuple(sorted(chosen[option])) for option in options)


def common_ending(task: Task[Any]) -> str:
    """Return what all prompts of a task end in, up to `N_CUE` characters."""
    backwards = [example.prompt[: -N_CUE - 1 : -1] for example in task.examples]
    return os.path.commonprefix(backwards)[::-1]


def _forms(option: str) -> list[str]:
    return list(dict.fromkeys((option, option.lower(), option.upper(), option.capitalize())))


def _spaced(forms: Sequence[str]) -> list[str]:
    return [space + form for form in forms for space in ("", " ")]


def _alone(tokenizer: Any, texts: Sequence[str]) -> list[TokenIds]:
    encoded = map(tuple, tokenizer(list(texts), add_special_tokens=False)["input_ids"])
    # A form outside the vocabulary says nothing about the option.
    return [ids for ids in encoded if ids and tokenizer.unk_token_id not in ids]


def _after(tokenizer: Any, cue: str, texts: Sequence[str]) -> list[TokenIds]:
    """Tokenize texts in the context of a cue, where that leaves the cue's own tokens alone."""
    before, *both = tokenizer([cue, *(cue + t for t in texts)], add_special_tokens=False)[
        "input_ids"
    ]
    found = []
    for text, ids in zip(texts, both, strict=True):
        follows = ids[: len(before)] == before and len(ids) > len(before)
        found += [tuple(ids[len(before) :])] if follows else _alone(tokenizer, [text])
    return [ids for ids in dict.fromkeys(found) if tokenizer.unk_token_id not in ids]


def _require_known(model: Model, option: str, encoded: Sequence[TokenIds]) -> None:
    if not encoded:
        raise ValueError(
            f"Option {option!r} is not in the vocabulary of {model.name}; rename it in the task."
        )


def _refuse_shared(model: Model, option: str, shared: set[int]) -> None:
    names = model.tokenizer.convert_ids_to_tokens(sorted(shared))
    raise ValueError(
        f"Option {option!r} cannot be told apart from the others under the tokenizer of "
        f"{model.name}: they share the tokens {names}; rename the options in the task, or read "
        "them whole with readout='options'."
    )
