"""Tasks of lm-evaluation-harness, unsteered and steered beside each other."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mera_tl.certificate.bounds import betting, lower_bound
from mera_tl.evals.harness import SteeredLM
from mera_tl.inference.answers import ReadSettings
from mera_tl.models.model import Model
from mera_tl.steering.steering import Steering

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SideEffect:
    """What a steering does to one metric of one task."""

    task: str
    metric: str
    n: int
    unsteered: float
    steered: float
    low: float
    high: float
    """A 95 % interval of the mean difference, paired and valid for every n; NaN for a metric that
    is not in [0, 1] for every example."""
    n_changed: int
    """Examples whose value differs."""

    @property
    def difference(self) -> float:
        """Steered minus unsteered."""
        return self.steered - self.unsteered


def compare_on_tasks(
    model: Model,
    steering: Steering,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    n_shots: int | None = None,
    settings: ReadSettings | None = None,
) -> list[SideEffect]:
    """Run tasks of the harness, by name or by the path of a YAML file, unsteered and steered.

    A steering acts at the tokens that it was certified at. In a chat these follow an answer prefix
    ("Answer:", unless `ReadSettings.answer_prefix` said otherwise), which the harness writes where
    a task's file has `gen_prefix: "Answer:"`.

    Raises:
        ValueError: if there is no such task or file, or the steering is not for this model.
    """
    names, folders = _names(tasks)
    unsteered, steered = (
        _samples(SteeredLM(model, each, settings=settings), names, folders, limit, n_shots)
        for each in (None, steering)
    )
    effects = [
        _effect(task, metric, values, steered[task][metric])
        for task, metrics in unsteered.items()
        for metric, values in metrics.items()
    ]
    if not any(effect.n_changed for effect in effects):
        logger.warning("The steering changed nothing in %s.", ", ".join(unsteered))
    return effects


def _names(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of tasks, and the folders of those that are files."""
    names, folders = [], []
    for task in tasks:
        if not task.endswith((".yaml", ".yml")):
            names.append(task)
            continue
        path = Path(task)
        if not path.is_file():
            raise ValueError(f"There is no task file {path}; pass a YAML file or a task's name.")
        # A task of the harness may hold tags such as !function, which are not needed for a name.
        line = next((x for x in path.read_text().splitlines() if x.startswith("task:")), "")
        name = (yaml.safe_load(line) or {}).get("task")
        if not isinstance(name, str):
            raise ValueError(f"{path} names no task; it needs a line such as `task: my_task`.")
        names.append(name)
        folders.append(str(path.parent))
    return names, folders


def _samples(
    lm: SteeredLM, names: list[str], folders: list[str], limit: int | None, n_shots: int | None
) -> dict[str, dict[str, np.ndarray]]:
    """Return the value of every example, by task and metric.

    A task that reads replies in several ways (filters) has every example once for each: these are
    metrics of their own, not more examples.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    paths: Any = folders or None
    manager = TaskManager(include_path=paths, include_defaults=len(folders) < len(names))
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"lm-evaluation-harness knows no task {unknown[0]!r}; `lm-eval ls tasks` lists its "
            "tasks, and a YAML file of your own is named by its path."
        )
    found: Any = simple_evaluate(
        model=lm,
        tasks=names,  # pyright: ignore[reportArgumentType]
        num_fewshot=n_shots,
        limit=limit,
        task_manager=manager,
        apply_chat_template=lm.model.chat,
        bootstrap_iters=0,
        log_samples=True,
    )
    return {task: _by_metric(samples) for task, samples in found["samples"].items() if samples}


def _by_metric(samples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return one value per example, for each metric and way of reading."""
    ways = list(dict.fromkeys(sample["filter"] for sample in samples))
    values: dict[str, np.ndarray] = {}
    for way in ways:
        some = [sample for sample in samples if sample["filter"] == way]
        for metric in some[0]["metrics"]:
            if isinstance(some[0][metric], int | float | bool):
                name = metric if len(ways) == 1 else f"{metric},{way}"
                values[name] = np.array([float(sample[metric]) for sample in some])
    return values


def _effect(task: str, metric: str, unsteered: np.ndarray, steered: np.ndarray) -> SideEffect:
    gains = steered - unsteered
    low = high = float("nan")
    both = np.concatenate([unsteered, steered])
    if ((both >= 0) & (both <= 1)).all():
        # Bets take examples as they come: of a data set that is sorted, by class or by subject, the
        # first ones are not like all.
        shuffled = np.random.default_rng(0).permutation(gains)
        # Two one-sided bounds, each at half of the error.
        low = lower_bound(betting(shuffled, 0.025), 0.025)
        high = -lower_bound(betting(-shuffled, 0.025), 0.025)
    n_changed = int((gains != 0).sum())
    means = float(unsteered.mean()), float(steered.mean())
    return SideEffect(task, metric, len(gains), *means, low, high, n_changed)
