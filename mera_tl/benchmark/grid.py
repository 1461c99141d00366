"""Models x tasks x seeds x spaces, every method on each: a grid of runs that survives anything.

Each run has its own folder and shares its model, activations, probes and unsteered outcomes among
all methods; each method's record is written whole, so a grid that was killed goes on where it was.
A job that fails leaves a record with its reason, the others go on, and a second start tries it
again.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mera_tl import storage
from mera_tl.benchmark.cluster import map_jobs
from mera_tl.benchmark.config import GridConfig, RunConfig
from mera_tl.benchmark.contents import sizes_and_times
from mera_tl.benchmark.run import Run, load_configured, open_run
from mera_tl.inference.progress import is_watched
from mera_tl.methods.methods import find_methods
from mera_tl.models.model import Model

logger = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass(frozen=True)
class GridJob:
    """One run of a grid, as it is sent to a worker."""

    config: RunConfig
    methods: tuple[str, ...]
    folder: str
    cache: str


def run_grid(
    config: GridConfig,
    folder: str | Path,
    *,
    ray: str | None = None,
    gpus: float = 0.0,
    progress: bool = True,
    cache: str | Path | None = None,
) -> list[Record]:
    """Run every job that is not done; return and write one record per job, in a fixed order.

    `ray` and `gpus` are as in `cluster.map_jobs`; all nodes must see `folder`, the models and data.
    Runs share what they can through `cache`, by default a folder of the grid.

    Raises:
        ValueError: if a method is unknown, or another process works in the folder.
    """
    folder = Path(folder).resolve()
    for space in config.spaces:
        find_methods(config.methods, space)
    cache = folder / "shared" if cache is None else Path(cache).resolve()
    jobs = [
        GridJob(run, config.methods, str(folder / run_name(run)), str(cache))
        for run in config.runs()
    ]
    found: dict[int, list[Record]] = {}
    bar = tqdm(total=len(jobs), desc="runs", disable=not (progress and is_watched()))
    with storage.lock(folder), bar:
        storage.sweep(cache, older_than=0.0 if folder in cache.parents else 86400.0)
        for place, result in map_jobs(run_job, jobs, ray=ray, gpus=gpus):
            job = jobs[place]
            if isinstance(result, Exception):
                result = [_failure(job.config, name, result) for name in job.methods]
            found[place] = result
            bar.update()
            records = [record for place in sorted(found) for record in found[place]]
            storage.write_records(folder / "records.jsonl", records)
    return [record for place in sorted(found) for record in found[place]]


def run_job(job: GridJob) -> list[Record]:
    """Do one run; return one record per method, saying why where something failed."""
    records: list[Record] = []
    methods: Sequence[str] = job.methods
    try:
        opened = open_run(
            job.config, job.folder, progress=False, load=_latest_model, cache=Path(job.cache)
        )
        with opened as run:
            methods = run.suited(methods)
            run.announce(methods)
            for name in methods:
                records.append(_attempt(run, name))
    except Exception as error:  # names or data that do not load: all that is left fails alike
        left = methods[len(records) :]
        records += [_failure(job.config, name, error) for name in left]
    return records


def run_name(config: RunConfig) -> str:
    """Return the folder name of a run: readable, and different for different configurations."""
    names = [Path(config.model).name, Path(config.task).stem, f"seed{config.seed}"]
    if config.space != "raw":
        names.append(config.space)
    return "-".join((*names, storage.fingerprint(config.to_json())[:6]))


def _attempt(run: Run, method: str) -> Record:
    try:
        return run.record(method)
    except Exception as error:  # whatever it is, the other jobs go on
        return _failure(run.config, method, error)


def _failure(config: RunConfig, method: str, error: Exception) -> Record:
    logger.error("%s on %s, %s failed", config.model, config.task, method, exc_info=error)
    names = {"model": config.model, "task": config.task, "method": method}
    place = {"space": config.space, "seed": config.seed}
    return {**names, **place, "failure": f"{type(error).__name__}: {error}"}


class LatestModel:
    """Loads a model once for all runs in a row that ask for it; never holds two."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._model: Model | None = None

    def __call__(self, config: RunConfig) -> Model:
        """Return the model that a configuration names, at hand or loaded."""
        placed = (config.device, config.n_devices, config.engine)
        files = storage.fingerprint(sizes_and_times(Path(config.model)))  # it may be another by now
        key = (config.model, files, config.dtype, config.chat, config.system, *placed)
        if self._model is None or key != self._key:
            self._model = None  # the old one goes before the new one comes
            self._key, self._model = key, load_configured(config)
        return self._model


_latest_model = LatestModel()
"""Of this process: a worker that does one job after another loads each model once."""
