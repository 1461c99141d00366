"""Which methods correct errors, on which tasks, and which do harm?

Every method on every task of the embedded model, three splits each, certified or abstaining.
Expected: fixed strengths harm; MERA along its own probe mostly abstains; `searched` and `flip`
correct the planted failures; where labels are noise all that can abstain does. An hour on one core;
the latents of SAEs (--spaces sae, methods that work there) forty minutes. Killed, it goes on.

    python -m experiments.methods_by_task
    python -m experiments.methods_by_task --models M --tasks sms_spam --data-dir D --template F
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from experiments.errata import ORGANISM_TASKS
from mera_tl import storage
from mera_tl.benchmark import GridConfig, run_grid, table
from mera_tl.methods import METHODS

RESULTS = Path(__file__).parent / "results" / Path(__file__).stem
LEFT_OUT = ("certificate", "versions", "n_train", "n_calibration", "details")
"""What the figures do not need: run folders keep it."""
DEFAULT = GridConfig(
    models=("organism",),
    tasks=ORGANISM_TASKS,
    methods=tuple(METHODS),
    seeds=(0, 1, 2),
    train="1500",
    calibration="500",
    test="500",
    free_text=50,
)


def main(
    config: Annotated[GridConfig, tyro.conf.OmitArgPrefixes] = DEFAULT,
    out: Path = Path("runs/methods_by_task"),
) -> None:
    if config.spaces != ("raw",):
        config = replace(config, methods=tuple(m for m in config.methods if METHODS[m].in_latents))
    records = run_grid(config, out)
    name = "-".join((*(Path(model).name for model in config.models), *config.spaces))
    kept = [{k: v for k, v in record.items() if k not in LEFT_OUT} for record in records]
    storage.write_records(RESULTS / f"{name}.jsonl", kept)
    means = table(records).groupby("method", sort=False)
    print(means[["accuracy", "SPI", "0->1", "1->0"]].mean().round(3).to_string())


if __name__ == "__main__":
    tyro.cli(main)
