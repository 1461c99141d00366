"""Search how to steer free replies, on training data alone.

Candidates differ in direction, layer, strength, in how much of the reply they move (the final
prompt token, the first so many generated tokens, or all) and in whether a probe of failure must
first agree: one of the final prompt token or, at every generated token, one of replies. Every
trial is a reply that is generated and scored, which costs a hundred times what an option costs, so
few are tried: all on a handful of prompts, the better ones on more, the best on all.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mera_tl.inference.activations import Activations, prompt_activations, reply_activations
from mera_tl.inference.answers import ReadSettings
from mera_tl.inference.evaluation import tokenize_task
from mera_tl.inference.outcomes import Metric
from mera_tl.methods.candidates import Candidate, ProbeSet, SearchData
from mera_tl.methods.race import Search, divide, require_training
from mera_tl.methods.trials import Trial, TrialStore, choose, tabulate
from mera_tl.models.model import FwdHooks, Model
from mera_tl.probes.fitting import fit_error_probe
from mera_tl.probes.metrics import auroc, auroc_within
from mera_tl.probes.probe import LinearProbe
from mera_tl.steering.directions import Direction, fit_direction, instruction, prompt_controlled
from mera_tl.steering.generation import Sampling, reply_to, text_of
from mera_tl.steering.rules import Gated
from mera_tl.steering.steering import Positions, Steering
from mera_tl.tasks.task import Task, Train

logger = logging.getLogger(__name__)

DIRECTIONS = ("instruction", "prompt_controlled", "kind_controlled", "contrastive")
"""What free replies may be moved along."""
SMALL = 8
"""Layers up to which a model is small enough to try every one."""
PENALTY = 3.0
"""Of the ridge probe of failure."""


class NoDirection(ValueError):
    """Replies are all right, or all wrong, and no prompt has an instruction: nothing to learn."""


@dataclass(frozen=True)
class ReplyChoices:
    """What is searched over, and how."""

    directions: tuple[str, ...] = DIRECTIONS
    layers: tuple[int, ...] | None = None
    """Layers, each tried alone; None is about five between a quarter and two thirds of the depth,
    where a reply is not decided yet and no longer mere words, and all of a small model."""
    strengths: tuple[float, ...] = (0.75, 1.5, 3.0)
    """How many directions to move."""
    positions: tuple[Positions, ...] = ("final", "last")
    first_k: tuple[int, ...] = (4,)
    """Numbers of generated tokens to which the best candidates at `last` are also kept."""
    gates: tuple[float, ...] = (0.5,)
    """Predicted errors above which the best candidates are also tried."""
    watching: tuple[float, ...] = (0.5,)
    """The same of a gate that opens at every generated token anew, in place of `last`."""
    rounds: tuple[tuple[int, int], ...] = ((10**9, 8), (6, 10**9))
    """How many candidates see how many judging prompts, round by round."""
    search_share: float = 0.4
    """Share of the training examples that judge; the others fit."""
    n_draws: int = 4
    """Sampled replies per prompt, for `prompt_controlled`."""
    temperature: float = 0.7
    """Of those."""
    min_mixed: int = 5
    """Prompts with right and wrong replies below which replies are also sampled from the model
    steered along `instruction`."""
    metric: Metric = "correct"
    caution: float = 1.0
    """Standard errors that are subtracted from a candidate's mean gain."""
    budget: float | None = None
    """Kept for the search's file; replies are searched to the end."""
    seed: int = 0

    def layers_of(self, n: int) -> tuple[int, ...]:
        """Return the layers of a model with so many that are tried."""
        inner = range(n // 4, 2 * n // 3, max(1, n // 10))
        return self.layers or tuple(inner if n > SMALL else range(n))


def search_replies(
    model: Model,
    task: Task[Train],
    activations: Activations,
    *,
    choices: ReplyChoices | None = None,
    settings: ReadSettings | None = None,
    folder: str | Path | None = None,
) -> Search:
    """Choose how to steer the replies to a scored task.

    The choice promises nothing: `calibrate` its steering.

    Raises:
        NoDirection: a ValueError, if there is nothing to learn a direction from.
        ValueError: if the task has no scorer or is no training split, or the activations are not
            its own.
    """
    choices, settings = choices or ReplyChoices(), ReadSettings.of(task, settings)
    require_training(task, activations)
    activations.check(model, settings)
    if not task.scored:
        raise ValueError(f"{task.name} has options and no scorer; use `search` for it.")
    fit, judge = divide(task, choices.search_share, choices.seed)
    learned, held_out = (activations.subset(torch.tensor(part)) for part in (fit, judge))
    quiet = replace(settings, progress=False)
    told: dict[str, Any] = {"kind": "ridge", "penalty": PENALTY, "seed": choices.seed}
    probe = fit_error_probe(learned, **told)
    directions = fit_reply_directions(model, task.subset(fit), learned, choices, quiet)
    # A score is linear: over a reply's tokens it is on average that of their mean.
    generated = probe_of_replies(learned, **told)
    if generated is None:
        choices = replace(choices, watching=())
    sets: Mapping[float | None, ProbeSet] = {PENALTY: ProbeSet(probe, directions, generated)}
    data = SearchData(model, task.subset(judge), held_out, sets, choices.metric, quiet)
    store = TrialStore.open(folder, data, choices)
    candidates = _list_candidates(choices, tuple(directions), model.n_layers)
    trials = _race(data, candidates, choices, store)
    chosen = choose(trials, choices.caution)
    details: dict[str, Any] = {"n_fit": len(fit), "n_search": len(judge)}
    details |= {"notes": directions[chosen.direction].notes}
    details |= _reading(data, chosen)
    return Search(chosen, data.steering(chosen), tabulate(trials, choices.caution), details)


def probe_of_replies(activations: Activations, **told: Any) -> LinearProbe | None:
    """Fit a probe of replies; None where hardly any has a token."""
    try:
        return fit_error_probe(activations, position="generated", **told)
    except ValueError as error:
        logger.info("Replies themselves are not read: %s", error)
        return None


def _list_candidates(choices: ReplyChoices, kinds: Sequence[str], n_layers: int) -> list[Candidate]:
    """List what the first round tries; a threshold of 0 asks no probe."""
    ways = product(kinds, choices.layers_of(n_layers), choices.positions, choices.strengths)
    return [Candidate(kind, PENALTY, (at,), where, 0.0, size) for kind, at, where, size in ways]


def _variants(best: Sequence[Candidate], choices: ReplyChoices) -> list[Candidate]:
    """Return candidates with a gate, or kept to the beginning of the reply."""
    late = [each for each in best if each.positions == "last"]
    spoken = [replace(each, positions="generated") for each in late]
    return [
        *(replace(each, threshold=gate) for gate in choices.gates for each in best),
        *(replace(each, first_k=k) for k in choices.first_k for each in late),
        *(replace(each, threshold=gate) for gate in choices.watching for each in spoken),
    ]


def planned_replies(choices: ReplyChoices, n_layers: int, n_train: int) -> int:
    """Return how many replies a search along one direction generates, sampling left out."""
    parts = (choices.layers_of(n_layers), choices.positions, choices.strengths)
    n, seen, total = len(list(product(*parts))), 0, 0
    for keep, until in choices.rounds:
        n, until = min(keep, n), min(until, round(choices.search_share * n_train))
        total, seen = total + n * (until - seen), until
    return total


def _race(
    data: SearchData, candidates: Sequence[Candidate], choices: ReplyChoices, store: TrialStore
) -> list[Trial]:
    """Try all on a few prompts, fewer on more; gates come in before the last round."""
    generator = torch.Generator().manual_seed(choices.seed)
    order = torch.randperm(len(data.task), generator=generator).tolist()
    field, seen = list(candidates), 0
    for number, (keep, n) in enumerate(choices.rounds):
        # What has been seen so far: a search that goes on may know more, and must choose the same.
        trials = [store.trial(each, order[:seen]) for each in field]
        if seen:
            trials.sort(key=lambda each: -each.value(choices.caution))
        field = [each.candidate for each in trials[:keep]]
        if number + 1 == len(choices.rounds):
            field += _variants(field[: max(1, keep // 2)], choices)
            field = list(dict.fromkeys(field))
        until = min(n, len(order))
        known = [each for each in field if each in store.gains]
        for some, start in ((known, seen), ([e for e in field if e not in known], 0)):
            lacking = [each for each in some if store.lacks(each, order[:until])]
            if lacking:
                store.add(lacking, data.gains(lacking, order[start:until]))
                store.save(0.0)
        seen = until
    return [store.trial(each) for each in store.gains]


def _reading(data: SearchData, chosen: Candidate) -> dict[str, float | None]:
    """Say how well failures are read: within kinds of question and, less telling, over all.

    None where all replies that could be compared are right, or all are wrong.
    """
    probe: LinearProbe = data.steering(chosen).probe
    score = probe.score(data.activations.resid(probe.position))[chosen.layers[0]]
    wrong, kinds = ~data.base.correct, [example.kind for example in data.task.examples]
    within = auroc_within(score, wrong, kinds)
    values = {"probe_auroc_within_kind": within, "probe_auroc": float(auroc(score, wrong))}
    return {n: None if math.isnan(value) else round(value, 3) for n, value in values.items()}


# --- directions ----------------------------------------------------------------------------------


def fit_reply_directions(
    model: Model,
    task: Task[Any],
    activations: Activations,
    choices: ReplyChoices,
    settings: ReadSettings,
) -> dict[str, Direction]:
    """Find the directions that are asked for and can be had; the others are left out.

    `instruction` takes an instruction on every prompt, the others right and wrong replies, and
    `kind_controlled` kinds of question that have both.

    Raises:
        NoDirection: a ValueError, if none can be had.
    """
    found: dict[str, Direction] = {}
    given = activations.resid("last")
    probe = fit_error_probe(activations, kind="ridge", penalty=PENALTY, seed=choices.seed)
    instructed = all(example.instruction for example in task.examples)
    toward: Direction | None = None
    if instructed and {"instruction", "prompt_controlled"} & set(choices.directions):
        without = prompt_activations(model, task.without_instruction(), settings=settings)
        toward = Direction("instruction", instruction(without, given))
    if toward is not None and "instruction" in choices.directions:
        found["instruction"] = toward
    if "contrastive" in choices.directions:
        found["contrastive"] = fit_direction(activations, probe, "contrastive")
    kinds = [example.kind for example in task.examples]
    if "kind_controlled" in choices.directions and all(kinds):
        found["kind_controlled"] = _within_kinds(activations, kinds, probe)
    if "prompt_controlled" in choices.directions:
        found["prompt_controlled"] = _controlled(model, task, probe, toward, choices, settings)
    usable = {kind: each for kind, each in found.items() if bool((each.vectors != 0).any())}
    if not usable:
        notes = "; ".join(note for each in found.values() for note in each.notes)
        other = instructed and "instruction" not in choices.directions
        advice = ("use the method" if other else "give the task an") + " `instruction`"
        raise NoDirection(
            f"No direction of {', '.join(choices.directions)} can be had on {task.name} "
            f"({notes or 'its prompts have no instruction'}); take examples with right "
            f"and wrong replies, or {advice}."
        )
    return usable


def _within_kinds(activations: Activations, kinds: Sequence[str], probe: LinearProbe) -> Direction:
    """Compare wrong with right replies to questions of the same kind, as within a true class."""
    names = tuple(dict.fromkeys(kinds))
    place = torch.tensor([names.index(kind) for kind in kinds])
    said = torch.where(activations.correct, place, -1)
    by_kind = {"options": names, "labels": place, "predictions": said}
    probs = torch.zeros(len(kinds), len(names))
    outcomes = replace(activations.outcomes, probs=probs, **by_kind)
    found = fit_direction(replace(activations, outcomes=outcomes), probe, "controlled_contrastive")
    return replace(found, kind="kind_controlled")


def _controlled(
    model: Model,
    task: Task[Any],
    probe: LinearProbe,
    toward: Direction | None,
    choices: ReplyChoices,
    settings: ReadSettings,
) -> Direction:
    """Sample replies, and again from the model steered toward the instruction if few are mixed."""
    hooks: FwdHooks = ()
    resid, prompt, wrong = _draws(model, task, hooks, choices, settings)
    notes, n_mixed = [], _n_mixed(prompt, wrong)
    if n_mixed < choices.min_mixed and toward is not None:
        rule, middle = Gated(limit=-torch.inf), model.n_layers // 3
        steering = Steering(probe, toward.vectors, rule, layers=(middle,), positions="last")
        more = _draws(model, task, steering.fwd_hooks(), choices, settings)
        resid = torch.cat([resid, more[0]], dim=1)
        prompt, wrong = torch.cat([prompt, more[1]]), torch.cat([wrong, more[2]])
        notes.append(f"{n_mixed} mixed prompts unsteered; sampled steered too")
        n_mixed = _n_mixed(prompt, wrong)
    notes.append(f"{n_mixed} of {len(task)} prompts have right and wrong replies")
    return Direction("prompt_controlled", prompt_controlled(resid, prompt, wrong), tuple(notes))


def _n_mixed(prompt: Tensor, wrong: Tensor) -> int:
    return len(set(prompt[wrong].tolist()) & set(prompt[~wrong].tolist()))


def _draws(
    model: Model, task: Task[Any], hooks: FwdHooks, choices: ReplyChoices, settings: ReadSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample replies to every prompt: activations unsteered, the prompt's number, if it is wrong.

    A draw has the same random numbers under any hooks, so what differs is due to these. Only
    prompts with both outcomes are read: the others weigh nothing.
    """
    prompts = tokenize_task(model, task, settings)
    sampling = Sampling(settings.reply_tokens, choices.temperature, choices.seed)
    number = torch.arange(len(task)).repeat_interleave(choices.n_draws)
    copies = [prompts[place] for place in number.tolist()]
    rows = reply_to(model, copies, hooks, sampling, settings=settings, is_traced=False)
    drawn = zip(number.tolist(), rows, strict=True)
    scores = [task.examples[place].score(text_of(model, row, sampling)) for place, row in drawn]
    wrong = torch.tensor(scores) < 1
    mixed = set(number[wrong].tolist()) & set(number[~wrong].tolist())
    kept = [i for i, place in enumerate(number.tolist()) if place in mixed]
    replies = [rows[i].tokens for i in kept]
    resid = reply_activations(model, [copies[i] for i in kept], replies, settings=settings)
    return resid, number[kept], wrong[kept]
