"""Reading an error is not steering away from it: which direction corrects, and what must be read?

Expected: the paper's direction changes nothing or little; holding the true class fixed corrects
one-sided failures; a direction and a probe per answer correct two-sided ones too; all abstain where
there is nothing to correct; with shuffled classes MERA's rule loses its advantage (where a probe
per answer opens a gate and there are two options, knowing the class is hardly needed). Per model,
task and split: layer, scope, threshold and strength are chosen on training examples that fitted
nothing, then each arm has one exact test at delta = .05. Twenty seconds of processor time a cell.

Other organisms: `python -m experiments.train_organism --seed 1 --out organisms/organism_1`, then
pass `--models organisms/organism_1`. Real text: `--models .../sms-llama --tasks sms_spam --data-dir
... --template ... --rows 3500 --train 1312 --calibration 600 --test 600`.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from experiments import _reading_arms as arms
from mera_tl import collect, evaluate, load_model, load_task, storage
from mera_tl.inference import ReadSettings
from mera_tl.methods import Choices

RESULTS = Path(__file__).parent / "results" / Path(__file__).stem
FIXABLE = "spam_cue yesno_bias sentiment_fan spam_hint yesno_hint sentiment_hint choice_hint"
UNFIXABLE = "sentiment_quick sentiment_noise choice_unknown"


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = ("organism",)
    tasks: tuple[str, ...] = tuple(f"{FIXABLE} {UNFIXABLE}".split())
    seeds: tuple[int, ...] = (0, 1)
    """Of the split."""
    train: int = 1500
    """A third of these judge, the others fit."""
    calibration: int = 400
    test: int = 500
    rows: int | None = None
    """Use the first rows only: a model may have been trained on the others."""
    data_dir: str | None = None
    template: str | None = None
    ablations: bool = False
    """Shuffle the classes that directions are told, or hide most of them."""


READ = ReadSettings(progress=False)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    path = RESULTS / f"{storage.fingerprint(named(config))}.jsonl"
    records = storage.read_records(path)
    done = {(r["model"], r["task"], r["seed"]) for r in records}
    for folder in config.models:
        model = load_model(folder, device="cpu")
        for seed in config.seeds:
            for task in config.tasks:
                if (model.name, task, seed) not in done:
                    started = time.process_time()
                    rows = list(cell(config, model, task, seed))
                    seconds = time.process_time() - started
                    records += [row | {"cell_seconds": round(seconds)} for row in rows]
                    storage.write_records(path, records)
                    print(model.name, task, seed, f"{seconds:.0f} s", flush=True)


def named(config: Config) -> dict[str, Any]:
    """Return the configuration without this machine's paths."""
    models = [Path(model).name for model in config.models]
    return asdict(config) | {"models": models, "data_dir": None, "template": None}


def cell(config: Config, model: Any, name: str, seed: int) -> Iterator[dict[str, Any]]:
    """Search once, then certify and test every arm's own choice."""
    task = load_task(name, data_dir=config.data_dir, template=config.template)
    if config.rows is not None:
        keep = [i for i, example in enumerate(task.examples) if example.row < config.rows]
        task = task.subset(keep)
    sizes = {"train": config.train, "calibration": config.calibration, "test": config.test}
    splits = task.split(seed, **sizes)
    train, test = (collect(model, part, settings=READ) for part in (splits.train, splits.test))
    base = evaluate(model, splits.calibration, settings=READ)
    trial = arms.Cell(model, splits, train, test, base, READ, seed)
    where = {"model": model.name, "task": name, "seed": seed, "base": test.outcomes.accuracy}
    variants: dict[str, Callable[[arms.Fits], arms.Fits]] = {"": lambda fits: fits}
    if config.ablations:
        variants = {
            ", classes shuffled": lambda fits: arms.shuffled(trial, fits),
            ", 10 % of classes known": lambda fits: arms.partly_known(trial, fits, 0.1),
        }
    for suffix, change in variants.items():
        choices = Choices(seed=seed)
        if suffix:
            choices = replace(choices, directions=("controlled_contrastive", "answer_controlled"))
        for row in trial.run(choices, change):
            yield where | row | {"arm": row["arm"] + suffix}
    if not config.ablations:
        yield where | trial.flip(Choices(seed=seed))


if __name__ == "__main__":
    main(tyro.cli(Config))
