"""How an answer is read off a model: options as tokens, probabilities, the answer token.

Class logit = the maximum over an option's variant tokens; `P(option)` = softmax over the class
logits. `last` reads them at the final prompt token. `exact` decodes greedily; the first generated
token that is a variant of any option is the *answer token*, and P is read from the logits that
emitted it. A row stops there. No such token within `max_new_tokens`: unanswered, error 1.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mera_tl.inference.decoding import Decoding, hooked_pass
from mera_tl.models.model import FwdHooks, Model

Readout = Literal["last", "exact"]
Observer = Callable[[Int[Tensor, " column_rows"]], None]
"""Called after a pass with the batch row of each of its rows, -1 where that is of no interest."""


@dataclass(frozen=True)
class ReadSettings:
    """How prompts are run and answers read."""

    readout: Readout = "exact"
    """Read at the final prompt token (last) or at the decoded answer token (exact)."""
    batch_size: int | None = None
    """Prompts per batch. Default: as many as `batch_tokens` holds."""
    batch_tokens: int = 2048
    """Tokens per batch, padding counted; halved by itself when memory runs out. A CPU is fastest
    near 2,000, where a batch stays in its caches; a GPU likes ten times that. Prompts longer than a
    sixteenth of it count more, since attention takes memory with the square of their length."""
    max_new_tokens: int = 8
    """Tokens decoded at most before an example counts as unanswered."""
    truncate: bool = False
    """Shorten the text of prompts that exceed the context, never the question."""
    progress: bool = True
    """Show a progress bar where a person is watching."""

    def wider(self, factor: int) -> "ReadSettings":
        """Return these settings with batches `factor` times as large."""
        size = self.batch_size and factor * self.batch_size
        return replace(self, batch_size=size, batch_tokens=factor * self.batch_tokens)


# --- options as tokens --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OptionTokens:
    """The tokens through which each option is read."""

    options: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    """Variant tokens per option, all different."""

    def class_logits(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch option"]:
        """Return the maximum over each option's variants, in float32."""
        columns = [logits[:, list(ids)].float().amax(-1) for ids in self.tokens]
        return torch.stack(columns, dim=-1)

    def option_of(self, tokens: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Return the option each token is a variant of, or -1."""
        answer = torch.full_like(tokens, -1)
        for option, ids in enumerate(self.tokens):
            answer[torch.isin(tokens, torch.tensor(ids, device=tokens.device))] = option
        return answer


def option_tokens(model: Model, options: Sequence[str]) -> OptionTokens:
    """Resolve options to tokens under a model's tokenizer.

    An option's variants are its lower, UPPER and Capitalised form, with and without a leading
    space. It is read through those that are one token; if none is, through the first tokens of its
    variants that no other option shares.

    Raises:
        ValueError: if two options cannot be told apart, naming them and their tokens.
    """
    encoded = {option: _encode_variants(model.tokenizer, option) for option in options}
    single = {option: {ids[0] for ids in encoded[option] if len(ids) == 1} for option in options}
    first = {option: {ids[0] for ids in encoded[option]} for option in options}
    chosen = {}
    for option in options:
        others = set().union(*(single[o] or first[o] for o in options if o != option))
        chosen[option] = single[option] or first[option] - others
        if not encoded[option]:
            raise ValueError(
                f"Option {option!r} is not in the vocabulary of {model.name}; "
                "rename it in the task."
            )
        if not chosen[option] or single[option] & others:
            shared = sorted((single[option] or first[option]) & others)
            names = model.tokenizer.convert_ids_to_tokens(shared)
            raise ValueError(
                f"Option {option!r} cannot be told apart from the others under the tokenizer of "
                f"{model.name}: they share the tokens {names}; rename the options in the task."
            )
    return OptionTokens(tuple(options), tuple(tuple(sorted(chosen[o])) for o in options))


def _encode_variants(tokenizer: Any, option: str) -> list[list[int]]:
    forms = dict.fromkeys((option, option.lower(), option.upper(), option.capitalize()))
    texts = [space + form for form in forms for space in ("", " ")]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    # A form outside the vocabulary says nothing about the option.
    return [ids for ids in encoded if ids and tokenizer.unk_token_id not in ids]


# --- reading a batch ----------------------------------------------------------------------------

COUNTS = ("n_steered", "n_steerable", "n_tokens", "n_layers", "shift", "peak")
"""What a `Decoding` knows of what steering hooks did to each row."""


@dataclass(frozen=True, eq=False)
class Reading:
    """The answers of one batch."""

    predictions: Int[Tensor, " batch"]
    probs: Float[Tensor, "batch option"]
    n_steered: Int[Tensor, " batch"]
    n_steerable: Int[Tensor, " batch"]
    n_tokens: Int[Tensor, " batch"]
    n_layers: Int[Tensor, " batch"]
    shift: Float[Tensor, " batch"]
    peak: Float[Tensor, " batch"]

    def with_rows(self, rows: Int[Tensor, " kept"], other: "Reading") -> "Reading":
        """Return these answers with some rows taken from another reading."""
        changed = {}
        for name in ("predictions", "probs", *COUNTS):
            changed[name] = getattr(self, name).clone()
            changed[name][rows] = getattr(other, name)
        return Reading(**changed)


def read_batch(
    model: Model,
    prompts: Sequence[Sequence[int]],
    options: OptionTokens,
    settings: ReadSettings,
    fwd_hooks: FwdHooks = (),
    *,
    on_prompt: Observer | None = None,
    on_answer: Observer | None = None,
) -> Reading:
    """Run one batch of tokenized prompts under hooks and read its answers.

    `on_prompt` is called after the prompt pass; `on_answer` whenever answer tokens have been fed
    back, with the rows they belong to. Both are for hooks that gather activations.
    """
    with torch.inference_mode(), hooked_pass(model, fwd_hooks):
        decoding = Decoding(model, prompts, fwd_hooks)
        logits = decoding.prompt()
        if on_prompt is not None:
            on_prompt(decoding.rows)
        per_answer = [hook for _, hook in fwd_hooks if getattr(hook, "per_answer", False)]
        if per_answer:
            answers = options.class_logits(logits).argmax(-1)
            everywhere = any(hook.positions == "all" for hook in per_answer)
            again = decoding.prompt_again if everywhere else decoding.last_token_again
            logits = again(answers)
        return _read(decoding, logits, options, settings, on_answer)


def read_again(
    decoding: Decoding,
    rows: Int[Tensor, " kept"],
    options: OptionTokens,
    settings: ReadSettings,
    fwd_hooks: FwdHooks,
    *,
    answers: Int[Tensor, " kept"],
) -> Reading:
    """Read some rows of a batch under hooks that act from the final prompt token on.

    `decoding` has run its prompts without hooks, and no further; `answers` are what it was about to
    answer. Costs one token instead of a prompt, and equals `read_batch` with these hooks.
    """
    with torch.inference_mode(), hooked_pass(decoding.model, fwd_hooks):
        fork = decoding.fork(rows, fwd_hooks)
        logits = fork.last_token_again(answers)
        return _read(fork, logits, options, settings, None)


def _read(
    decoding: Decoding,
    logits: Float[Tensor, "batch d_vocab"],
    options: OptionTokens,
    settings: ReadSettings,
    on_answer: Observer | None,
) -> Reading:
    """Read the answers of a batch whose prompts have been run."""
    probs = options.class_logits(logits).softmax(-1)
    predictions = probs.argmax(-1)
    if settings.readout == "exact":
        n_new = settings.max_new_tokens
        predictions, probs = _decode(decoding, logits, options, n_new, on_answer)
    counts = {name: getattr(decoding, name).cpu() for name in COUNTS}
    return Reading(predictions.cpu(), probs.cpu(), **counts)


def _decode(
    decoding: Decoding,
    logits: Float[Tensor, "batch d_vocab"],
    options: OptionTokens,
    max_new_tokens: int,
    on_answer: Observer | None,
) -> tuple[Int[Tensor, " batch"], Float[Tensor, "batch option"]]:
    """Decode greedily until every row has answered, ended, or run out of tokens."""
    predictions = torch.full_like(decoding.rows, -1)
    probs = torch.zeros(len(predictions), len(options.options), device=logits.device)
    for step in range(max_new_tokens):
        rows, emitted = decoding.rows, logits.argmax(-1)
        answer = options.option_of(emitted)
        hit = answer >= 0
        predictions[rows[hit]] = answer[hit]
        probs[rows[hit]] = options.class_logits(logits[hit]).softmax(-1)
        going = ~hit & ~decoding.is_end(emitted)
        if step + 1 == max_new_tokens:
            going = torch.zeros_like(going)
        fed = going | hit if on_answer is not None else going
        if not fed.any():
            break
        decoding.keep(fed)
        logits = decoding.next(emitted[fed])
        if on_answer is not None:
            on_answer(torch.where(hit[fed], decoding.rows, -1))
            decoding.keep(going[fed])
            logits = logits[going[fed]]
            if not len(logits):
                break
    return predictions, probs


# --- batches ------------------------------------------------------------------------------------

LONG_PROMPTS = 16
"""Prompts longer than this part of a batch's tokens count by the square of their length."""


def by_length(prompts: Sequence[Sequence[int]], settings: ReadSettings) -> Iterator[list[int]]:
    """Yield batches of indices, longest prompts first: what does not fit shows early.

    Prompts of like length share a batch, which is full when another row of its first, longest
    prompt's length would exceed `batch_tokens`, or at `batch_size` rows where that is given.
    """
    order, start = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), 0
    while start < len(order):
        share = settings.batch_tokens / max(1, len(prompts[order[start]]))
        # The second bounds the attention scores of a batch, rows * longest**2.
        rows = max(1, int(min(share, share**2 / LONG_PROMPTS)))
        size = settings.batch_size or rows
        yield order[start : start + size]
        start += size
