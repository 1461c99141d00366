"""Replies to prompts, steered or not, with what the probe read and the rule moved at every token.

Rows are independent: a prompt gets the same reply alone and in a batch. With a temperature, each
prompt draws from a generator of its own, seeded by `seed` and the prompt, by the Gumbel-max trick
(argmax of log-probabilities plus noise). So a steered and an unsteered run share their random
numbers, and differ only where steering changes the distribution enough to matter.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from mera_tl.inference.answers import ReadSettings, about_to_answer
from mera_tl.inference.decoding import Decoding, Window, hooked_pass
from mera_tl.inference.evaluation import check_model, run_batches
from mera_tl.inference.prefix import Prefix
from mera_tl.inference.variants import OptionTokens
from mera_tl.models.hooks import FwdHooks
from mera_tl.models.model import Model
from mera_tl.steering.attach import settings_of
from mera_tl.steering.hook import SteerHook, relative_shift
from mera_tl.steering.reach import around
from mera_tl.steering.steering import Steering


@dataclass(frozen=True, eq=False)
class ReplyTrace:
    """What hooks read and did, token by token; NaN for the last token, which is never fed back."""

    tokens: tuple[str, ...]
    """Of the prompt, then of the reply, with the spaces between them; "" within a character."""
    n_prompt: int
    """How many of them are the prompt's."""
    layers: tuple[int, ...]
    predicted_error: Float[np.ndarray, "layer pos"]
    """By the probe, of the activation as the layer received it."""
    shift: Float[np.ndarray, "layer pos"]
    """Length of the shift relative to the activation that it moved."""

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return f"ReplyTrace({len(self.tokens)} tokens, {self.n_prompt} given; layers {layers})"


@dataclass(frozen=True, eq=False)
class Reply:
    """What a model said to one prompt."""

    prompt: str
    text: str
    tokens: tuple[int, ...] = field(repr=False)
    """Without the token that ended the reply."""
    log_probs: tuple[float, ...] = field(repr=False)
    """Of each token, under the model as it was run, at temperature 1."""
    is_ended: bool
    """Whether the model ended the reply; otherwise it ran out of tokens."""
    trace: ReplyTrace | None = field(default=None, repr=False)
    """None without a steering."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop."""

    max_new_tokens: int = 64
    """Most tokens of a reply."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    seed: int = 0
    """Of the random numbers of every prompt."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply; they are no part of it."""
    top_k: int = 0
    """Draw among so many of the most likely tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the most likely tokens that have this probability together, at least."""

    def __post_init__(self) -> None:
        numbers = isinstance(self.max_new_tokens, Integral) and isinstance(self.temperature, Real)
        if not numbers or self.max_new_tokens < 1 or not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens!r} and temperature={self.temperature!r} must "
                "be at least 1 and a finite number from 0 on."
            )
        if "" in self.stop:
            raise ValueError(
                "stop holds an empty text, with which every reply begins; leave it out."
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_k={self.top_k} and top_p={self.top_p} must be 0 or more, and above 0 and at "
                "most 1."
            )


def generate(
    model: Model,
    prompts: Sequence[str],
    steering: Steering | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    settings: ReadSettings | None = None,
) -> list[Reply]:
    """Reply to prompts, as `generate` of transformers does, under a steering if one is given.

    A steering at no limit moves nothing, and traces what its probe reads of the unsteered model.

    Raises:
        ValueError: if a prompt and its reply exceed the context, the steering is not for this
            model, or it depends on the unsteered answer and was not certified with options.
    """
    sampling = Sampling(max_new_tokens, temperature, seed)
    check_model(model)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts={prompts!r:.60} is no list of texts; pass one, as [prompt].")
    if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise ValueError(f"The prompt {wrong[0]!r:.60} is no text; pass texts.")
    hooks, options = hooks_and_options(model, steering)
    tokens = model.tokenize(list(prompts))
    rows = reply_to(model, tokens, hooks, sampling, options=options, settings=settings)
    return [
        Reply(
            prompt,
            text_of(model, row, sampling),
            tuple(row.tokens),
            tuple(row.log_probs),
            row.is_ended,
            row.trace(model, hooks),
        )
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def hooks_and_options(
    model: Model, steering: Steering | None
) -> tuple[list[tuple[str, SteerHook]], OptionTokens | None]:
    """Return the hooks for this model, and the options among which they ask for its answer.

    Raises:
        ValueError: if the steering is none or not for this model, or depends on the unsteered
            answer and was not certified with options.
    """
    if steering is None:
        return [], None
    if not isinstance(steering, Steering):
        raise ValueError(
            f"{steering!r:.60} is no steering; pass one, as decision.steering or what "
            "mera_tl.load_steering(...) returns."
        )
    hooks, options = steering.checked_hooks(model), steering.options
    if options is None and any(hook.per_answer for _, hook in hooks):
        raise ValueError(
            "This steering depends on the option that the model is about to answer, and knows of "
            "none; take one that was certified, with `calibrate`, on a task with options."
        )
    return hooks, options


# --- decoding -----------------------------------------------------------------------------------


class Row:
    """One prompt on its way to a reply."""

    def __init__(self, prompt: Sequence[int], copy: int, sampling: Sampling) -> None:
        self.prompt, self.tokens, self.log_probs = list(prompt), [], []
        self.is_ended = False
        self.scores: dict[int, list[Tensor]] = {}
        self.shifts: dict[int, list[Tensor]] = {}
        # A prompt that comes twice gets two draws, wherever in a batch it stands.
        name = f"{sampling.seed}:{copy}:{','.join(map(str, prompt))}"
        digest = hashlib.sha256(name.encode()).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))

    def gumbel(self, n: int) -> Float[Tensor, " n"]:
        """Return noise whose maximum over logits is a draw from their softmax."""
        uniform = torch.rand(n, generator=self._generator, dtype=torch.float64)
        return -(-uniform.clamp(min=1e-300).log()).log()

    def trace(self, model: Model, hooks: FwdHooks) -> ReplyTrace | None:
        """Return what was recorded of this row."""
        if not hooks:
            return None
        ids = [*self.prompt, *self.tokens]

        def grid(parts: dict[int, list[Tensor]]) -> np.ndarray:
            rows = torch.stack([torch.cat(parts[hook.layer]) for _, hook in hooks])[:, : len(ids)]
            missing = torch.full((len(rows), len(ids) - rows.shape[1]), torch.nan)
            return torch.cat([rows.cpu().float(), missing], 1).double().numpy()

        return ReplyTrace(
            _in_place(model.tokenizer, ids),
            len(self.prompt),
            tuple(hook.layer for _, hook in hooks),
            grid(self.scores),
            grid(self.shifts),
        )


def reply_to(
    model: Model,
    prompts: Sequence[Sequence[int]],
    hooks: FwdHooks,
    sampling: Sampling,
    *,
    options: OptionTokens | None = None,
    settings: ReadSettings | None = None,
    is_traced: bool = True,
    prefix: Prefix | None = None,
) -> list[Row]:
    """Reply to tokenized prompts, in batches of like length.

    With `prefix`, no hook may act on the tokens that all prompts begin with.

    Raises:
        ValueError: if a prompt and its reply exceed the context.
    """
    room, longest = model.n_ctx - sampling.max_new_tokens, max(map(len, prompts), default=0)
    if longest > room:
        raise ValueError(
            f"A prompt of {longest} tokens and a reply of {sampling.max_new_tokens} exceed the "
            f"{model.n_ctx} tokens of {model.name}; shorten the prompt or lower max_new_tokens."
        )
    copies: Counter[tuple[int, ...]] = Counter()
    numbers = []
    for prompt in map(tuple, prompts):
        numbers.append(copies[prompt])
        copies[prompt] += 1

    def run(batch: list[int]) -> list[Row]:
        rows = [Row(prompts[i], numbers[i], sampling) for i in batch]
        traced = _recording(hooks, rows) if is_traced else hooks
        with torch.inference_mode(), hooked_pass(model, traced):
            _decode(model, rows, traced, sampling, options, prefix)
        return rows

    results = run_batches(prompts, run, settings or ReadSettings(), "generate")
    by_index = {i: row for batch, rows in results for i, row in zip(batch, rows, strict=True)}
    return [by_index[i] for i in range(len(prompts))]


def _decode(
    model: Model,
    rows: list[Row],
    hooks: FwdHooks,
    sampling: Sampling,
    options: OptionTokens | None,
    prefix: Prefix | None,
) -> None:
    """Run prompts, then feed back the tokens that are chosen until every row has ended."""
    prompts, labels = [row.prompt for row in rows], torch.arange(len(rows))
    decoding = Decoding(model, prompts, hooks, labels, prefix)
    logits = decoding.prompt()
    if any(getattr(hook, "per_answer", False) for _, hook in hooks):
        assert options is not None  # the caller has looked
        answers = about_to_answer(decoding, logits, options, settings_of(options))
        logits = decoding.prompt_again(answers)
    for step in range(sampling.max_new_tokens):
        here = [rows[i] for i in decoding.rows.tolist()]
        emitted = _choose(logits, here, sampling)
        log_probs = logits.float().log_softmax(-1).gather(1, emitted[:, None])[:, 0].tolist()
        ends = decoding.is_end(emitted).tolist()
        going = []
        for row, token, log_prob, end in zip(here, emitted.tolist(), log_probs, ends, strict=True):
            if not end:
                row.tokens.append(token)
                row.log_probs.append(log_prob)
            row.is_ended = end or _is_stopped(model, row, sampling.stop)
            going.append(not row.is_ended)
        kept = torch.tensor(going, device=emitted.device)
        if step + 1 == sampling.max_new_tokens or not kept.any():
            break
        decoding.keep(kept)
        logits = decoding.next(emitted[kept])


def _choose(
    logits: Float[Tensor, "batch d_vocab"], rows: Sequence[Row], sampling: Sampling
) -> Int[Tensor, " batch"]:
    if not sampling.temperature:
        return logits.argmax(-1)
    noise = torch.stack([row.gumbel(logits.shape[-1]) for row in rows]).to(logits.device)
    scores: Any = logits.double() / sampling.temperature
    ids: Any = None  # transformers' filters do not look at what was said
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return (scores + noise).argmax(-1)


def _is_stopped(model: Model, row: Row, stop: Sequence[str]) -> bool:
    if not stop:
        return False
    text = model.tokenizer.decode(row.tokens, skip_special_tokens=True)
    return any(each in text for each in stop)


def text_of(model: Model, row: Row, sampling: Sampling) -> str:
    """Return the text of a reply up to where it stops."""
    text = model.tokenizer.decode(row.tokens, skip_special_tokens=True)
    return text[: min([text.find(each) for each in sampling.stop if each in text] + [len(text)])]


def _in_place(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return each token's text as it follows those before it: alone, many lose their space.

    A character of several tokens is the last one's.
    """
    texts, start, told = [], 0, 0  # from `start` on a few tokens are decoded; `told` are in `texts`
    for stop in range(1, len(ids) + 1):
        old, new = (tokenizer.decode(list(ids[start:end])) for end in (told, stop))
        whole = len(new) > len(old) and (not new.endswith("\ufffd") or stop == len(ids))
        texts.append(new[len(old) :] if whole else "")
        start, told = (told, stop) if whole else (start, told)
    return tuple(texts)


def _recording(hooks: FwdHooks, rows: Sequence[Row]) -> FwdHooks:
    """Return steering hooks with a look at each that keeps what it read and moved, row by row."""

    def keep(reader: SteerHook, into: Tensor, out: Tensor, window: Window) -> None:
        if reader.per_answer and window.answers is None:
            return  # the pass that finds out the answers; the same columns come again
        assert window.labels is not None
        error = reader.read(into, window)[1].sigmoid()
        shift = relative_shift(out, into)
        for i, label in enumerate(window.labels.tolist()):
            row, real = rows[label], window.real[i].to(error.device)
            row.scores.setdefault(reader.layer, []).append(error[i, real])
            row.shifts.setdefault(reader.layer, []).append(shift[i, real])

    return around([hook for _, hook in hooks], hooks, keep)
