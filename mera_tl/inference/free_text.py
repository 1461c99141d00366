"""What steering does to free text: continuations of the same prompts, steered and not.

A method that answers better by breaking the model is no good. Prompts are continued greedily
without looking for an answer; perplexity is the *unsteered* model's on the continuation, and
repetition shows as a low share of distinct n-grams.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mera_tl.inference.answers import (
    ReadSettings,
    answer_known,
    option_tokens,
    read_from,
)
from mera_tl.inference.decoding import Decoding, hooked_pass, left_pad
from mera_tl.inference.evaluation import run_batches, tokenize_task
from mera_tl.inference.outcomes import Outcomes
from mera_tl.models.model import FwdHooks, Model
from mera_tl.tasks.task import Task


@dataclass(frozen=True)
class FreeText:
    """Continuations of a task's prompts, summed up."""

    n_tokens: int
    """Tokens generated over all prompts, without padding."""
    perplexity: float
    """Of the continuations under the unsteered model, per token; NaN where there is none."""
    distinct_1: float
    """Share of tokens that are different, within a continuation, averaged."""
    distinct_2: float
    """Share of token pairs that are different, within a continuation, averaged."""


def free_text(
    model: Model,
    task: Task[Any],
    fwd_hooks: FwdHooks = (),
    *,
    n_new: int = 24,
    settings: ReadSettings | None = None,
) -> FreeText:
    """Continue every prompt of a task under hooks, greedily, for at most `n_new` tokens.

    Raises:
        ValueError: as `evaluate`; prompt and continuation must fit the context.
    """
    settings = ReadSettings.of(task, settings)
    freely = replace(settings, readout="reply", reply_tokens=n_new, answer_prefix=None)
    prompts, options = tokenize_task(model, task, freely), option_tokens(model, task, freely)
    asked = option_tokens(model, task, settings)

    def run(batch: list[int]) -> list[list[int]]:
        with torch.inference_mode(), hooked_pass(model, fwd_hooks):
            decoding = Decoding(model, [prompts[i] for i in batch], fwd_hooks)
            logits = answer_known(decoding, decoding.prompt(), asked, settings, fwd_hooks)
            rows = read_from(decoding, logits, options, freely).tokens.tolist()
        return [row[: row.index(-1)] if -1 in row else row for row in rows]

    results = run_batches(prompts, run, settings, "free text")
    pairs = [(i, text) for batch, said in results for i, text in zip(batch, said, strict=True)]
    logs = [log for i, text in pairs for log in _log_probs(model, prompts[i], text)]
    return _measured([text for _, text in pairs], logs)


def reply_text(
    model: Model,
    task: Task[Any],
    outcomes: Outcomes,
    *,
    settings: ReadSettings | None = None,
    most: int = 100,
) -> FreeText:
    """Measure replies that have been given, at most `most` of them: whether they are still text.

    Perplexity is the unsteered model's after the task's own prompts, whatever the reply was made
    by.
    """
    some = range(min(most, len(task)))
    prompts = tokenize_task(model, task.subset(some), ReadSettings.of(task, settings))
    texts = [
        model.tokenizer(r or "", add_special_tokens=False)["input_ids"]
        for r in outcomes.replies[:most]
    ]
    logs = [
        log
        for start, text in zip(prompts, texts, strict=True)
        for log in _log_probs(model, start, text)
    ]
    return _measured(texts, logs)


def _measured(texts: Sequence[Sequence[int]], logs: Sequence[float]) -> FreeText:
    perplexity = float(torch.tensor(logs).double().mean().neg().exp())
    return FreeText(len(logs), perplexity, _distinct(texts, 1), _distinct(texts, 2))


def _log_probs(model: Model, start: Sequence[int], text: Sequence[int]) -> list[float]:
    """Return the unsteered model's log-probability of each token of a continuation."""
    if not text:
        return []
    tokens, mask = left_pad([[*start, *text]], model.device)
    with torch.inference_mode():
        logits = model.hooked(tokens, attention_mask=mask)[0, -len(text) - 1 : -1]
    chosen = logits.float().log_softmax(-1).gather(1, tokens[0, -len(text) :, None])
    return chosen[:, 0].tolist()


def _distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    shares = []
    for text in texts:
        grams = list(zip(*(text[i:] for i in range(n)), strict=False))
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 1.0
