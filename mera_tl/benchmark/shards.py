"""Collect one big task in shards, each somewhere else: a worker that is lost costs one shard.

A shard is some of the batches that one process would run, whole, so it computes the same numbers;
it is an ordinary folder of activations, named by its content, that appears when complete. Joined
in the order of the task, shards are byte for byte what one process writes (on like processors and
with like numbers of threads), at the memory of a row at a time.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from tqdm.auto import tqdm

from mera_tl import storage
from mera_tl.benchmark.cluster import map_jobs
from mera_tl.benchmark.config import RunConfig
from mera_tl.benchmark.run import Run
from mera_tl.inference.activations import Activations, collect
from mera_tl.inference.answers import ReadSettings, by_length
from mera_tl.inference.evaluation import tokenize_task
from mera_tl.inference.progress import is_watched


@dataclass(frozen=True)
class Shard:
    """Some examples of a run's training split, as they are sent to a worker."""

    config: RunConfig
    places: tuple[int, ...]
    """In the training split."""
    folder: str


def collect_shards(
    run: Run, n_shards: int, *, ray: str | None = None, gpus: float = 0.0
) -> Activations:
    """Collect the training split of an opened run in shards, and join them in its folder.

    `ray` and `gpus` are as in `cluster.map_jobs`; all nodes must see the folder, model and data.
    Shards that are there from an earlier start are not computed again.

    Raises:
        ValueError: if a shard failed; the others are kept.
    """
    folder = run.folder.resolve() / "activations"
    if (folder / "manifest.json").exists():
        return Activations.load(folder)
    prompts = tokenize_task(run.model, run.splits.train, run.read)
    dealt = deal(prompts, run.read, n_shards)
    shards = [Shard(run.config, p, str(folder / "shards" / _name(run, p))) for p in dealt]
    failed: list[Exception] = []
    with tqdm(total=len(shards), desc="shards", disable=not is_watched()) as bar:
        work = collect_shard if ray is not None else lambda shard: _collect(run, shard)
        for _, result in map_jobs(work, shards, ray=ray, gpus=gpus):
            if isinstance(result, Exception):
                failed.append(result)
            bar.update()
    if failed:
        first = str(failed[0]).splitlines()[0] if str(failed[0]) else type(failed[0]).__name__
        raise ValueError(
            f"{len(failed)} of {len(shards)} shards failed (first: {first}); the others are kept "
            f"in {folder / 'shards'}: mend that and start again."
        )
    return join(run, shards, folder)


def deal(
    prompts: Sequence[Sequence[int]], settings: ReadSettings, n_shards: int
) -> list[tuple[int, ...]]:
    """Deal batches in turn, longest first, so that shards take about equally long.

    Batches stay whole, and are found again when a shard is batched by itself.
    """
    batches = list(by_length(prompts, settings))
    dealt = [batches[start::n_shards] for start in range(min(n_shards, len(batches)))]
    return [tuple(place for batch in mine for place in batch) for mine in dealt]


def collect_shard(shard: Shard) -> None:
    """Collect one shard in this process, unless it is there."""
    _collect(_run_of(shard.config), shard)


@lru_cache(maxsize=1)
def _run_of(config: RunConfig) -> Run:
    """Of this process: a worker that collects one shard after another loads model and data once."""
    return Run(config, Path(), progress=False)


def _collect(run: Run, shard: Shard) -> None:
    if not (Path(shard.folder) / "manifest.json").exists():
        settings = replace(run.read, progress=False)
        collect(
            run.model, run.splits.train.subset(shard.places), settings=settings, out=shard.folder
        )


def join(run: Run, shards: Sequence[Shard], folder: Path) -> Activations:
    """Write shards in the order of the task as one folder of activations; remove them."""
    task, records = run.splits.train, {}
    manifest = storage.read_json(Path(shards[0].folder) / "manifest.json")
    parts = [storage.load_tensors(Path(s.folder) / "activations.safetensors") for s in shards]
    shapes = {name: (len(task), *part.shape[1:]) for name, part in parts[0].items()}
    with storage.TensorFile(folder / "activations.safetensors", shapes) as file:
        for shard, part in zip(shards, parts, strict=True):
            found = storage.read_records(Path(shard.folder) / "outcomes.jsonl")
            records |= dict(zip(shard.places, found, strict=True))
            for name, values in part.items():
                for place, row in zip(shard.places, values, strict=True):
                    file.write(name, place, row.numpy())
    storage.write_records(folder / "outcomes.jsonl", [records[place] for place in sorted(records)])
    whole = {"data_hash": task.data_hash, "n": len(task), "repeats": task.repeats}
    storage.write_json(folder / "manifest.json", {**manifest, **whole})
    shutil.rmtree(folder / "shards")
    return Activations.load(folder)


def _name(run: Run, places: tuple[int, ...]) -> str:
    read = replace(run.read, progress=False)
    content = run.splits.train.subset(places).data_hash
    return storage.fingerprint([run.model.manifest, content, str(read)])
