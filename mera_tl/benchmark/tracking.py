"""A grid's records in wandb: offline and without a key, unless WANDB_MODE says otherwise."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METRICS = ("accuracy", "error", "spi", "p_value", "steered_share", "relative_shift", "threshold")


def require_wandb() -> Any:
    """Return the package wandb, which nothing else here needs.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise ValueError(
            "wandb is not installed; `pip install mera-tl[wandb]`, or leave --wandb out."
        ) from None
    return wandb


def log_grid(
    wandb: Any, config: Mapping[str, Any], records: Sequence[Mapping[str, Any]], folder: Path
) -> Path:
    """Write a grid as one wandb run in its folder, one row a record; return where it is."""
    jobs = ("model", "task", "method", "space", "seed")
    columns = [*jobs, "decision", *METRICS, "failure"]
    settings = wandb.Settings(silent=True, console="off")
    mode = os.environ.get("WANDB_MODE", "offline")
    where = {"project": "mera_tl", "dir": str(folder), "mode": mode, "settings": settings}
    with wandb.init(name=folder.name, config=dict(config), **where) as run:
        rows = [[record.get(name) for name in columns] for record in records]
        run.log({"records": wandb.Table(columns=columns, data=rows)})
        for record in records:
            place = "/".join(str(record[name]) for name in jobs)
            run.summary.update({f"{place}/{name}": record.get(name) for name in METRICS})
        return Path(run.dir).parent
