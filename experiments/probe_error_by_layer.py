"""In which layer, at which position and by which probe can a model's errors be read?

All kinds and penalties on every layer, chosen on shared folds of the training examples and reported
on test examples that no fold has seen, beside a control task of shuffled targets. Expected: errors
are read well above the dummy from the early layers on; strong regularisation costs little. About a
minute a task on one core, collecting included.

    python -m experiments.probe_error_by_layer --model organism --tasks yesno_hint spam_cue
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
import tyro

import mera_tl
from mera_tl.probing import probe_path, selectivity
from mera_tl.store import fingerprint, write_records

RESULTS = Path(__file__).parent / "results" / "probe_error_by_layer"


@dataclass(frozen=True)
class Config:
    model: str = "organism"
    tasks: tuple[str, ...] = ("yesno_hint", "spam_cue", "sentiment_fan", "choice_hint")
    data_dir: str | None = None
    template: str | None = None
    n: int = 600
    """Examples to fit and choose on."""
    n_test: int = 400
    """Examples to report on."""
    positions: tuple[str, ...] = ("last", "exact")
    seed: int = 0


def table(config: Config, model: mera_tl.Model, name: str) -> pd.DataFrame:
    task = mera_tl.load_task(name, data_dir=config.data_dir, template=config.template)
    splits = task.split(
        train=config.n, calibration=min(100, config.n), test=config.n_test, seed=config.seed
    )
    train, test = (mera_tl.collect(model, each) for each in (splits.train, splits.test))
    rows = probe_path(train, untouched=test, positions=config.positions, seed=config.seed)
    control = selectivity(train, seed=config.seed)
    rows = rows.merge(
        control[["layer", "kind", "penalty", "auroc_control", "r2_control"]],
        on=["layer", "kind", "penalty"],
        how="left",
    )
    accuracy = {"accuracy": train.outcomes.accuracy, "accuracy_test": test.outcomes.accuracy}
    return rows.assign(model=config.model, task=name, **accuracy)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    model = mera_tl.load_model(config.model)
    tables = [table(config, model, name) for name in config.tasks]
    path = RESULTS / f"{fingerprint(asdict(config))}.jsonl"
    write_records(path, pd.concat(tables).round(5).to_dict("records"))
    print(path)


if __name__ == "__main__":
    main(tyro.cli(Config))
