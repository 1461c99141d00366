"""Run a task through a model under hooks: one `Outcomes` per run.

Prompts are tokenized once, sorted by length, left-padded and decoded in batches. A batch that does
not fit into memory is halved, and so are all after it.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from mera_tl.inference.answers import (
    OptionTokens,
    Reading,
    ReadSettings,
    by_length,
    option_tokens,
    read_batch,
)
from mera_tl.inference.outcomes import COUNTS, Outcomes
from mera_tl.inference.prefix import Prefix, moves_none_before_the_last
from mera_tl.inference.progress import is_watched
from mera_tl.models.model import FwdHooks, Model
from mera_tl.tasks.task import Example, Splits, Task

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def evaluate(
    model: Model,
    task: Task[Any],
    fwd_hooks: FwdHooks = (),
    *,
    settings: ReadSettings | None = None,
    title: str = "evaluate",
) -> Outcomes:
    """Answer every example of a task under hooks, as `HookedTransformer.hooks(fwd_hooks=...)`.

    Hooks are pairs of a hook point's name and a function of the activation (batch, pos, d_model)
    and the hook, such as `steering.fwd_hooks()` gives; none: the unsteered model. The outcomes
    stand in the order of the examples, whatever the batches; `title` is the progress bar's.

    Raises:
        ValueError: if a prompt exceeds the context, options share tokens, or a hook matches
            nothing.
    """
    check_call(model, task, fwd_hooks)
    settings = ReadSettings.of(task, settings)
    options = option_tokens(model, task, settings)
    prompts = tokenize_task(model, task, settings)
    prefix = None
    if moves_none_before_the_last(fwd_hooks):
        prefix = Prefix.of(model, prompts, n_after(model, task, settings))

    def run(batch: list[int]) -> Reading:
        some = [prompts[i] for i in batch]
        return read_batch(model, some, options, settings, fwd_hooks, prefix=prefix)

    return gather(task, options, run_batches(prompts, run, settings, title))


def check_call(model: Any, task: Any, fwd_hooks: Any = ()) -> None:
    """Refuse what callers pass by mistake: a method that was not called, a value of another kind.

    Raises:
        ValueError: saying what was got and what is wanted.
    """
    check_model(model)
    check_task(task)
    check_hooks(fwd_hooks)
    check_answers(task.options, [hook for _, hook in fwd_hooks])


def check_answers(options: Sequence[str], steered: Sequence[Any]) -> None:
    """Refuse hooks or steerings that were made for another number of options."""
    for n in {getattr(each, "n_answers", None) for each in steered} - {None, len(options)}:
        raise ValueError(
            f"This steering is made for {n} options, a direction or a probe for each, but there "
            f"are {len(options)} ({', '.join(options)[:60]}); fit it on activations of this task."
        )


def check_model(model: Any) -> None:
    """Refuse what is no model of ours."""
    if not isinstance(model, Model):
        raise ValueError(
            f"{_kind(model)} is no model; pass what mera_tl.load_model(...) returns, as "
            'load_model("organism").'
        )


def check_task(task: Any) -> None:
    """Refuse what is no task."""
    if not isinstance(task, Task):
        advice = "one of its splits, as splits.train" if isinstance(task, Splits) else "a split"
        raise ValueError(
            f"{_kind(task)} is no task; pass {advice} of mera_tl.load_task(...).split()."
        )


def check_hooks(fwd_hooks: Any) -> None:
    """Refuse what is no list of hooks."""
    complaint = ""
    if hasattr(fwd_hooks, "fwd_hooks"):
        complaint = "is no list of hooks; pass its hooks, as steering.fwd_hooks()."
    elif callable(fwd_hooks):
        complaint = "was not called; pass the hooks that it returns, as steering.fwd_hooks()."
    elif not isinstance(fwd_hooks, Sequence):
        complaint = "is no list of hooks; pass pairs of a hook name and a function."
    if complaint:
        raise ValueError(f"{_kind(fwd_hooks)} {complaint}")
    hooks: Any = fwd_hooks
    for hook in hooks:
        if not (isinstance(hook, tuple | list) and len(hook) == 2 and callable(hook[1])):
            raise ValueError(
                f"{_kind(hook)} is no hook; pass pairs of a hook name and a function, as "
                "steering.fwd_hooks() returns them."
            )


def _kind(value: Any) -> str:
    """Show a value, shortly."""
    name = getattr(value, "__qualname__", "") if callable(value) else ""
    return f"The method {name}" if name else f"{value!r:.60}"


def run_batches(
    prompts: Sequence[Sequence[int]],
    run: Callable[[list[int]], Result],
    settings: ReadSettings,
    title: str,
) -> list[tuple[list[int], Result]]:
    """Run batches of prompt indices, longest first, halving the batch when memory runs out."""
    results: list[tuple[list[int], Result]] = []
    pending = list(by_length(prompts, settings))[::-1]
    hidden = not (settings.progress and is_watched())
    if settings.progress:
        logger.info("%s: %d prompt%s", title, len(prompts), "s" * (len(prompts) != 1))
    with tqdm(total=len(prompts), desc=title, disable=hidden) as bar:
        while pending:
            batch = pending.pop()
            try:
                results.append((batch, run(batch)))
                bar.update(len(batch))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error) or len(batch) == 1:
                    raise
                size = len(batch) // 2
                logger.warning(
                    "out of memory with %d prompts at once; going on with %d", len(batch), size
                )
                left = sorted(
                    (i for b in [batch, *pending] for i in b), key=lambda i: -len(prompts[i])
                )
                pending = [left[i : i + size] for i in range(0, len(left), size)][::-1]
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
    return results


def _is_out_of_memory(error: Exception) -> bool:
    said = any(words in str(error).lower() for words in ("out of memory", "can't allocate memory"))
    return said or isinstance(error, torch.OutOfMemoryError)


def gather(
    task: Task[Any], options: OptionTokens, results: Sequence[tuple[list[int], Reading]]
) -> Outcomes:
    """Put the readings of batches back into the order of the task; score replies.

    Raises:
        ValueError: if a scorer fails, naming the row and the reply.
    """
    order = torch.tensor([i for batch, _ in results for i in batch]).argsort()

    def column(name: str) -> Tensor:
        return torch.cat([getattr(reading, name) for _, reading in results])[order]

    counts: dict[str, Any] = {name: column(name) for name in COUNTS}
    outcomes = Outcomes(
        options=options.options,
        rows=torch.tensor([example.row for example in task.examples]),
        labels=torch.tensor(task.labels),
        predictions=column("predictions"),
        probs=column("probs").float(),
        replies=_texts(options, column("tokens")),
        **counts,
    )
    if not task.scored:
        return outcomes
    tokens, ends = column("tokens"), torch.tensor(options.ends, dtype=torch.long)
    return grade(task, outcomes, (tokens >= 0).sum(-1), torch.isin(tokens, ends).any(-1).tolist())


def grade(
    task: Task[Any], outcomes: Outcomes, n_generated: Int[Tensor, " example"], ended: Sequence[bool]
) -> Outcomes:
    """Score the replies of outcomes: P(right) is the score, and a reply is right if that is 1.

    Raises:
        ValueError: if a scorer fails, naming the row and the reply.
    """
    pairs = zip(task.examples, outcomes.replies, strict=True)
    score = torch.tensor([example.score(reply or "") for example, reply in pairs])
    return replace(
        outcomes,
        predictions=(score == 1).long(),
        probs=torch.stack([1 - score, score], dim=-1),
        finishes=tuple("stop" if end else "length" for end in ended),
        n_generated=n_generated,
    )


def _texts(options: OptionTokens, tokens: Int[Tensor, "example new"]) -> tuple[str | None, ...]:
    if not tokens.shape[1]:
        return (None,) * len(tokens)
    return tuple(options.texts([row[row >= 0].tolist() for row in tokens]))


def tokenize_task(model: Model, task: Task[Any], settings: ReadSettings) -> list[list[int]]:
    """Tokenize every prompt of a task and check it against the model's context.

    Raises:
        ValueError: naming the rows whose prompts are too long and cannot, or may not, be shortened.
    """
    prefix = settings.prefix(model)
    prompts = model.tokenize([example.prompt for example in task.examples], prefix=prefix)
    room = model.n_ctx - n_after(model, task, settings)
    long = [i for i, tokens in enumerate(prompts) if len(tokens) > room]
    if not settings.truncate and long:
        raise ValueError(
            f"{task.name} has {_rows(task, long)} of more than the {room} tokens for which "
            f"{model.name} has room (longest: {max(len(prompts[i]) for i in long)}); "
            "pass truncate (--truncate) to shorten their text, or leave them out."
        )
    for i in long:
        prompts[i] = _shorten(model, task.examples[i], room, prefix)
    fixed = [i for i in long if len(prompts[i]) > room]
    if fixed:
        raise ValueError(
            f"{task.name} has {_rows(task, fixed)} of more than the {room} tokens for which "
            f"{model.name} has room, even without the text; leave them out."
        )
    return prompts


def n_after(model: Model, task: Task[Any], settings: ReadSettings) -> int:
    """Return how many tokens may be fed after a prompt."""
    if settings.readout != "options":
        return settings.n_new if settings.decodes else 0
    variants = option_tokens(model, task, settings).continuations
    return max(len(ids) for option in variants for ids in option) - 1


def _rows(task: Task[Any], indices: list[int]) -> str:
    rows = ", ".join(str(task.examples[i].row) for i in indices[:8])
    s = "s" * (len(indices) > 1)
    return f"{len(indices)} prompt{s} (row{s} {rows}{', ...' if len(indices) > 8 else ''})"


def _shorten(model: Model, example: Example, room: int, prefix: str) -> list[int]:
    """Cut the end of an example's text, token by token as needed, until its prompt fits."""
    text = model.tokenizer(example.text, add_special_tokens=False)["input_ids"]
    tokens = model.tokenize([example.prompt], prefix=prefix)[0]
    while len(tokens) > room and text:
        text = text[: len(text) - (len(tokens) - room)] if len(tokens) - room < len(text) else []
        shorter = model.tokenizer.decode(text, clean_up_tokenization_spaces=False)
        tokens = model.tokenize([example.with_text(shorter).prompt], prefix=prefix)[0]
    return tokens
