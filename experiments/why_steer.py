"""Why steer? The classifier, the flip, the steering families and one verdict, on the same labels.

Three questions, each a part of the run: `table`, every method on every task, certified or
abstaining, and what `recommend` makes of it; `labels`, the same for few and many training labels;
`transfer`, where what was learned on one task answers another: a related task, another wording, two
in three examples of one class, or a training split without one of the options.

Expected: where options and labels exist the classifier is hard to beat, `flip` is near for errors
that can be read, and steering overtakes where labels are few or the test is another. Every setting
but `positions="last"` and the sizes is at its default; no test outcome chooses anything. A minute
of processor time a cell on the organism, six on a small Llama, half an hour on SmolLM2. Killed, it
goes on by the cell.

    python -m experiments.why_steer
    python -m experiments.why_steer --models M --parts table --tasks sms_spam --data-dir D \\
        --template F --rows 3500
    python -m experiments.why_steer --models smollm2 --parts table --tasks sms_spam \\
        sentiment_analysis --data-dir D --train 150 --calibration 100 --test 150
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import tyro

from experiments.errata import ORGANISM_TASKS
from mera_tl import load_model, load_task, storage
from mera_tl.benchmark import Run, RunConfig, open_run, recommend
from mera_tl.inference import Outcomes, evaluate, spi
from mera_tl.methods import FAMILIES, METHODS
from mera_tl.tasks import Task

RESULTS = Path(__file__).parent / "results" / Path(__file__).stem
COMPARED = ("no_steering", "prompt_steering", "optimal_probe", "ridge_probe", "answer_controlled")
COMPARED += ("searched", "flip", "class_probe", *FAMILIES, "withhold")
FEW = ("searched", "flip", "class_probe", "class_probe_steered", "rotation", "whitened")
PAIRS = (
    ("spam_hint", "spam_cue"),
    ("yesno_hint", "yesno_bias"),
    ("sentiment_hint", "sentiment_fan"),
    ("spam_cue", "spam_hint"),
    ("sentiment_fan", "sentiment_hint"),
)
"""Trained on the first, tested on the second."""
KEPT = ("model", "task", "method", "seed", "n", "accuracy", "spi", "transitions", "decision")
KEPT += ("threshold", "delta", "familywise_delta", "p_value", "error_change", "unanswered", "risk")
KEPT += ("n_train", "n_calibration", "seconds")


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = ("organism",)
    tasks: tuple[str, ...] = ORGANISM_TASKS
    seeds: tuple[int, ...] = (0, 1, 2)
    parts: tuple[str, ...] = ("table", "labels", "transfer")
    methods: tuple[str, ...] = COMPARED
    train: int = 600
    calibration: int = 300
    test: int = 400
    sizes: tuple[int, ...] = (50, 100, 200, 500, 1000)
    """Numbers of training labels."""
    few_tasks: tuple[str, ...] = ("spam_cue", "yesno_hint", "sentiment_fan", "choice_hint")
    """Tasks of the parts `labels` and `transfer`."""
    few_seeds: tuple[int, ...] = (0, 1)
    data_dir: str | None = None
    template: str | None = None
    rows: int | None = None
    """Take all from the first rows, in their order, a split starting later than the one before:
    for a model that was trained on the others. Default: a random split of all."""
    out: Path = Path("runs/why_steer")
    """Folder of the runs."""


loaded = lru_cache(maxsize=1)(load_model)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    cells: dict[str, Callable[[Config, str], Iterator[tuple[str, Cell]]]] = {
        "table": table_cells,
        "labels": label_cells,
        "transfer": transfer_cells,
    }
    for model in config.models:
        for part in config.parts:
            for name, cell in cells[part](config, model):
                path = RESULTS / part / f"{Path(model).name}-{name}.jsonl"
                if path.exists():
                    continue
                started = time.process_time()
                rows = list(cell())
                seconds = round(time.process_time() - started)
                storage.write_records(path, [row | {"cell_seconds": seconds} for row in rows])
                print(part, Path(model).name, name, f"{seconds} s", flush=True)
    found = counts()
    storage.write_json(RESULTS / "counts.json", found)
    print(found)


def counts() -> dict[str, Any]:
    """Count, over all cells of the table, how promise and verdict fared on test examples."""
    paths = sorted((RESULTS / "table").glob("*.jsonl"))
    cells = [storage.read_records(path) for path in paths]
    certified = [r for rows in cells for r in rows if r["decision"] == "STEER"]
    told = {"cells": len(cells), "certified": len(certified)}
    told["certified, and a loss of more than two standard errors"] = sum(
        change(row)[0] < -2 * change(row)[1] for row in certified
    )
    verdicts, near = [], []
    for rows in cells:
        (chosen,) = [row for row in rows if row["recommended"]]
        alone = chosen["verdict"] in ("leave alone", "withhold")
        gain, error = (0.0, 0.0) if alone else change(chosen)
        verdicts.append(gain >= -error)
        correcting = [row for row in rows if row["decision"] == "STEER"] or [chosen]
        best = max(0.0, *(row["spi"] for row in correcting if row["method"] != "withhold"), 0.0)
        near.append((0.0 if alone else chosen["spi"]) >= best - 0.02)
    told["verdicts not worse than leaving alone by a standard error"] = sum(verdicts)
    told["verdicts within .02 SPI of the best certified method"] = sum(near)
    for what in ("steer", "flip", "classify", "withhold", "leave alone"):
        told[f"verdict {what}"] = sum(rows[0]["verdict"] == what for rows in cells)
    return told


def change(row: dict[str, Any]) -> tuple[float, float]:
    """Return the mean gain on test examples and its standard error."""
    better, worse, n = row["transitions"]["0->1"], row["transitions"]["1->0"], row["n"]
    gain = (better - worse) / n
    return gain, ((better + worse) / n - gain**2) ** 0.5 / n**0.5


Cell = Callable[[], Iterator[dict[str, Any]]]


def configured(config: Config, model: str, task: str, seed: int, train: int) -> RunConfig:
    told: dict[str, Any] = {"data_dir": config.data_dir, "template": config.template}
    if task in ORGANISM_TASKS:
        told = {}
    parts = {"train": train, "calibration": config.calibration, "test": config.test}
    sizes = {role: str(n) for role, n in parts.items()}
    if config.rows is not None:
        total = config.train + config.calibration + config.test
        first = seed * (config.rows - total) // max(1, max(config.seeds))
        second = first + config.train
        third = second + config.calibration
        starts = zip(parts, (first, second, third), strict=True)
        sizes = {role: f"{start}-{start + parts[role] - 1}" for role, start in starts}
    return RunConfig(model=model, task=task, seed=seed, positions="last", **sizes, **told)


# --- every method on every task -----------------------------------------------------------------


def table_cells(config: Config, model: str) -> Iterator[tuple[str, Cell]]:
    for seed in config.seeds:
        for task in config.tasks:
            yield f"{task}-{seed}", lambda t=task, s=seed: table_cell(config, model, t, s)


def table_cell(config: Config, model: str, task: str, seed: int) -> Iterator[dict[str, Any]]:
    asked = configured(config, model, task, seed, config.train)
    folder = config.out / f"{Path(model).name}-{task}-{seed}"
    with run_of(asked, folder, config) as run:
        rows = []
        for record in run.records(config.methods):
            decision = certificate_of(run, record["method"])
            rows.append({key: record[key] for key in KEPT} | decision)
    verdict = recommend(folder)
    for row in rows:
        row["recommended"] = row["method"] == (verdict.method or "no_steering")
        yield row | {"verdict": verdict.what}


def run_of(asked: RunConfig, folder: Path, config: Config) -> Any:
    told: dict[str, Any] = {"load": lambda c: loaded(c.model, device="cpu"), "progress": False}
    return open_run(asked, folder, cache=config.out / "cache", **told)


def certificate_of(run: Run, method: str) -> dict[str, Any]:
    """Return what the calibration examples say of a method, where it asked them."""
    path = run.folder / "certificates" / method / "steering.json"
    if not path.exists():
        return {}
    evidence = storage.read_json(path)["evidence"]
    best = max(evidence, key=lambda row: (row["lower"], row["gain"]))
    names = ("recoveries", "regressions", "gain", "lower")
    return {f"calibration_{name}": best[name] for name in names}


# --- few labels ---------------------------------------------------------------------------------


def label_cells(config: Config, model: str) -> Iterator[tuple[str, Cell]]:
    for seed in config.few_seeds:
        for task in config.few_tasks:
            yield f"{task}-{seed}", lambda t=task, s=seed: label_cell(config, model, t, s)


def label_cell(config: Config, model: str, task: str, seed: int) -> Iterator[dict[str, Any]]:
    """Train on ever more of the same examples; calibration and test stay."""
    for size in config.sizes:
        asked = configured(config, model, task, seed, size)
        folder = config.out / f"labels-{Path(model).name}-{task}-{seed}-{size}"
        with run_of(asked, folder, config) as run:
            for record in run.records(("no_steering", *FEW)):
                yield {key: record[key] for key in KEPT} | {"labels": size}


# --- another test -------------------------------------------------------------------------------


def transfer_cells(config: Config, model: str) -> Iterator[tuple[str, Cell]]:
    for seed in config.few_seeds:
        for first, second in PAIRS:
            if model == "organism":
                told = (config, first, second, seed)
                yield f"{first}-{second}-{seed}", lambda t=told: related(*t)
        for task in config.few_tasks:
            yield f"shifted-{task}-{seed}", lambda t=task, s=seed: shifted(config, model, t, s)
            yield f"missing-{task}-{seed}", lambda t=task, s=seed: missing(config, model, t, s)


def related(config: Config, first: str, second: str, seed: int) -> Iterator[dict[str, Any]]:
    """Learn and certify on one task, answer another one."""
    asked = configured(config, "organism", first, seed, config.train)
    with run_of(asked, config.out / f"organism-{first}-{seed}", config) as run:
        other = load_task(second).split(seed, calibration=config.calibration, test=config.test)
        yield from answered(run, other.test, {"change": "related task", "task": first}, FEW)


def shifted(config: Config, model: str, task: str, seed: int) -> Iterator[dict[str, Any]]:
    """Test with another wording, and with two in three examples of one class."""
    asked = configured(config, model, task, seed, config.train)
    with run_of(asked, config.out / f"{Path(model).name}-{task}-{seed}", config) as run:
        test = run.splits.test
        worded = test.with_instruction("Think before you answer.")
        yield from answered(run, worded, {"change": "other wording", "task": task}, FEW)
        counts = [test.labels.count(i) for i in range(len(test.options))]
        rare = counts.index(min(counts))
        some = [i for i, label in enumerate(test.labels) if label == rare]
        others = [i for i, label in enumerate(test.labels) if label != rare][: len(some) // 2]
        balance = test.subset(sorted(some + others))
        yield from answered(run, balance, {"change": "other class balance", "task": task}, FEW)


def missing(config: Config, model: str, task: str, seed: int) -> Iterator[dict[str, Any]]:
    """Train on examples of all classes but the last, test on all."""
    asked = configured(config, model, task, seed, config.train)
    folder = config.out / f"missing-{Path(model).name}-{task}-{seed}"
    run = Run(asked, folder, progress=False, load=lambda c: loaded(c.model, device="cpu"))
    splits = run.splits
    last = len(splits.train.options) - 1
    seen = [i for i, label in enumerate(splits.train.labels) if label != last]
    run.splits = splits._replace(train=splits.train.subset(seen))
    if len(splits.train.options) > 2:  # of two options one is left, and nothing can be learned
        run.announce(FEW)
        yield from answered(run, splits.test, {"change": "missing class", "task": task}, FEW)


def answered(
    run: Run, test: Task[Any], where: dict[str, Any], methods: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Answer another test split by what the run has certified."""
    base = evaluate(run.model, test, settings=run.read)
    where |= {"model": run.model.name, "test": test.name, "seed": run.config.seed, "n": len(test)}
    for method in methods:
        treatment = METHODS[method].treat(run)
        outcomes = treatment.apply(run, test)
        yield where | measured(outcomes, base) | {"method": method}


def measured(outcomes: Outcomes, base: Outcomes) -> dict[str, Any]:
    changes = outcomes.transitions(base)
    score = spi(outcomes.accuracy, base.accuracy)
    return {"base": base.accuracy, "accuracy": outcomes.accuracy, "spi": score} | {
        "recoveries": changes["0->1"],
        "regressions": changes["1->0"],
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
