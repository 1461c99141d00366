"""What the folder of a run began with: options, data, weights, SAEs. Others are refused."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mera_tl import storage
from mera_tl.benchmark.config import RunConfig
from mera_tl.certificate.description import describe_space
from mera_tl.models.identity import identity_of, manifest_of
from mera_tl.models.model import Model
from mera_tl.sae.loading import default_source
from mera_tl.steering.spaces import Space
from mera_tl.tasks.task import Splits

FORMAT = 1
"""Of records; raised when a field changes its meaning."""
CONTENT, CONFIG = "content.json", "config.json"
_HASHED = {
    "model": "the model's weights",
    "eos_ids": "the tokens that end its replies",
    "tokenizer": "its tokenizer",
    "space": "its SAEs",
}
"""What a folder is made of besides data and code, in the words of an error."""


def cheap_content(config: RunConfig, splits: Splits) -> dict[str, Any]:
    """Say what a run is made of, as far as that is known without loading its model."""
    source = config.sae or default_source(config.model)
    saes = sorted(Path(source).glob("layer_*")) if config.space == "sae" else []
    texts = [[example.text for example in split.examples] for split in splits]
    return {
        "format": FORMAT,
        "mera_tl": version("mera-tl"),
        # What may be cut of a prompt is no part of the data's hash.
        "texts": storage.fingerprint(texts) if config.truncate else "",
        "data": {split.role: split.data_hash for split in splits},
        "model_files": sizes_and_times(Path(config.model)),
        "sae_files": [sizes_and_times(path) for path in saes],
    }


def hashed_content(model: Model, space: Space) -> dict[str, Any]:
    """Say by hashes what a run's model and SAEs are."""
    told = identity_of(model)
    return {
        "model": told["model_fingerprint"],
        "eos_ids": told["eos_ids"],
        "tokenizer": told["tokenizer"],
        "space": describe_space(space),
    }


def require_options(folder: Path, config: RunConfig) -> None:
    """Refuse a folder that began with another configuration.

    Raises:
        ValueError: naming the first option that differs, and the others.
    """
    wanted = config.to_json()
    # A field that is younger than the folder has its default there.
    kept = {f.name: f.default for f in fields(RunConfig)} | storage.read_json(folder / CONFIG)
    differ = [name for name in wanted if kept.get(name) != wanted[name]]
    if differ:
        first, *others = differ
        also = f"; also {', '.join(others)}" if others else ""
        raise ValueError(
            f"{folder} holds a run with another configuration ({first} was {kept.get(first)!r}, is "
            f"{wanted[first]!r}{also}); choose another folder (--out), or "
            "delete this one (`mera run --overwrite`)."
        )


def require_content(
    folder: Path, now: dict[str, Any], hashed: Callable[[], dict[str, Any]]
) -> None:
    """Refuse a folder that began with other data, weights or code under the same names.

    Raises:
        ValueError: naming what differs.
    """
    kept = storage.read_json(folder / CONTENT)
    kept = {"texts": now["texts"]} | kept  # which folders that are older lack
    names = ("format", "mera_tl", "data", "texts")
    differ = [name for name in names if kept.get(name) != now[name]]
    # Files of another size or time may hold the same, copied; then their hashes are the same.
    if any(kept.get(name, now[name]) != now[name] for name in ("model_files", "sae_files")):
        differ += _differing(kept, hashed())
    _refuse(folder, differ)


def require_weights(folder: Path, model: Model) -> None:
    """Refuse a model other than the folder's, if that has begun; a name of the hub may move on.

    Raises:
        ValueError: naming what differs.
    """
    path = folder / CONTENT
    if model.fingerprint and path.exists():  # a plan's model has no weights
        now = {"model": manifest_of(model)["model_fingerprint"], "eos_ids": [*model.eos_ids]}
        _refuse(folder, _differing(storage.read_json(path), now))


def _differing(kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return in words what a folder is made of and is not what it was; old ones lack some."""
    both = kept.keys() & now.keys()
    return [what for name, what in _HASHED.items() if name in both and kept[name] != now[name]]


def _refuse(folder: Path, differ: Sequence[str]) -> None:
    if differ:
        raise ValueError(
            f"{folder} holds a run with other content under the same names (changed: "
            f"{', '.join(differ)}); choose another --out, or restore what it began with."
        )


def sizes_and_times(path: Path) -> dict[str, list[int]]:
    """Return size and time of a local model's files; nothing for a name of the hub."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    stats = {file.name: file.stat() for file in files if file.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
