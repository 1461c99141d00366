"""The arms of `reading_is_not_steering`: from one search, each direction's own best, certified."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from mera_tl import Activations, Model, Outcomes, certify, evaluate
from mera_tl.certificate import Calibration, Terms
from mera_tl.inference import ReadSettings, spi
from mera_tl.methods import (
    Candidate,
    Choices,
    ProbeSet,
    SearchData,
    certify_flip,
    choose,
    divide,
    fit_probe_sets,
    flipped,
    list_candidates,
    reading_hooks,
    run_race,
    search_flip,
)
from mera_tl.probes import metrics
from mera_tl.steering import fit_directions
from mera_tl.tasks import Splits, Task

Fits = Mapping[float | None, ProbeSet]
WEAK, STRONG = 0.03, 3.0

ARMS: dict[str, Callable[[Candidate], bool]] = {
    "euclidean, weak ridge": lambda c: c.direction == "euclidean" and c.penalty == WEAK,
    "euclidean, strong ridge": lambda c: c.direction == "euclidean" and c.penalty == STRONG,
    **{
        kind: lambda c, kind=kind: c.direction == kind and c.strength is None
        for kind in (
            "pattern",
            "contrastive",
            "controlled_pattern",
            "controlled_contrastive",
            "answer_controlled",
        )
    },
    **{
        f"{kind}, read per answer": lambda c, kind=kind: c.direction == kind and c.penalty is None
        for kind in ("contrastive", "controlled_contrastive", "answer_controlled")
    },
    "searched": lambda c: True,  # noqa: ARG005
}
"""What each arm may choose from."""


@dataclass(frozen=True, eq=False)
class Cell:
    """A model on a split of a task."""

    model: Model
    splits: Splits
    train: Activations
    test: Activations
    calibration: Outcomes
    """Unsteered."""
    read: ReadSettings
    seed: int

    @cached_property
    def parts(self) -> tuple[list[int], list[int]]:
        return divide(self.splits.train, Choices().search_share, self.seed)

    @cached_property
    def learned(self) -> Activations:
        return self.train.subset(torch.tensor(self.parts[0]))

    def run(self, choices: Choices, change: Callable[[Fits], Fits]) -> Iterator[dict[str, Any]]:
        fitted = change(fit_probe_sets(self.learned, choices))
        judge = self.parts[1]
        held_out, task = self.train.subset(torch.tensor(judge)), self.splits.train.subset(judge)
        data = SearchData(self.model, task, held_out, fitted, "correct", self.read)
        every = list_candidates(choices, range(self.model.n_layers))
        tried, _, _ = run_race(data, [c for c in every if c.penalty in fitted], choices)
        chosen = {}
        for arm, allowed in ARMS.items():
            mine = [each for each in tried if allowed(each.candidate)]
            if mine:
                chosen[arm] = choose(mine)
        names = list(dict.fromkeys(chosen.values()))
        calibration = self._gains(data, names, self.splits.calibration, self.calibration)
        test = self._gains(data, names, self.splits.test, self.test.outcomes)
        for arm, name in chosen.items():
            row = names.index(name)
            yield {"arm": arm} | self.judged(data, name, calibration[row], test[row])

    def _gains(
        self, data: SearchData, names: list[Candidate], task: Task[Any], base: Outcomes
    ) -> Any:
        there = replace(data, task=task, activations=Activations({}, base))
        return there.gains(names, range(len(task)))

    def judged(
        self, data: SearchData, chosen: Candidate, gains: Any, tested: Any
    ) -> dict[str, Any]:
        """Certify by the gains on the calibration split; report those on test regardless."""
        decision = certify(gains.numpy()[None], candidates=[chosen.threshold])
        layer, base = chosen.layers[0], self.test.outcomes
        fitted = data.probe_sets[chosen.penalty]
        score = fitted.probe.score(self.test.resid("last"), base.predictions)[layer]
        return {
            **of_choice(chosen),
            **of_gains(decision, tested, base),
            "auroc": float(metrics.auroc(score, ~base.correct)),
            "r2": float(1 - (score.sigmoid() - base.error).square().mean() / base.error.var()),
            **self._geometry(fitted, chosen, score),
        }

    def _geometry(self, fitted: ProbeSet, chosen: Candidate, score: Any) -> dict[str, Any]:
        """Measure the shift against the activation, and the direction against two others."""
        layer, directions = chosen.layers[0], fitted.directions
        d = directions[chosen.direction].vectors[..., layer, :]
        w = weights = fitted.probe.weights[..., layer, :]
        if fitted.probe.per_answer:
            w = weights[self.test.outcomes.predictions.clamp(min=0)]
        excess = score - torch.logit(torch.tensor(chosen.threshold))
        per_row = d if d.ndim == 1 else d[self.test.outcomes.predictions.clamp(min=0)]
        slope = (per_row * w).sum(-1)
        amount = excess / slope.clamp(min=1e-9) if chosen.strength is None else chosen.strength
        moved = (excess > 0) & ((slope > 0) | torch.tensor(chosen.strength is not None))
        size = (amount * per_row.norm(dim=-1) / self.test.resid("last")[layer].norm(dim=-1))[moved]
        cosine = torch.nn.functional.cosine_similarity
        return {
            "moved_share": float(moved.float().mean()),
            "relative_shift": float(size.median()) if len(size) else None,
            "cosine_to_probe": float(cosine(d, weights, dim=-1).mean()),
            "cosine_to_controlled": float(
                cosine(d, directions["controlled_contrastive"].vectors[layer], dim=-1).mean()
            ),
        }

    def flip(self, choices: Choices) -> dict[str, Any]:
        """Judge the baseline that steers nothing."""
        found = search_flip(self.splits.train, self.train, choices=choices)
        calibration = self.splits.calibration
        decision = certify_flip(self.model, calibration, found, terms=Terms(), settings=self.read)
        hooks = reading_hooks(found.steering)
        read = evaluate(self.model, self.splits.test, hooks, settings=self.read)
        outcomes = flipped(read, read.max_score, found.chosen.threshold)
        base = self.test.outcomes
        measured = {"auroc": float(metrics.auroc(read.max_score, ~base.correct))}
        return {
            "arm": "flip",
            **of_choice(found.chosen),
            **of_gains(decision, outcomes.gain(base), base),
            **measured,
        }


def of_choice(chosen: Candidate) -> dict[str, Any]:
    return {
        "direction": chosen.direction,
        "penalty": chosen.penalty,
        "layers": list(chosen.layers),
        "positions": chosen.positions,
        "threshold": chosen.threshold,
        "strength": chosen.strength,
    }


def of_gains(decision: Calibration, gains: Any, base: Outcomes) -> dict[str, Any]:
    """`spi` is of the decision: zero when abstaining; `spi_uncertified` of steering regardless."""
    regardless = spi(base.accuracy + float(gains.mean()), base.accuracy)
    return {
        "certified": not decision.abstained,
        "accuracy": base.accuracy + (0.0 if decision.abstained else float(gains.mean())),
        "spi": 0.0 if decision.abstained else regardless,
        "spi_uncertified": regardless,
        "recoveries": int((gains > 0).sum()),
        "regressions": int((gains < 0).sum()),
        "calibration_recoveries": decision.evidence[0].recoveries,
        "calibration_regressions": decision.evidence[0].regressions,
        "n_calibration": decision.n,
        "n_test": len(base),
    }


# --- ablations ----------------------------------------------------------------------------------


def shuffled(trial: Cell, fits: Fits) -> Fits:
    """Tell the directions wrong classes, dealt out at random; the probes stay as they are.

    For one direction per class, who is wrong stays true. For one per answer the answers stay, and a
    class that is true of nothing cannot be held fixed.
    """
    base = trial.learned.outcomes
    generator = torch.Generator().manual_seed(trial.seed)
    labels = base.labels[torch.randperm(len(base), generator=generator)]
    wrong = torch.where(base.correct, labels, (labels + 1) % len(base.options))
    per_class = replace(base, labels=labels, predictions=wrong)
    per_answer = replace(base, labels=labels)
    changed = {}
    for key, fitted in fits.items():
        directions = dict(fitted.directions)
        for kind in directions:
            told = per_answer if kind == "answer_controlled" else per_class
            learned = replace(trial.learned, outcomes=told)
            directions |= fit_directions(learned, fitted.probe, (kind,))
        changed[key] = replace(fitted, directions=directions)
    return changed


def partly_known(trial: Cell, fits: Fits, share: float) -> Fits:
    """Give the directions only some of the examples: the classes of the others are not known."""
    n = round(share * len(trial.learned.outcomes))
    generator = torch.Generator().manual_seed(trial.seed)
    told = trial.learned.subset(
        torch.randperm(len(trial.learned.outcomes), generator=generator)[:n]
    )
    return {
        key: replace(fitted, directions=fit_directions(told, fitted.probe, list(fitted.directions)))
        for key, fitted in fits.items()
    }
