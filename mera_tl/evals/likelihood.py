"""How likely a model finds a continuation, steered or not, in batches of any size."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mera_tl.inference.answers import ReadSettings
from mera_tl.inference.decoding import Window, hooked_pass, left_pad
from mera_tl.inference.evaluation import run_batches
from mera_tl.inference.variants import OptionTokens
from mera_tl.models.hooks import FwdHooks
from mera_tl.models.model import Model, is_finite
from mera_tl.steering.attach import unsteered_answers


@dataclass(frozen=True)
class Continuation:
    """Tokens of a context and of what is to follow it; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def fed(self, n_ctx: int) -> list[int]:
        """Return the tokens that the model reads: the last that fit, without the very last."""
        return [*self.context, *self.continuation][-(n_ctx + 1) :][:-1]


def log_likelihoods(
    model: Model,
    pairs: Sequence[Continuation],
    hooks: FwdHooks = (),
    *,
    options: OptionTokens | None = None,
    settings: ReadSettings | None = None,
) -> list[tuple[float, bool]]:
    """Return each continuation's log-likelihood, and whether greedy decoding would say it.

    The context is the prompt, the continuation what is generated: hooks see both as they would
    while decoding, in one pass.

    Raises:
        ValueError: if a continuation is longer than the model's context.
    """
    for pair in pairs:
        if len(pair.continuation) > model.n_ctx:
            raise ValueError(
                f"A continuation of {len(pair.continuation)} tokens exceeds the {model.n_ctx} of "
                f"{model.name}; split it."
            )
    fed = [pair.fed(model.n_ctx) for pair in pairs]

    def run(batch: list[int]) -> list[tuple[float, bool]]:
        rows = [(fed[i], pairs[i].continuation) for i in batch]
        return _score(model, rows, hooks, options)

    results = run_batches(fed, run, settings or ReadSettings(), "log-likelihoods")
    by_index = {i: value for batch, some in results for i, value in zip(batch, some, strict=True)}
    return [by_index[i] for i in range(len(pairs))]


def _score(
    model: Model,
    rows: Sequence[tuple[list[int], tuple[int, ...]]],
    hooks: FwdHooks,
    options: OptionTokens | None,
) -> list[tuple[float, bool]]:
    tokens, mask = left_pad([fed for fed, _ in rows], model.device)
    width, lengths = tokens.shape[1], [len(continuation) for _, continuation in rows]
    # The last token of a continuation is predicted, not fed.
    ends = torch.tensor([width - n + 1 for n in lengths])
    answers = None
    if any(getattr(hook, "per_answer", False) for _, hook in hooks):
        assert options is not None
        contexts = [
            tuple(fed[: len(fed) - n + 1]) for (fed, _), n in zip(rows, lengths, strict=True)
        ]
        answers = unsteered_answers(model, contexts, options)
    window = Window(mask.bool(), int(ends.max()), answers, ends=ends)
    with torch.inference_mode(), hooked_pass(model, hooks):
        for name, _ in hooks:
            model.hooked.hook_dict[name].ctx["window"] = window
        logits = model.hooked(tokens, attention_mask=mask)
        parts = [row[width - n :] for row, n in zip(logits, lengths, strict=True)]
        if not all(map(is_finite, parts)):
            raise ValueError(
                f"{model.name} gives log-likelihoods that are not finite: check its weights, or a "
                "steering that is too strong."
            )
    pairs = zip(parts, rows, strict=True)
    return [_of_row(part, continuation) for part, (_, continuation) in pairs]


def _of_row(
    logits: Float[Tensor, "pos d_vocab"], continuation: Sequence[int]
) -> tuple[float, bool]:
    wanted = torch.tensor(continuation, device=logits.device)
    chosen = logits.float().log_softmax(-1).gather(1, wanted[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())
