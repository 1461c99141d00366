"""Better replies without steering: ask again, or draw several and keep the best.

The baselines that steering of replies must beat. They cost what steering does not: generated
tokens, which are counted over all draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mera_tl import storage
from mera_tl.inference.activations import collect, reply_activations
from mera_tl.inference.answers import ReadSettings
from mera_tl.inference.evaluation import grade, tokenize_task
from mera_tl.inference.outcomes import Outcomes
from mera_tl.models.model import Model
from mera_tl.probes.probe import LinearProbe
from mera_tl.steering.generation import Sampling, reply_to, text_of
from mera_tl.tasks.scored import OPTIONS
from mera_tl.tasks.task import Task

RETRY_THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
"""Predicted errors above which a reply may be drawn again."""
PREDICTED = "predicted.safetensors"
TEMPERATURE = 0.7
"""Of the replies after the first, greedy one."""


@dataclass(frozen=True, eq=False)
class Draws:
    """Several replies to each prompt of a task, the first of them greedy."""

    outcomes: tuple[Outcomes, ...]
    predicted: Float[Tensor, "draw example"]
    """The predicted error of each reply, from the activations over its tokens."""

    def pick(
        self, draw: Int[Tensor, " example"], paid: Int[Tensor, " example"] | None = None
    ) -> Outcomes:
        """Return the outcomes of one draw each, at the cost of the first `paid` ones, or of all."""
        chosen = self.outcomes[0]
        for number, outcomes in enumerate(self.outcomes):
            rows = (draw == number).nonzero()[:, 0]
            chosen = chosen.with_rows(rows, outcomes.subset(rows))
        tokens = torch.stack([each.n_generated for each in self.outcomes])
        n_paid = torch.full_like(draw, len(tokens)) if paid is None else paid
        used = torch.arange(len(tokens))[:, None] < n_paid
        return replace(chosen, n_generated=(tokens * used).sum(0))

    def save(self, folder: Path) -> None:
        """Write the outcomes of each draw and, last, the predictions."""
        for number, outcomes in enumerate(self.outcomes):
            storage.write_records(folder / f"draw-{number}.jsonl", outcomes.to_records())
        storage.save_tensors(folder / PREDICTED, {"predicted": self.predicted})

    @classmethod
    def load(cls, folder: Path) -> "Draws":
        """Read what `save` wrote.

        Raises:
            ValueError: if a file is missing or damaged.
        """
        predicted = storage.load_tensors(folder / PREDICTED)["predicted"]
        records = (storage.read_records(folder / f"draw-{i}.jsonl") for i in range(len(predicted)))
        return cls(tuple(Outcomes.from_records(each, OPTIONS) for each in records), predicted)

    def retried(self, threshold: float) -> Outcomes:
        """Return the second reply where the first one's predicted error exceeds a threshold."""
        again = (self.predicted[0] > threshold).long()
        return self.pick(again, again + 1)

    def best(self) -> Outcomes:
        """Return the reply with the least predicted error of each."""
        return self.pick(self.predicted.argmin(0))

    def best_scored(self) -> Outcomes:
        """Return the reply with the best score of each, which only the scorer knows."""
        return self.pick(torch.stack([each.error for each in self.outcomes]).argmin(0))


def draw_replies(
    model: Model, task: Task[Any], probe: LinearProbe, n_draws: int, *, settings: ReadSettings
) -> Draws:
    """Reply to every prompt greedily and then by samples, and predict the error of each reply.

    `probe` reads the mean activation over a reply (position `generated`) at its best layer; of a
    reply without a token, which it cannot read, an error is certain.

    Raises:
        ValueError: as `evaluate`.
    """
    first = collect(model, task, settings=settings)
    outcomes = [first.outcomes]
    predicted = [_predicted(probe, first.resid("generated"), first.outcomes)]
    prompts = tokenize_task(model, task, ReadSettings.of(task, settings))
    for number in range(1, n_draws):
        sampling = Sampling(settings.reply_tokens, TEMPERATURE, seed=1000 * number)
        rows = reply_to(model, prompts, (), sampling, settings=settings, is_traced=False)
        texts = tuple(text_of(model, row, sampling) for row in rows)
        n_generated = torch.tensor([len(row.tokens) + row.is_ended for row in rows])
        ended = [row.is_ended for row in rows]
        drawn = replace(first.outcomes, replies=texts)
        outcomes.append(grade(task, drawn, n_generated, ended))
        tokens: Sequence[Sequence[int]] = [row.tokens for row in rows]
        resid = reply_activations(model, prompts, tokens, settings=settings)
        predicted.append(_predicted(probe, resid, outcomes[-1]))
    return Draws(tuple(outcomes), torch.stack(predicted))


def _predicted(
    probe: LinearProbe, resid: Float[Tensor, "layer example d_model"], outcomes: Outcomes
) -> Float[Tensor, " example"]:
    return torch.where(outcomes.spoken, probe.predicted_error(resid)[probe.best_layer], 1.0)
