"""Search freely on training data, certify once.

A grid of thresholds costs confidence: ten are tested, so each is tested ten times more strictly.
What is searched on *training* data costs none. A part of the training split, not used to fit, tries
every direction, penalty, set of layers, scope and threshold; one candidate is chosen; and the
calibration split, never seen, tests that one with the whole delta.

Candidates race: an eighth of the judging examples see all of them, and as examples double only the
better stay. Before the last half the best of each direction is tried on the whole prompt too.
"""

import html
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mera_tl import storage
from mera_tl.inference.activations import Activations
from mera_tl.inference.answers import ReadSettings
from mera_tl.inference.outcomes import Metric
from mera_tl.methods.candidates import (
    MEANS,
    MIN_ERRORS,
    RAW,
    Bench,
    Candidate,
    Fitted,
    Tried,
    choose,
    steering_of,
    tabulate,
)
from mera_tl.models.model import Model
from mera_tl.probes.probe import LinearProbe
from mera_tl.steering.directions import KINDS
from mera_tl.steering.spaces import SAESpace, Space
from mera_tl.steering.steering import Steering
from mera_tl.tasks.task import Task, Train

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choices:
    """What is searched over, and how."""

    directions: tuple[str, ...] = KINDS
    penalties: tuple[float, ...] = (0.03, 3.0)
    """Of the ridge probe: from well-fitting to strongly regularised."""
    thresholds: tuple[float, ...] = (0.01, 0.05, 0.2, 0.35, 0.5)
    """The paper's alpha."""
    layers: tuple[tuple[int, ...], ...] | None = None
    """Sets of layers; None is every layer alone, all, and halves and thirds in a row."""
    search_share: float = 1 / 3
    """Share of the training examples that judge; the others fit."""
    gates: tuple[float, ...] = (0.3, 0.5, 0.7)
    """Thresholds of directions that move by their own length, read by one probe per answer."""
    strengths: tuple[float, ...] = (1.0, 2.0)
    """How many such directions to move."""
    keep: tuple[int, int, int] = (320, 160, 48)
    """How many candidates see a quarter of the examples, half of them, and all."""
    of_each: int = 2
    """How many of the best of each direction and probe stay in the race whatever they are worth."""
    metric: Metric = "correct"
    caution: float = 1.0
    """Standard errors that are subtracted from a candidate's mean gain."""
    seed: int = 0
    """Of who fits and who judges, and of the probes' folds."""


@dataclass(frozen=True, eq=False)
class Search:
    """What was tried on training data, and what was chosen."""

    chosen: Candidate
    steering: Steering
    """The chosen candidate's, at its threshold."""
    table: pd.DataFrame
    """One row per candidate: n, recoveries, regressions, gain, value."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Numbers of examples and the direction's notes."""

    def save(self, folder: str | Path) -> None:
        """Write candidates.jsonl, the probe, direction.safetensors and, last, search.json."""
        folder = Path(folder)
        rows = self.table.astype(object).where(self.table.notna(), None)
        storage.write_records(folder / "candidates.jsonl", rows.to_dict("records"))
        self.steering.probe.save(folder / "probe")
        if self.steering.direction is not None:
            tensors = {"direction": self.steering.direction}
            storage.save_tensors(folder / "direction.safetensors", tensors)
        storage.write_json(
            folder / "search.json", {"chosen": asdict(self.chosen), "details": dict(self.details)}
        )

    @classmethod
    def load(cls, folder: str | Path, space: Space = RAW) -> "Search":
        """Read what `save` wrote, for the space that it was searched in.

        Raises:
            ValueError: if a file is missing or damaged.
        """
        folder = Path(folder)
        plain = storage.read_json(folder / "search.json")
        chosen = Candidate(**(plain["chosen"] | {"layers": tuple(plain["chosen"]["layers"])}))
        probe = LinearProbe.load(folder / "probe")
        path, direction = folder / "direction.safetensors", None
        if path.exists():
            direction = storage.load_tensors(path)["direction"]
        table = pd.DataFrame(storage.read_records(folder / "candidates.jsonl"))
        steering = steering_of(chosen, probe, direction, space)
        return cls(chosen, steering, table, plain["details"])

    def _repr_html_(self) -> str:
        best = self.table.sort_values("value", ascending=False).head(10)
        return f"<p>{html.escape(str(self.chosen))}</p>" + best.to_html(index=False)


def search(
    model: Model,
    task: Task[Train],
    activations: Activations,
    *,
    choices: Choices | None = None,
    settings: ReadSettings | None = None,
    space: Space = RAW,
) -> Search:
    """Choose how to steer, on training data alone.

    `activations` are those of `task`, unsteered. The choice promises nothing: the gain in the table
    is that of the best of many. `calibrate` its steering at its one threshold.

    Raises:
        ValueError: if the task is not a training split, or the activations are not its own.
    """
    choices, settings = choices or Choices(), settings or ReadSettings()
    require_training(task, activations)
    fit, judge = divide(task, choices.search_share, choices.seed)
    learned = activations.subset(torch.tensor(fit))
    fitted = fit_all(learned, choices, space)
    layers = space.layers if isinstance(space, SAESpace) else range(model.n_layers)
    base = activations.outcomes.subset(torch.tensor(judge))
    bench = Bench(model, task.subset(judge), base, fitted, choices.metric, settings, space)
    names = [name for name in candidates(choices, layers) if name.penalty in fitted]
    table = race(bench, names, choices)
    chosen = choose(table, choices.caution)
    details = {
        "n_fit": len(fit),
        "n_search": len(judge),
        "notes": fitted[chosen.penalty].directions[chosen.direction].notes,
    }
    return Search(chosen, bench.steering(chosen), tabulate(table, choices.caution), details)


def require_training(task: Task[Any], activations: Activations) -> None:
    """Refuse anything but a training split with its own activations.

    Raises:
        ValueError: saying what was got.
    """
    if task.role != "train":
        raise ValueError(
            f"A search needs the training split, got the {task.role} split of {task.name}; "
            "pass task.split(...).train and keep the others for the certificate and the test."
        )
    rows = [example.row for example in task.examples]
    if activations.outcomes.rows.tolist() != rows:
        raise ValueError(
            f"The {len(activations.outcomes)} activations are not of the {len(task)} examples of "
            f"{task.name}; pass collect(model, task)."
        )


def divide(task: Task[Any], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the places of the examples that fit and of those that judge, no text in both."""
    groups: dict[str, list[int]] = {}
    for place, example in enumerate(task.examples):
        groups.setdefault(example.key, []).append(place)
    shuffled = list(groups.values())
    random.Random(f"search/{seed}").shuffle(shuffled)
    judge: list[int] = []
    while shuffled and len(judge) < round(share * len(task)):
        judge.extend(shuffled.pop())
    return sorted(place for group in shuffled for place in group), sorted(judge)


def candidates(choices: Choices, available: Sequence[int]) -> list[Candidate]:
    """List what is tried from the final prompt token on."""
    layers = choices.layers if choices.layers is not None else _layer_sets(available)
    mera = product(choices.directions, choices.penalties, layers, choices.thresholds)
    found = [Candidate(d, penalty, where, "last", t) for d, penalty, where, t in mera]
    means = [kind for kind in choices.directions if kind in MEANS]
    gated = product(means, layers, choices.gates, choices.strengths)
    return found + [Candidate(d, None, where, "last", t, s) for d, where, t, s in gated]


def _layer_sets(available: Sequence[int]) -> list[tuple[int, ...]]:
    """Return up to twelve single layers, three ranges that cover the model, and all layers."""
    n, every = len(available), tuple(available)
    singles = [(layer,) for layer in every[:: -(-n // 12)]]
    width = -(-n // 3)
    ranges = [every[start : start + width] for start in (0, (n - width) // 2, n - width)]
    return list(dict.fromkeys([*singles, *ranges, every]))


def fit_all(
    activations: Activations, choices: Choices, space: Space = RAW
) -> dict[float | None, Fitted]:
    """Fit every probe and direction that candidates ask for, by their penalty.

    Without a handful of wrong and of right examples there is nothing to read per answer.
    """
    kinds, n_right = choices.directions, int(activations.correct.sum())
    fitted: dict[float | None, Fitted] = {
        penalty: Fitted.ridge(activations, penalty, kinds, space=space, seed=choices.seed)
        for penalty in choices.penalties
    }
    if min(n_right, len(activations.outcomes) - n_right) >= MIN_ERRORS:
        fitted[None] = Fitted.per_answer(activations, kinds, space=space, seed=choices.seed)
    return fitted


# --- the race -----------------------------------------------------------------------------------


def race(bench: Bench, names: Sequence[Candidate], choices: Choices) -> list[Tried]:
    """Try all candidates on an eighth of the examples, the better on more, the best on all.

    The best of every direction by MERA's rule is also tried on the whole prompt, at a prompt each.
    """
    generator = torch.Generator().manual_seed(choices.seed)
    order = torch.randperm(len(bench.task), generator=generator).tolist()
    nothing = torch.full((len(order),), torch.nan, dtype=torch.double)
    field, out = [Tried(name, nothing) for name in names], []
    seen = 0
    for keep, share in zip((len(names), *choices.keep), (8, 4, 2, 1), strict=True):
        field, behind = _leaders(field, choices, keep) if seen else (field, [])
        until = -(-len(order) // share)
        field = bench.advance(field, order[seen:until], f"search: {len(field)} candidates")
        if share == 2:
            wide = [Tried(_everywhere(each), nothing) for each in _best_of_each(field, choices)]
            title = f"search: {len(wide)} on the whole prompt"
            field += bench.advance(wide, order[:until], title)
        out, seen = behind + out, until
    return field + out


def _best_of_each(field: Sequence[Tried], choices: Choices) -> list[Tried]:
    """Return the best candidate by MERA's rule of every direction."""
    mera = [each for each in field if each.candidate.strength is None]
    ranked = sorted(mera, key=lambda each: each.value(choices.caution))
    return list({each.candidate.direction: each for each in ranked}.values())


def _everywhere(tried: Tried) -> Candidate:
    return replace(tried.candidate, positions="all")


def _leaders(
    field: Sequence[Tried], choices: Choices, keep: int
) -> tuple[list[Tried], list[Tried]]:
    """Return the `keep` best and the best of each direction and probe; and the others."""
    ranked = sorted(field, key=lambda each: -each.value(choices.caution))
    ahead = ranked[:keep]
    groups: dict[Any, list[Tried]] = {}
    for each in ranked:
        way = each.candidate
        groups.setdefault((way.direction, way.penalty), []).append(each)
    ahead += [each for group in groups.values() for each in group[: choices.of_each]]
    names = {each.candidate for each in ahead}
    behind = [each for each in ranked if each.candidate not in names]
    return list({each.candidate: each for each in ahead}.values()), behind
