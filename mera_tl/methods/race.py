"""Search freely on training data, certify once.

A grid of thresholds costs confidence: ten are tested, so each is tested ten times more strictly.
What is searched on *training* data costs none. A part of the training split, not used to fit, tries
every direction, penalty, set of layers, scope and threshold; one candidate is chosen; and the
calibration split, never seen, tests that one with the whole delta.

Candidates race: a first-order prediction (`foresight`) says which are tried at all; an eighth of
the judging examples see those, and as examples double only the better stay. Before the last half
the best of each direction races on the whole prompt too.
"""

import html
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy import stats
from tqdm.auto import tqdm

from mera_tl import storage
from mera_tl.inference.activations import Activations, collect
from mera_tl.inference.answers import ReadSettings
from mera_tl.inference.evaluation import check_task
from mera_tl.inference.outcomes import Metric
from mera_tl.inference.progress import is_watched
from mera_tl.methods.candidates import (
    MEANS,
    MIN_ERRORS,
    RAW,
    Candidate,
    ProbeSet,
    SearchData,
    candidate_from,
    steering_of,
)
from mera_tl.methods.trials import Trial, TrialStore, choose, tabulate
from mera_tl.models.model import Model
from mera_tl.probes.probe import LinearProbe
from mera_tl.steering.directions import KINDS
from mera_tl.steering.spaces import SAESpace, Space
from mera_tl.steering.steering import Steering
from mera_tl.tasks.task import Task, Train

MIN_RANKED = 10
"""Fewer candidates than this say nothing about how well gains are foreseen."""


@dataclass(frozen=True)
class Choices:
    """What is searched over, and how.

    Raises:
        ValueError: if directions are one text, or layers are no sets of layers.
    """

    directions: tuple[str, ...] = KINDS
    penalties: tuple[float, ...] = (0.03, 3.0)
    """Of the ridge probe: from well-fitting to strongly regularised."""
    thresholds: tuple[float, ...] = (0.01, 0.05, 0.2, 0.35, 0.5)
    """The paper's alpha."""
    layers: tuple[tuple[int, ...], ...] | None = None
    """Sets of layers; None is every layer alone, all, and halves and thirds in a row."""
    search_share: float = 1 / 3
    """Share of the training examples that judge; the others fit."""
    gate_thresholds: tuple[float, ...] = (0.3, 0.5, 0.7)
    """Thresholds of directions that move by their own length, read by one probe per answer."""
    strengths: tuple[float, ...] = (1.0, 2.0)
    """How many such directions to move."""
    keep: tuple[int, int, int, int] = (480, 320, 160, 48)
    """How many candidates see an eighth of the examples, a quarter, half of them, and all."""
    keep_per_direction: int = 2
    """How many of the best of each direction and probe stay in the race whatever they are worth."""
    metric: Metric = "correct"
    budget: float | None = None
    """Seconds after which the search ends with the best so far; None for no limit."""
    caution: float = 1.0
    """Standard errors that are subtracted from a candidate's mean gain."""
    seed: int = 0
    """Of who fits and who judges, and of the probes' folds."""

    def __post_init__(self) -> None:
        if isinstance(self.directions, str):
            one = self.directions
            raise ValueError(f"directions={one!r} are no names; pass them as ({one!r},).")
        if not all(isinstance(each, tuple) for each in self.layers or ()):
            raise ValueError(f"layers={self.layers} are no sets; pass sets, as ((0,), (1, 2)).")


@dataclass(frozen=True, eq=False)
class Search:
    """What was tried on training data, and what was chosen.

    `steering` is the chosen one at its threshold, for `calibrate`; `table` has a row per candidate.
    """

    chosen: Candidate
    steering: Steering
    """The chosen candidate's, at its threshold."""
    table: pd.DataFrame
    """One row per candidate: n, recoveries, regressions, gain, value, and the gain foreseen."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Numbers of examples and the direction's notes."""

    def __repr__(self) -> str:
        return f"Search({self.chosen}, of {len(self.table):,} candidates)"

    def plot(self) -> Any:
        """Draw what every candidate recovered and broke, as a plotly figure."""
        from mera_tl.plots import search_table

        return search_table(self.table)

    def plot_foresight(self) -> Any:
        """Draw first-order gains beside real ones, as a plotly figure."""
        from mera_tl.plots import foresight

        return foresight(self.table)

    def save(self, folder: str | Path) -> None:
        """Write candidates.jsonl, the probe, direction.safetensors and, last, search.json."""
        folder = storage.path_of(folder)
        storage.reopen(folder / "search.json")
        rows = self.table.astype(object).where(self.table.notna(), None)
        storage.write_records(folder / "candidates.jsonl", rows.to_dict("records"))
        self.steering.probe.save(folder / "probe")
        path = folder / "direction.safetensors"
        if self.steering.direction is None:
            path.unlink(missing_ok=True)  # of an earlier search, which this one would steer along
        else:
            storage.save_tensors(path, {"direction": self.steering.direction})
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
        chosen = candidate_from(plain["chosen"])
        probe = LinearProbe.load(folder / "probe")
        path, direction = folder / "direction.safetensors", None
        if path.exists():
            direction = storage.load_tensors(path)["direction"]
        table = pd.DataFrame(storage.read_records(folder / "candidates.jsonl"))
        steering = steering_of(chosen, probe, direction, space)
        return cls(chosen, steering, table, plain["details"])

    def _repr_html_(self) -> str:
        best = self.table.sort_values("value", ascending=False).head(10)
        told = best.to_html(index=False, float_format="%.3g", na_rep="")
        return f"<p>{html.escape(str(self.chosen))}</p>{told}"


def search(
    model: Model,
    task: Task[Train],
    activations: Activations | None = None,
    *,
    choices: Choices | None = None,
    settings: ReadSettings | None = None,
    space: Space = RAW,
    folder: str | Path | None = None,
) -> Search:
    """Choose how to steer, on training data alone.

    `activations` are those of `task`, unsteered, and collected here if not given. In `folder` the
    trials are kept as they come: a search that was ended goes on from them. The choice promises
    nothing: the gain in the table is that of the best of many. `calibrate` its steering.

    Raises:
        ValueError: if the task is not a training split, the activations are not its own, or the
            choices are none.
    """
    if not isinstance(choices, Choices | None):
        raise ValueError(f"choices={choices!r:.60} are none; pass mera_tl.methods.Choices(...).")
    choices, settings = choices or Choices(), settings or ReadSettings()
    require_training(task, activations)
    activations = collect(model, task, settings=settings) if activations is None else activations
    activations.check(model, settings)
    fit, judge = divide(task, choices.search_share, choices.seed)
    sets = fit_probe_sets(activations.subset(torch.tensor(fit)), choices, space)
    layers = space.layers if isinstance(space, SAESpace) else range(model.n_layers)
    held_out = activations.subset(torch.tensor(judge))
    quiet = replace(settings, progress=False)
    data = SearchData(model, task.subset(judge), held_out, sets, choices.metric, quiet, space)
    candidates = [each for each in list_candidates(choices, layers) if each.penalty in sets]
    store = TrialStore.open(folder, data, choices)
    trials, promise, details = run_race(data, candidates, choices, store, watch=settings.progress)
    chosen = choose(trials, choices.caution)
    notes = sets[chosen.penalty].directions[chosen.direction].notes
    details = {"n_fit": len(fit), "n_search": len(judge), "notes": notes, **details}
    table = tabulate(trials, choices.caution, promise)
    return Search(chosen, data.steering(chosen), table, details)


def require_training(task: Task[Any], activations: Activations | None) -> None:
    """Refuse anything but a training split with its own activations.

    Raises:
        ValueError: saying what was got.
    """
    check_task(task)
    if task.role != "train":
        raise ValueError(
            f"A search needs the training split, got the {task.role} split of {task.name}; "
            "pass task.split(...).train and keep the others for the certificate and the test."
        )
    rows = [example.row for example in task.examples]
    if not isinstance(activations, Activations | None):
        raise ValueError(f"{activations!r:.60} holds no activations; pass collect(model, task).")
    if activations is not None and activations.outcomes.rows.tolist() != rows:
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


def list_candidates(choices: Choices, available: Sequence[int]) -> list[Candidate]:
    """List what is tried from the final prompt token on."""
    layers = choices.layers if choices.layers is not None else _layer_sets(available)
    mera = product(choices.directions, choices.penalties, layers, choices.thresholds)
    found = [Candidate(d, penalty, where, "last", t) for d, penalty, where, t in mera]
    means = [kind for kind in choices.directions if kind in MEANS]
    gated = product(means, layers, choices.gate_thresholds, choices.strengths)
    return found + [Candidate(d, None, where, "last", t, s) for d, where, t, s in gated]


def _layer_sets(available: Sequence[int]) -> list[tuple[int, ...]]:
    """Return up to twelve single layers, three ranges that cover the model, and all layers."""
    n, every = len(available), tuple(available)
    singles = [(layer,) for layer in every[:: -(-n // 12)]]
    width = -(-n // 3)
    ranges = [every[start : start + width] for start in (0, (n - width) // 2, n - width)]
    return list(dict.fromkeys([*singles, *ranges, every]))


def fit_probe_sets(
    activations: Activations, choices: Choices, space: Space = RAW
) -> dict[float | None, ProbeSet]:
    """Fit every probe and direction that candidates ask for, by their penalty.

    Without a handful of wrong and of right examples there is nothing to read per answer.
    """
    kinds, n_right = choices.directions, int(activations.correct.sum())
    sets: dict[float | None, ProbeSet] = {
        penalty: ProbeSet.ridge(activations, penalty, kinds, space=space, seed=choices.seed)
        for penalty in choices.penalties
    }
    if min(n_right, len(activations.outcomes) - n_right) >= MIN_ERRORS:
        sets[None] = ProbeSet.per_answer(activations, kinds, space=space, seed=choices.seed)
    return sets


# --- the race -----------------------------------------------------------------------------------

BLOCK = 400
"""Candidates that are tried at a time: what a search that is ended loses at most."""


def run_race(
    data: SearchData,
    candidates: Sequence[Candidate],
    choices: Choices,
    store: TrialStore | None = None,
    *,
    watch: bool = False,
) -> tuple[list[Trial], Mapping[Candidate, float], dict[str, Any]]:
    """Try those of first-order promise on an eighth of the examples, and ever fewer on more.

    The best of every direction by MERA's rule is also tried on the whole prompt, at a prompt each:
    all on an eighth of the examples, then ever the better half.
    Returns the trials, the gains that were foreseen, and what is to be known about the race.
    """
    store = store or TrialStore(None, "", len(data.task))
    generator = torch.Generator().manual_seed(choices.seed)
    order = torch.randperm(len(data.task), generator=generator).tolist()
    value = data.promise(candidates, order[: -(-len(order) // 4)])
    promise, field = value, list(candidates)
    total = planned_trials(len(candidates), len(order), choices)
    with tqdm(total=total, desc="search", disable=not (watch and is_watched())) as bar:
        race = _Race(data, choices, store, order, bar, time.monotonic() - store.seconds)
        for keep, share in zip(choices.keep, (8, 4, 2, 1), strict=True):
            field = _leaders(field, value, keep, choices.keep_per_direction)
            race.advance(field, share)
            if race.is_over:
                break
            value = race.values(field, share)
            if share == 2:
                everywhere = _best_per_direction(value)
                for part in (8, 4, 2):
                    race.advance(everywhere, part)
                    worth = race.values(everywhere, part)
                    ranked = sorted(worth, key=lambda each: -worth[each])
                    everywhere = ranked[: -(-len(everywhere) // 2)]
                field += everywhere
                value |= race.values(everywhere, share)
    details = {"budget": choices.budget, "complete": not race.is_over}
    details |= {"seconds": round(race.spent, 1)}
    details |= {"foresight": _foresight(store, promise), "n_candidates": len(promise)}
    return [store.trial(each) for each in store.gains], promise, details


@dataclass(frozen=True, eq=False)
class _Race:
    """The examples in the order in which they judge, and the time that it takes."""

    data: SearchData
    choices: Choices
    store: TrialStore
    order: Sequence[int]
    bar: Any
    started: float

    @property
    def spent(self) -> float:
        """Seconds, those of earlier attempts included."""
        return time.monotonic() - self.started

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent."""
        budget = self.choices.budget
        return budget is not None and self.spent > budget and bool(self.store.gains)

    def advance(self, some: Sequence[Candidate], share: int) -> None:
        """Try candidates on one in `share` of the examples, as far as they have not seen these."""
        places = self._first(share)
        lacking = [each for each in some if self.store.lacks(each, places)]
        for start in range(0, len(lacking), BLOCK):
            if self.is_over:
                return
            block = lacking[start : start + BLOCK]
            known = self.store.n_known(block, places)
            self.store.add(block, self.data.gains(block, places[known:]))
            self.store.save(self.spent)
            self.bar.update(len(block) * (len(places) - known))

    def values(self, some: Sequence[Candidate], share: int) -> dict[Candidate, float]:
        """Return what those tried are worth by one in `share` of the examples, and by no others.

        A search that goes on may have seen more, and is to end as one that was never interrupted.
        """
        trials = [self.store.trial(e, self._first(share)) for e in some if e in self.store.gains]
        return {each.candidate: each.value(self.choices.caution) for each in trials}

    def _first(self, share: int) -> Sequence[int]:
        return self.order[: -(-len(self.order) // share)]


def planned_trials(n_candidates: int, n_examples: int, choices: Choices) -> int:
    """Return how many (candidate, example) pairs a race looks at; about half are run at all."""
    ends = [0, *(-(-n_examples // share) for share in (8, 4, 2, 1))]
    new = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    return sum(min(keep, n_candidates) * n for keep, n in zip(choices.keep, new, strict=True))


def _foresight(store: TrialStore, promise: Mapping[Candidate, float]) -> float | None:
    """Return the rank correlation of foreseen with real gains over what was tried."""
    tried = [each for each in promise if each in store.gains]
    pairs = [(promise[each], float(store.trial(each).seen.mean())) for each in tried]
    foreseen, real = (list(column) for column in zip(*pairs, strict=True))
    if len(tried) < MIN_RANKED or min(len(set(foreseen)), len(set(real))) < 2:
        return None
    found: Any = stats.spearmanr(foreseen, real)
    return round(float(found.statistic), 3)


def _best_per_direction(value: Mapping[Candidate, float]) -> list[Candidate]:
    """Return, for the whole prompt, the best candidate by MERA's rule of every direction."""
    mera = sorted((each for each in value if each.strength is None), key=value.__getitem__)
    best = {each.direction: each for each in mera}
    return [replace(each, positions="all") for each in best.values()]


def _leaders(
    field: Sequence[Candidate], value: Mapping[Candidate, float], keep: int, per_direction: int
) -> list[Candidate]:
    """Return the `keep` most valuable, and the best of each direction and probe."""
    ranked = sorted(field, key=lambda each: -value[each])
    groups: dict[Any, list[Candidate]] = {}
    for each in ranked:
        groups.setdefault((each.direction, each.penalty), []).append(each)
    best = [each for group in groups.values() for each in group[:per_direction]]
    return list(dict.fromkeys([*ranked[:keep], *best]))
