"""Does what corrects one task correct another with the same failure?

The organism follows hints in four tasks: about spam, yes or no, sentiment, and one of four choices.
Probe and directions of one task are put to work on another, whose training examples choose layer,
scope and threshold, as for its own. Two arms: *directions* are foreign and the probe is the
task's own; *both* are foreign. Beside them the task's own. Directions per answer stay at home: the
options differ. Expected: hint-following is one habit of the model, so what corrects it on yes or no
should correct it elsewhere. Run time: five minutes of processor time a split.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from experiments import _reading_arms as arms
from mera_tl import collect, evaluate, load_model, load_task, storage
from mera_tl.inference import ReadSettings
from mera_tl.methods import Choices, fit_probe_sets

RESULTS = Path(__file__).parent / "results" / Path(__file__).stem
DIRECTIONS = ("contrastive", "controlled_contrastive")


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = ("organism",)
    tasks: tuple[str, ...] = ("yesno_hint", "choice_hint", "spam_hint", "sentiment_hint")
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the split."""
    train: int = 1500
    calibration: int = 400
    test: int = 500


def main(config: Config) -> None:
    torch.set_num_threads(1)
    names = [Path(model).name for model in config.models]
    plan = storage.fingerprint(asdict(config) | {"models": names})
    path = RESULTS / f"{plan}.jsonl"
    records = storage.read_records(path)
    done = {(r["model"], r["seed"]) for r in records}
    for folder in config.models:
        model = load_model(folder, device="cpu")
        for seed in config.seeds:
            if (model.name, seed) not in done:
                started = time.process_time()
                records += across(config, model, seed)
                storage.write_records(path, records)
                print(model.name, seed, f"{time.process_time() - started:.0f} s", flush=True)


def across(config: Config, model: Any, seed: int) -> Iterator[dict[str, Any]]:
    """Try every task's probe and directions on every task of one split."""
    sizes = {"train": config.train, "calibration": config.calibration, "test": config.test}
    choices = Choices(directions=DIRECTIONS, seed=seed)
    read = ReadSettings(progress=False)
    trials: dict[str, arms.Cell] = {}
    for name in config.tasks:
        splits = load_task(name).split(seed, **sizes)
        train, test = (collect(model, part, settings=read) for part in (splits.train, splits.test))
        base = evaluate(model, splits.calibration, settings=read)
        trials[name] = arms.Cell(model, splits, train, test, base, read, seed)
    fits = {name: fit_probe_sets(trial.learned, choices) for name, trial in trials.items()}
    for target, trial in trials.items():
        for source, foreign in fits.items():
            for taken, change in ways(foreign).items():
                if source == target and taken == "directions":
                    continue  # the same as both
                for row in trial.run(choices, change):
                    if row["arm"] in DIRECTIONS:
                        place = {"model": model.name, "seed": seed, "source": source}
                        base = trial.test.outcomes.accuracy
                        yield place | {"task": target, "taken": taken, "base": base} | row


def ways(foreign: arms.Fits) -> Mapping[str, Callable[[arms.Fits], arms.Fits]]:
    """Return what may be taken from another task, as changes of a task's own fits."""

    def directions(own: arms.Fits) -> arms.Fits:
        return {
            penalty: replace(fitted, directions=foreign[penalty].directions)
            for penalty, fitted in own.items()
            if penalty is not None
        }

    def both(_: arms.Fits) -> arms.Fits:
        return {penalty: fitted for penalty, fitted in foreign.items() if penalty is not None}

    return {"directions": directions, "both": both}


if __name__ == "__main__":
    main(tyro.cli(Config))
