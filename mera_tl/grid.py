"""Models x tasks x seeds, every method on each: a grid of runs that survives anything.

Each run has its own folder and shares its model, activations, probes and unsteered outcomes among
all methods; each method's record is written whole, so a grid that was killed goes on where it was.
A job that fails leaves a record with its reason, the others go on, and a second start tries it
again.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mera_tl import store
from mera_tl.benchmark import Run, load_configured, open_run
from mera_tl.config import GridConfig, RunConfig
from mera_tl.methods import find_method
from mera_tl.models import Model

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def run_grid(config: GridConfig, folder: str | Path, *, progress: bool = True) -> list[Record]:
    """Run every job that is not done; return and write one record per job.

    Raises:
        ValueError: if a method is unknown, or another process works in the folder.
    """
    folder = Path(folder)
    for name in config.methods:
        find_method(name)
    runs, records, load = config.runs(), [], _LatestModel()
    total = len(runs) * len(config.methods)
    with (
        store.lock(folder),
        tqdm(total=total, desc="jobs", disable=None if progress else True) as bar,
    ):
        for run in runs:
            for record in _records(run, config.methods, folder / run_name(run), load):
                records.append(record)
                bar.update()
            store.write_records(folder / "records.jsonl", records)
    return records


def run_name(config: RunConfig) -> str:
    """Return the folder name of a run: readable, and different for different configurations."""
    names = (Path(config.model).name, Path(config.task).stem, f"seed{config.seed}")
    return "-".join((*names, store.fingerprint(config.to_json())[:6]))


def _records(
    config: RunConfig, methods: tuple[str, ...], folder: Path, load: "_LatestModel"
) -> Iterator[Record]:
    """Yield one record per method; where something fails, a record that says why."""
    left = list(methods)
    try:
        with open_run(config, folder, progress=False, load=load) as run:
            while left:
                record = _attempt(run, left[0])
                del left[0]
                yield record
    except Exception as error:  # names or data that do not load: all that is left fails alike
        yield from (_failure(config, name, error) for name in left)


def _attempt(run: Run, method: str) -> Record:
    try:
        return run.record(method)
    except Exception as error:  # whatever it is, the other jobs go on
        return _failure(run.config, method, error)


def _failure(config: RunConfig, method: str, error: Exception) -> Record:
    logger.error("%s on %s, %s failed", config.model, config.task, method, exc_info=error)
    names = {"model": config.model, "task": config.task, "method": method, "seed": config.seed}
    return {**names, "failure": f"{type(error).__name__}: {error}"}


class _LatestModel:
    """Loads a model once for all runs in a row that ask for it; never holds two."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._model: Model | None = None

    def __call__(self, config: RunConfig) -> Model:
        key = (config.model, config.dtype, config.device, config.chat)
        if self._model is None or key != self._key:
            self._model = None  # the old one goes before the new one comes
            self._key, self._model = key, load_configured(config)
        return self._model
