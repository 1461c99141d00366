"""What a shift would do, to first order: one backward pass instead of a trial of every candidate.

For every judging example, the derivative of the true option's log-odds with respect to the residual
stream after each layer, at the final prompt token, times the shift that a candidate would make
there (attribution patching). Where replies are decoded, every token that begins no option is one
more answer: a shift may also make a model answer. It says which candidates are worth a trial, and
decides nothing.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mera_tl.inference.answers import OptionTokens, ReadSettings, option_scores, option_tokens
from mera_tl.inference.decoding import Decoding, hooked_pass
from mera_tl.inference.evaluation import run_batches, tokenize_task
from mera_tl.inference.outcomes import Metric, Outcomes
from mera_tl.inference.prefix import Prefix
from mera_tl.models.model import Model, resid_post
from mera_tl.steering.spaces import SAESpace
from mera_tl.steering.stack import Stack
from mera_tl.steering.steering import Steering
from mera_tl.tasks.task import Task

CERTAIN = 1e-4
"""A probability is taken no nearer to 0 or 1 than this: log-odds would be infinite."""


class Slopes(NamedTuple):
    """How the true option's probability stands, and what would move it."""

    gradients: Float[Tensor, "layer example d_model"]
    """Of log P(true option) with respect to the residual stream."""
    log_p: Float[Tensor, " example"]
    """log P(true option), unsteered."""


def log_odds_gradients(
    model: Model,
    task: Task[Any],
    resid: Float[Tensor, "layer example d_model"],
    settings: ReadSettings,
) -> Slopes:
    """Return the gradients of log P(true option) at the final prompt token, after each layer.

    `resid` is the unsteered residual stream there. Options of several tokens are scored whole: a
    shift of the final token reaches later ones through what they attend to. Of a decoded reply the
    first token is scored, against all that begin no option, too.
    """
    options = option_tokens(model, task, settings)
    prompts, labels = tokenize_task(model, task, settings), torch.tensor(task.labels)
    gradients, log_p = torch.zeros_like(resid), torch.zeros(len(prompts), dtype=torch.double)
    prefix = Prefix.of(model, prompts, 0)

    def run(batch: list[int]) -> None:
        rows = torch.arange(len(batch), device=model.device)
        shape = (len(batch), 1, model.d_model)
        leaves = [torch.zeros(shape, device=model.device, requires_grad=True) for _ in resid]

        def shifted(leaf: Tensor, resid: Tensor, hook: Any) -> Tensor:
            return resid if hook.ctx["window"].scores else resid + leaf.to(resid)

        hooks = [(resid_post(n), partial(shifted, leaf)) for n, leaf in enumerate(leaves)]
        with torch.no_grad(), hooked_pass(model, ()):
            decoding = Decoding(model, [prompts[i] for i in batch], (), prefix=prefix)
            decoding.prompt()
        with torch.enable_grad(), hooked_pass(model, hooks):
            fork = decoding.fork(rows, hooks)
            logits = fork.resume(0, resid[0, batch][:, None].to(model.device))
            scores = option_scores(fork, logits, options, settings)
            if settings.decodes:
                scores = torch.cat([scores, _no_option(logits, options)], dim=-1)
            true = labels[batch, None].to(scores.device)
            chosen = scores.log_softmax(-1).gather(1, true)[:, 0]
            chosen.sum().backward()
        log_p[batch] = chosen.detach().double().cpu()
        for layer, leaf in enumerate(leaves):
            if leaf.grad is not None:
                gradients[layer, batch] = leaf.grad[:, 0].float().cpu()

    run_batches(prompts, run, settings, "gradients")
    return Slopes(gradients, log_p)


def _no_option(
    logits: Float[Tensor, "row d_vocab"], options: OptionTokens
) -> Float[Tensor, "row 1"]:
    """Return the highest logit of the tokens that begin no option."""
    known = [token for tokens in options.tokens for token in tokens]
    rest = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    rest[known] = False
    return logits[:, rest].float().amax(-1, keepdim=True)


def foreseen_gains(
    steerings: Sequence[Steering],
    resid: Float[Tensor, "layer example d_model"],
    slopes: Slopes,
    base: Outcomes,
    metric: Metric,
) -> Float[Tensor, " steering"]:
    """Return the mean gain that each steering would have if its shifts acted to first order.

    All steerings are of one space. Of the metric `correct` the answer is taken to be right where
    P(true option) exceeds one half; the fall of the error breaks ties.
    """
    stack, answers = Stack(tuple(steerings)), base.predictions.clamp(min=0)
    change = torch.zeros(len(steerings), len(base))
    for number, layer in stack.layers.items():
        steps = layer.steps[:, answers if layer.steps.shape[1] > 1 else torch.zeros_like(answers)]
        if isinstance(layer.space, SAESpace):
            steps = layer.space.decode(steps, number).cpu()
        gradients = slopes.gradients[number]
        effect = einsum(gradients, steps, "example d, slot example d -> slot example")
        acting = (layer.slot >= 0).nonzero()[:, 0]
        slot = layer.slot[acting]
        score = layer.scores(resid[number][:, None], answers)[..., 0].cpu()[layer.reader[slot]]
        amount = torch.zeros_like(score)
        for place, rule in enumerate(layer.rules):
            these = layer.rule[acting] == place
            amount[these] = rule.amount(score[these])
        change[acting] += amount * effect[slot]
    p = slopes.log_p.exp().clamp(CERTAIN, 1 - CERTAIN)
    # d log-odds = d log P / (1 - P): log-odds bend less than P, which a large shift carries to 1.
    after = torch.sigmoid(torch.logit(p) + change.double() / (1 - p))
    fall = (after - p).mean(-1)
    if metric == "error":
        return fall
    return ((after > 0.5).double() - base.correct.double()).mean(-1) + 1e-3 * fall
