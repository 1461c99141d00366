"""Paired gains of a steering over a grid of thresholds, and the calibration that rests on them.

The grid is cheap and exact. One unsteered pass reads every example's highest score; an example
whose score never exceeds a limit cannot be moved at it, so its outcome is known. A steering that
acts from the final prompt token on shares the cache of all that comes before: each prompt is run
once, each threshold costs the final token and the answer.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from mera_tl.certificate.certificate import Calibration
from mera_tl.certificate.decision import certify
from mera_tl.certificate.terms import Protocol
from mera_tl.inference.answers import Reading, ReadSettings, option_tokens, read_again
from mera_tl.inference.decoding import Decoding, hooked_pass
from mera_tl.inference.evaluation import evaluate, gather, run_batches, tokenize_task
from mera_tl.inference.outcomes import Outcomes
from mera_tl.inference.progress import is_watched
from mera_tl.models.model import Model
from mera_tl.steering.rules import Additive
from mera_tl.steering.steering import Steering
from mera_tl.tasks.task import Calibration as CalibrationRole
from mera_tl.tasks.task import Task


def calibrate(
    model: Model,
    task: Task[CalibrationRole],
    steering: Steering,
    *,
    min_gain: float = 0.0,
    delta: float = 0.05,
    protocol: Protocol | None = None,
    settings: ReadSettings | None = None,
    after: Calibration | None = None,
) -> Calibration:
    """Steer held-out examples at every threshold, and certify one of them or abstain.

    `after` is an earlier certificate that abstained: this look takes what it left of delta.
    `delta` is short for `Protocol(delta=delta)`; a `protocol` given says it itself. Where its knob
    is `strength`, the grid is of fixed shifts instead of thresholds.

    Raises:
        ValueError: if the task is not a calibration split, or as `evaluate` and `certify`.
    """
    if task.role != "calibration":
        raise ValueError(
            f"A certificate needs the calibration split, got the {task.role} split of {task.name}; "
            "pass task.split(...).calibration."
        )
    protocol = protocol or Protocol(delta=delta)
    grid = threshold_grid if protocol.knob == "threshold" else strength_grid
    base, runs = grid(model, task, steering, protocol.thresholds, settings=settings)
    gains = np.stack([run.gain(base, protocol.metric).numpy() for run in runs])
    decision = certify(
        gains,
        protocol.thresholds,
        protocol=protocol,
        min_gain=min_gain,
        examples=[example.row for example in task.examples],
        after=after,
    )
    unsteered = base.accuracy if protocol.metric == "correct" else base.mean_error
    return replace(decision, base=unsteered)


def threshold_grid(
    model: Model,
    task: Task[Any],
    steering: Steering,
    thresholds: Sequence[float],
    *,
    settings: ReadSettings | None = None,
) -> tuple[Outcomes, list[Outcomes]]:
    """Return the unsteered outcomes and those at every threshold, in the order given."""
    settings = settings or ReadSettings()
    # An infinite limit moves nothing, bit for bit, while its hooks read every score.
    if steering.positions != "all":
        steerings = [steering.at(threshold) for threshold in thresholds]
        first, *others = _after_the_prompt(model, task, steering, steerings, settings)
        return first, others
    base = evaluate(model, task, steering.reading_hooks(), settings=settings, title="unsteered")
    quiet = replace(settings, progress=False)
    runs = []
    for threshold in tqdm(
        thresholds, desc="thresholds", disable=not (settings.progress and is_watched())
    ):
        steered = steering.at(threshold)
        reached = (base.peak > steered.limit).nonzero()[:, 0]
        if not len(reached):
            runs.append(base)
            continue
        subset = task.subset(reached.tolist())
        run = evaluate(model, subset, steered.fwd_hooks(), settings=quiet)
        runs.append(base.with_rows(reached, run))
    return base, runs


def _after_the_prompt(
    model: Model,
    task: Task[Any],
    reader: Steering,
    steerings: Sequence[Steering],
    settings: ReadSettings,
) -> list[Outcomes]:
    """Return unsteered outcomes, then those of steerings that leave the prompt alone."""
    options = option_tokens(model, task.options)
    prompts = tokenize_task(model, task, settings)
    plans = [(reader.reading_hooks(), math.inf)]
    plans += [(steering.fwd_hooks(), steering.limit) for steering in steerings]

    def run(batch: list[int]) -> list[Reading]:
        with torch.inference_mode(), hooked_pass(model, ()):
            decoding = Decoding(model, [prompts[i] for i in batch], ())
            answers = options.class_logits(decoding.prompt()).argmax(-1)
        readings: list[Reading] = []
        for hooks, limit in plans:
            reached = torch.arange(len(batch))
            if readings:
                reached = (readings[0].peak > limit).nonzero()[:, 0]
            if not len(reached):
                readings.append(readings[0])
                continue
            rows = reached.to(answers.device)
            read = read_again(decoding, rows, options, settings, hooks, answers=answers[rows])
            readings.append(readings[0].with_rows(reached, read) if readings else read)
        return readings

    results = run_batches(prompts, run, settings, "thresholds")
    return [
        gather(task, options, [(batch, readings[k]) for batch, readings in results])
        for k in range(len(plans))
    ]


def strength_grid(
    model: Model,
    task: Task[Any],
    steering: Steering,
    strengths: Sequence[float],
    *,
    settings: ReadSettings | None = None,
) -> tuple[Outcomes, list[Outcomes]]:
    """Return the unsteered outcomes and those of fixed shifts of every strength."""
    settings = settings or ReadSettings()
    steerings = [replace(steering, rule=Additive(strength)) for strength in strengths]
    if steering.positions != "all":
        first, *others = _after_the_prompt(model, task, steering, steerings, settings)
        return first, others
    base = evaluate(model, task, settings=settings, title="unsteered")
    runs = [
        evaluate(model, task, steered.fwd_hooks(), settings=settings, title="strengths")
        for steered in steerings
    ]
    return base, runs
