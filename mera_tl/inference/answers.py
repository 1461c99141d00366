"""How an answer is read off a model: by named readouts, from a batch of prompts that have been run.

- `options`, the default: every option's whole continuation is scored (see `multiple_choice`), and
  `P(option)` is the softmax over options. Every example has an answer.
- `last`, the paper's: the options' single tokens at the final prompt token. An option's logit is
  the maximum over its variants.
- `exact`: greedy decoding. A reply is an answer only if it *begins* with an option (see `replies`).
  P is read from the logits that emitted the *answer token*, the first of that word.
- `exact_anywhere`, the paper's rule: the answer token is the first generated token that is a
  variant of an option, whatever stands before it.

A reply without an answer within `max_new_tokens` is unanswered: error 1.

- `reply`, that of scored tasks and of no others: the whole greedy reply, up to `reply_tokens`. It
  is graded when the batches are put together (`evaluation.gather`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mera_tl.inference.decoding import Decoding, hooked_pass
from mera_tl.inference.multiple_choice import first_tokens, option_log_probs
from mera_tl.inference.outcomes import COUNTS
from mera_tl.inference.prefix import Prefix
from mera_tl.inference.replies import answered_option, has_begun, is_no_answer, is_over
from mera_tl.inference.variants import OptionTokens, common_ending, single_tokens, whole_options
from mera_tl.models.model import FwdHooks, Model
from mera_tl.tasks.task import Task

Readout = Literal["options", "last", "exact", "exact_anywhere", "reply"]
Observer = Callable[[Int[Tensor, " column_rows"]], None]
"""Called after a pass with the batch row of each of its rows, -1 where that is of no interest."""


@dataclass(frozen=True)
class ReadSettings:
    """How prompts are run and answers read.

    Raises:
        ValueError: if the readout is unknown, or a number of prompts or tokens is none.
    """

    readout: Readout = "options"
    """How an answer is read: score each option whole (options), read the final prompt token (last),
    or decode a reply that begins with an option (exact), contains one (exact_anywhere), or is
    scored as a whole (reply, set by scored tasks)."""
    answer_prefix: str | None = None
    """Text that begins the assistant's turn of a chat. Default: "Answer:" for readout options, none
    for the others. A prompt without a chat template ends as the task's template does."""
    batch_size: int | None = None
    """Prompts per batch. Default: as many as `batch_tokens` holds."""
    batch_tokens: int = 2048
    """Tokens per batch, padding counted; halved by itself when memory runs out. A CPU is fastest
    near 2,000, where a batch stays in its caches; a GPU likes ten times that. Prompts longer than a
    sixteenth of it count more, since attention takes memory with the square of their length."""
    max_new_tokens: int = 8
    """Tokens decoded at most before an example counts as unanswered."""
    reply_tokens: int = 40
    """Tokens decoded at most of a reply that is scored."""
    truncate: bool = False
    """Shorten the text of prompts that exceed the context, never the question."""
    progress: bool = True
    """Show a progress bar where a person is watching."""

    def __post_init__(self) -> None:
        if self.readout not in get_args(Readout):
            wanted = ", ".join(get_args(Readout))
            raise ValueError(f"readout={self.readout!r} is none of {wanted}; choose one of them.")
        for name in ("batch_size", "batch_tokens", "max_new_tokens", "reply_tokens"):
            value = getattr(self, name)
            given = value is not None or name != "batch_size"
            if given and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}={value!r} is no count; pass a whole number, 1 or more.")

    @property
    def decodes(self) -> bool:
        """Whether a reply is generated."""
        return self.readout in ("exact", "exact_anywhere", "reply")

    @property
    def n_new(self) -> int:
        """Most tokens that are decoded."""
        return self.reply_tokens if self.readout == "reply" else self.max_new_tokens

    @staticmethod
    def of(task: Task[Any], settings: "ReadSettings | None" = None) -> "ReadSettings":
        """Return the settings with which a task is read: replies to a scored one are scored.

        Raises:
            ValueError: if these are no settings, or the readout is `reply` and the task has no
                scorer.
        """
        if not isinstance(settings, ReadSettings | None):
            raise ValueError(
                f"settings={settings!r:.60} are none; pass them as ReadSettings(readout=...)."
            )
        settings = settings or ReadSettings()
        if task.scored:
            return replace(settings, readout="reply")
        if settings.readout == "reply":
            raise ValueError(
                f"readout='reply' scores replies, and {task.name} has options and no scorer; "
                "choose another readout, or give the task a scorer."
            )
        return settings

    def prefix(self, model: Model) -> str:
        """Return what begins the assistant's turn of a model with a chat template."""
        if not model.chat:
            return ""
        default = "Answer:" if self.readout == "options" else ""
        return default if self.answer_prefix is None else self.answer_prefix

    def wider(self, factor: int) -> "ReadSettings":
        """Return these settings with batches `factor` times as large."""
        size = self.batch_size and factor * self.batch_size
        return replace(self, batch_size=size, batch_tokens=factor * self.batch_tokens)


def option_tokens(model: Model, task: Task[Any], settings: ReadSettings) -> OptionTokens:
    """Resolve a task's options to the tokens through which a readout reads them.

    Raises:
        ValueError: if an option is not in the vocabulary, or two options cannot be told apart,
            naming them and their tokens.
    """
    if settings.readout == "reply":
        return OptionTokens(task.options, model.tokenizer, ends=tuple(model.eos_ids))
    if settings.readout == "options":
        # A chat template ends in a line break where there is no prefix.
        cue = (settings.prefix(model) or "\n") if model.chat else common_ending(task)
        whole = whole_options(model, task.options, cue or "\n")
        return OptionTokens(task.options, model.tokenizer, continuations=whole)
    tokens = single_tokens(model, task.options, first=settings.readout == "exact")
    return OptionTokens(task.options, model.tokenizer, tokens)


# --- reading a batch ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reading:
    """The answers of one batch."""

    predictions: Int[Tensor, " batch"]
    probs: Float[Tensor, "batch option"]
    tokens: Int[Tensor, "batch new"]
    """What was decoded, -1 after its end; no columns where nothing is."""
    n_steered: Int[Tensor, " batch"]
    n_steerable: Int[Tensor, " batch"]
    n_tokens: Int[Tensor, " batch"]
    n_layers: Int[Tensor, " batch"]
    shift: Float[Tensor, " batch"]
    max_score: Float[Tensor, " batch"]


def read_batch(
    model: Model,
    prompts: Sequence[Sequence[int]],
    options: OptionTokens,
    settings: ReadSettings,
    fwd_hooks: FwdHooks = (),
    *,
    prefix: Prefix | None = None,
    on_prompt: Callable[[Decoding], None] | None = None,
    on_answer: Observer | None = None,
) -> Reading:
    """Run one batch of tokenized prompts under hooks and read its answers.

    With `prefix`, no hook may act on the tokens that all prompts begin with. For hooks that gather
    activations `on_prompt` is called after the prompt pass, and `on_answer` whenever answer tokens
    have been fed back, with the rows they belong to.
    """
    with torch.inference_mode(), hooked_pass(model, fwd_hooks):
        decoding = Decoding(model, prompts, fwd_hooks, prefix=prefix)
        logits = decoding.prompt()
        if on_prompt is not None:
            on_prompt(decoding)
        logits = answer_known(decoding, logits, options, settings, fwd_hooks)
        return read_from(decoding, logits, options, settings, on_answer=on_answer)


def answer_known(
    decoding: Decoding,
    logits: Float[Tensor, "batch d_vocab"],
    options: OptionTokens,
    settings: ReadSettings,
    fwd_hooks: FwdHooks,
) -> Float[Tensor, "batch d_vocab"]:
    """Run what hooks move by the unsteered answer once more, that answer known, if there are any.

    `logits` are those of prompts that have just been run; the new ones are returned.
    """
    per_answer = [hook for _, hook in fwd_hooks if getattr(hook, "per_answer", False)]
    if not per_answer:
        return logits
    everywhere = any(hook.positions == "all" for hook in per_answer)
    answers = about_to_answer(decoding, logits, options, settings)
    return decoding.prompt_again(answers, whole=everywhere)


def about_to_answer(
    decoding: Decoding,
    logits: Float[Tensor, "batch d_vocab"],
    options: OptionTokens,
    settings: ReadSettings,
) -> Int[Tensor, " batch"]:
    """Return the option that each row leans to where its prompt ends.

    Under `options` and `last` that is the answer; a reply may turn out otherwise, and one that is
    scored leans to nothing.
    """
    if settings.readout == "reply":
        return logits.new_zeros(len(logits), dtype=torch.long)
    return option_scores(decoding, logits, options, settings).argmax(-1)


def tokens_read(options: OptionTokens, settings: ReadSettings) -> list[int] | None:
    """Return the tokens whose logits are read where a prompt ends; None for all."""
    return first_tokens(options.continuations) if settings.readout == "options" else None


def option_scores(
    decoding: Decoding,
    logits: Float[Tensor, "batch some"],
    options: OptionTokens,
    settings: ReadSettings,
    decide: bool = False,
) -> Float[Tensor, "batch option"]:
    """Return what P(option) is the softmax of, at the end of the prompt.

    With `decide`, no work goes into what cannot change the likeliest option.
    """
    if settings.readout != "options":
        return options.class_logits(logits)
    # Copies of the cache for branches may take as much again as the batch, twice.
    room, variants = 2 * settings.batch_tokens, options.continuations
    return option_log_probs(decoding, logits, variants, batch_tokens=room, decide=decide)


def read_from(
    decoding: Decoding,
    logits: Float[Tensor, "batch some"],
    options: OptionTokens,
    settings: ReadSettings,
    *,
    on_answer: Observer | None = None,
    decide: bool = False,
) -> Reading:
    """Read the answers of a batch whose prompts have been run, inside `hooked_pass`.

    `decoding` may be at any end of its prompts: of a first run, of a second, or a fork in which
    rows repeat; `logits` are of all tokens, or of `tokens_read` alone. With `decide`, no work goes
    into what cannot change the answer: under `options` probabilities are then too low, under
    `exact` a reply ends where it can be no answer any more.
    """
    if settings.decodes:
        kinds = {
            "exact": partial(_Beginning, decide=decide),
            "exact_anywhere": _Anywhere,
            "reply": _Whole,
        }
        found = kinds[settings.readout](options, len(logits), logits.device)
        tokens = _decode(decoding, logits, found, settings.n_new, on_answer)
        predictions, probs = found.result()
    else:
        probs = option_scores(decoding, logits, options, settings, decide).softmax(-1)
        predictions, tokens = probs.argmax(-1), logits.new_zeros(len(logits), 0, dtype=torch.long)
    counts = {name: getattr(decoding, name).cpu() for name in COUNTS}
    return Reading(predictions.cpu(), probs.cpu(), tokens.cpu(), **counts)


def _decode(
    decoding: Decoding,
    logits: Float[Tensor, "batch d_vocab"],
    found: "_Anywhere | _Beginning | _Whole",
    max_new_tokens: int,
    on_answer: Observer | None,
) -> Int[Tensor, "batch new"]:
    """Decode greedily until every row's reply is over, has ended, or has run out of tokens."""
    tokens = decoding.rows.new_full((len(logits), max_new_tokens), -1)
    for step in range(max_new_tokens):
        emitted = logits.argmax(-1)
        tokens[decoding.rows, step] = emitted
        hit, over = found.add(decoding.rows, emitted, logits)
        going = ~over & ~decoding.is_end(emitted)
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
    return tokens


_Found = tuple[Int[Tensor, " batch"], Float[Tensor, "batch option"]]
"""Predictions and probabilities."""
_Rows = Int[Tensor, " row"]
_Logits = Float[Tensor, "row d_vocab"]
_HitAndOver = tuple[Bool[Tensor, " row"], Bool[Tensor, " row"]]
"""Where a token is the answer's, and where the reply is over."""


class _Whole:
    """Takes every token of a reply that is scored afterwards; until then it answers nothing."""

    def __init__(self, options: OptionTokens, n: int, device: torch.device) -> None:
        self._ends = torch.tensor(options.ends, dtype=torch.long, device=device)
        self._nothing = torch.zeros(n, len(options.options), device=device)

    def add(self, rows: _Rows, emitted: _Rows, logits: _Logits) -> _HitAndOver:  # noqa: ARG002
        """Take a token of every row: each is the reply's, but the one that ends it."""
        hit = ~torch.isin(emitted, self._ends)
        return hit, torch.zeros_like(hit)

    def result(self) -> _Found:
        """Return that nothing has been answered."""
        return torch.full_like(self._nothing[:, 0], -1, dtype=torch.long), self._nothing


class _Anywhere:
    """Takes the first generated token that is a variant of an option, and stops there."""

    def __init__(self, options: OptionTokens, n: int, device: torch.device) -> None:
        self._options = options
        self._predictions = torch.full((n,), -1, device=device)
        self._probs = torch.zeros(n, len(options.options), device=device)

    def add(self, rows: _Rows, emitted: _Rows, logits: _Logits) -> _HitAndOver:
        """Take a token of every row; return where it is the answer's, and where replies end."""
        answer = self._options.option_of(emitted)
        hit = answer >= 0
        self._predictions[rows[hit]] = answer[hit]
        self._probs[rows[hit]] = self._options.class_logits(logits[hit]).softmax(-1)
        return hit, hit

    def result(self) -> _Found:
        """Return what has been found."""
        return self._predictions, self._probs


class _Beginning:
    """Takes a reply's first word for its answer if that is an option and nothing denies it."""

    def __init__(
        self, options: OptionTokens, n: int, device: torch.device, *, decide: bool
    ) -> None:
        self._options, self._decide = options, decide
        self._tokens: list[list[int]] = [[] for _ in range(n)]
        self._texts = [""] * n
        self._first = torch.full((n,), -torch.inf, device=device)
        """The logit of the token that began the first word."""
        self._classes = torch.full((n, len(options.options)), -torch.inf, device=device)
        """The options' logits beside it."""

    def add(self, rows: _Rows, emitted: _Rows, logits: _Logits) -> _HitAndOver:
        """Take a token of every row; return where it begins a word, and where replies end."""
        places = rows.tolist()
        for row, token in zip(places, emitted.tolist(), strict=True):
            self._tokens[row].append(token)
        tokens = [self._tokens[row] for row in places]
        texts = self._options.texts(tokens)
        begun = []
        for row, text in zip(places, texts, strict=True):
            before, self._texts[row] = self._texts[row], text
            words = [has_begun(each, self._options.options) for each in (before, text)]
            begun.append(words == [False, True])
        hit = torch.tensor(begun, device=rows.device)
        here = rows[hit]
        self._first[here] = logits[hit].gather(1, emitted[hit, None])[:, 0].float()
        self._classes[here] = self._options.class_logits(logits[hit])
        known = self._options.options
        over = [is_over(t) or (self._decide and is_no_answer(t, known)) for t in texts]
        return hit, torch.tensor(over, device=rows.device)

    def result(self) -> _Found:
        """Return what the replies say, and P(option) at the token that began the answer."""
        said = [answered_option(text, self._options.options) for text in self._texts]
        predictions = torch.tensor(said, device=self._first.device)
        answered = (predictions >= 0).nonzero()[:, 0]
        own = predictions[answered]
        # The emitted token is one more variant of the option that it began, e.g. '"Sp' of spam.
        classes = self._classes[answered]
        best = classes.gather(1, own[:, None])[:, 0].maximum(self._first[answered])
        classes = classes.scatter(1, own[:, None], best[:, None])
        probs = torch.zeros_like(self._classes)
        probs[answered] = classes.softmax(-1)
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
