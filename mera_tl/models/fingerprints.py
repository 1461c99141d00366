"""What a model is, by all of its bytes, and what was found out about it, kept for the next time.

Reading half a gigabyte to hash it takes longer than loading it lazily, so hashes of files and the
results of load checks are kept in a small folder: $MERA_CACHE, or ~/.cache/mera_tl. Deleting it
costs time only, and where it cannot be written, nothing is kept.
"""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from mera_tl import storage

_IGNORED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Fields of a config that say nothing about what the model computes."""


def cache_folder() -> Path:
    """Return the folder where hashes and check results are kept."""
    return Path(os.environ.get("MERA_CACHE") or Path.home() / ".cache" / "mera_tl")


def recall(kind: str, key: storage.Json, make: Callable[[], str]) -> str:
    """Return the text that was kept under a key, or make it and keep it."""
    path = cache_folder() / kind / f"{storage.fingerprint(key)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(storage.read_json(path)["text"])
    text = make()
    with contextlib.suppress(OSError, ValueError):  # a read-only home costs the time again
        storage.write_json(path, {"text": text, "of": key})
    return text


def fingerprint(config: dict[str, storage.Json], files: Sequence[Path]) -> str:
    """Hash a model's configuration and every byte of its weights."""
    settings = {name: value for name, value in config.items() if name not in _IGNORED}
    hashes = {path.name: file_hash(path) for path in files}
    return storage.fingerprint([json.loads(json.dumps(settings, default=str)), hashes])


def file_hash(path: Path) -> str:
    """Return the XXH3 hash of a file's bytes, kept beside its path, size and times of change.

    One of the times is the system's, which no copy of a file brings along.
    """
    path = path.resolve()
    stat = path.stat()
    key = [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return recall("hashes", key, lambda: _hash(path))


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(1 << 22))
    with open(path, "rb", buffering=0) as file:
        while n_read := file.readinto(buffer):
            digest.update(buffer[:n_read])
    return digest.hexdigest()
