"""Files that are whole or absent: JSON, JSONL records, tensors.

Everything is written to a temporary name beside its target and renamed, so a reader never sees
half a file and a killed run leaves nothing but a stray `*.tmp`. Tensors are safetensors; nothing
here pickles. `kept` is the one way to find a folder again or to compute it. A file that cannot be
read or written is a ValueError of one sentence that names it.
"""

import hashlib
import json
import os
import shutil
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Json = Any
"""What `json` can write: dict, list, str, int, float, bool or None."""
Content = TypeVar("Content")


def fingerprint(value: Json) -> str:
    """Return 16 hex digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def path_of(value: str | Path) -> Path:
    """Return what a caller gave as a path.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ValueError(f"{value!r:.60} is no path; pass one, as 'a-folder'.")
    return Path(value)


def file_hash(path: Path) -> str:
    """Return 16 hex digits of the SHA-256 of a file's bytes."""
    with _told(path, "read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@contextmanager
def _told(path: str | Path, verb: str) -> Iterator[None]:
    """Say in one sentence what is wrong with a file that cannot be read or written."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and verb == "read":
            raise ValueError(
                f"There is no file {path}; run the step that writes it first."
            ) from None
        raise ValueError(
            f"{path} cannot be {verb} ({error.strerror or error}); check the path, its permissions "
            "and the space on the disk."
        ) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name; rename it to `path` on success, remove it on failure.

    Raises:
        ValueError: if the file cannot be written.
    """
    path = Path(path)
    # Not by the process's number: on several nodes of one file system they may be the same.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with _told(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path_of(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def reopen(last: Path) -> None:
    """Remove the file that says of a folder that it is whole, before others in it are changed.

    Else a process that is killed in between leaves new files beside what is said of the old ones.
    """
    with _told(last, "written"):
        last.unlink(missing_ok=True)


def write_json(path: str | Path, value: Json) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1, default=_plain) + "\n")


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file.

    Raises:
        ValueError: if the file is missing, unreadable or not UTF-8.
    """
    try:
        with _told(path, "read"):
            return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); delete it.") from None


def run_python(path: str | Path) -> dict[str, Any]:
    """Run a user's Python file as it is now; return what it defines.

    Not by an import: that takes compiled code of the file that may be older than its last change.

    Raises:
        ValueError: if the file is missing or unreadable; and whatever it raises.
    """
    with _told(path, "read"):
        source = Path(path).read_bytes()
    defined: dict[str, Any] = {"__name__": Path(path).stem, "__file__": str(path)}
    exec(compile(source, str(path), "exec"), defined)
    return defined


def read_json(path: str | Path) -> Json:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: if the file is missing, unreadable or no JSON object.
    """
    value = _parse(read_text(path), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object; delete it and run the step again.")
    return value


def _parse(text: str, title: str) -> Json:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{title} is not JSON ({error}); delete it and run the step again."
        ) from None


def _plain(value: object) -> Json:
    """Turn NumPy scalars and arrays into what `json` knows."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value)


def read_records(path: str | Path) -> list[dict[str, Json]]:
    """Read a JSONL file of records; an absent file holds none.

    Raises:
        ValueError: if the file is unreadable or a line of it is not a JSON object.
    """
    if not Path(path).exists():
        return []
    records = [
        _parse(line, f"Line {number} of {path}")
        for number, line in enumerate(read_text(path).split("\n"), 1)
        if line.strip()
    ]
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"Record {number} of {path} is not a JSON object; delete the file.")
    return records


def write_records(path: str | Path, records: Sequence[Mapping[str, Json]]) -> None:
    """Write a JSONL file of records whole or not at all."""
    write_text(path, "".join(json.dumps(record, default=_plain) + "\n" for record in records))


def require_folder(folder: Path) -> None:
    """Refuse a path that is no folder and cannot become one, before work is put into it.

    Raises:
        ValueError: naming the path.
    """
    with _told(folder, "written"):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise NotADirectoryError(20, "Not a folder")
        if not os.access(there, os.W_OK):
            raise PermissionError(13, "Permission denied")


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Hold a folder for one process; the operating system releases it if the process dies.

    Raises:
        ValueError: if another process holds it, or it is no folder that can be written.
    """
    import filelock

    folder = Path(folder)
    with _told(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(folder / ".lock", timeout=0)
        try:
            held.acquire()
        except filelock.Timeout:
            raise ValueError(
                f"{folder} is in use by another process; wait for it to end, or choose another "
                "--out."
            ) from None
    try:
        yield
    finally:
        held.release()


def kept(
    folder: Path,
    last: str,
    make: Callable[[Path], object],
    load: Callable[[Path], Content],
    *,
    cache: Path | None = None,
    key: Callable[[], Json] | None = None,
) -> Content:
    """Load a folder's content; where it is missing, take it from the cache or make it first.

    `make` writes into the folder it is given, the file `last` at the end. `cache` holds what runs
    share, by a hash of `key()`: all that the content depends on. Several processes may use a cache:
    files are whole or absent, and what two make of one key is the same. The folder gets links, or
    copies where it lies on another file system, so it does not need the cache later.

    Raises:
        ValueError: if what is there is damaged, naming the folder; or as `make`.
    """
    if not (folder / last).exists():
        if cache is None or key is None:
            make(folder)
        else:
            shared = cache / fingerprint(key())
            if not (shared / last).exists():
                _make_apart(shared, make)
            link(shared, folder, last)
    with reading(folder):
        return load(folder)


def _make_apart(folder: Path, make: Callable[[Path], object]) -> None:
    """Make a folder under another name, so that nobody links from it while it is made again."""
    if folder.exists():  # what a process left that was killed before there were such names
        make(folder)
        return
    apart = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        make(apart)
        with suppress(OSError):  # another process has made the same meanwhile
            os.replace(apart, folder)
    finally:
        shutil.rmtree(apart, ignore_errors=True)


@contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Say in one sentence that what was read from a folder is not what it should hold.

    Raises:
        ValueError: naming the folder.
    """
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{folder} is damaged ({type(error).__name__}: {error}); delete it and start again."
        ) from None


def link(source: Path, folder: Path, last: str) -> None:
    """Link a folder's files into another, or copy them across file systems; `last` comes last."""
    names = {path.name for path in source.iterdir() if not path.name.endswith(".tmp")} - {last}
    for name in (*sorted(names), last):
        with replacing(folder / name) as temporary:
            try:
                os.link(source / name, temporary)
            except OSError:
                shutil.copyfile(source / name, temporary)


def sweep(folder: Path, *, older_than: float = 0.0) -> None:
    """Remove what killed processes were writing; `older_than` seconds spares those at work."""
    for stray in list(folder.rglob(".*.tmp")):
        if stray.exists() and time.time() - stray.stat().st_mtime >= older_than:
            shutil.rmtree(stray) if stray.is_dir() else stray.unlink()


def save_tensors(
    path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write torch tensors to a safetensors file whole or not at all."""
    from safetensors.torch import save_file

    with replacing(Path(path)) as temporary:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, temporary, metadata=dict(metadata or {}))


def load_tensors(path: str | Path) -> dict[str, Any]:
    """Lay a safetensors file under torch tensors: what is looked at is read, then.

    Writing to them changes no file.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with _told(path, "read"):
            return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete it and run the step again."
        ) from None


class TensorFile:
    """A safetensors file of known shapes, written row by row; it appears when complete.

    Rows go straight to the file (`pwrite`), so memory does not grow with their number. Use as a
    context manager; leaving it normally renames the file into place, an exception removes it.
    """

    def __init__(self, path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path = Path(path)
        self._shapes = dict(shapes)
        header: dict[str, Json] = {}
        start = 0
        for name, shape in shapes.items():
            size = 4 * int(np.prod(shape))
            header[name] = {
                "dtype": "F32",
                "shape": list(shape),
                "data_offsets": [start, start + size],
            }
            start += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._head = struct.pack("<Q", len(text)) + text
        self._starts = {n: len(self._head) + header[n]["data_offsets"][0] for n in shapes}
        self.size = len(self._head) + start
        """Of the file, in bytes."""

    def __enter__(self) -> "TensorFile":
        self._context = replacing(self.path)
        self._file = open(self._context.__enter__(), "w+b")  # noqa: SIM115  closed in __exit__
        self._file.write(self._head)
        self._file.truncate(self.size)
        self._file.flush()
        return self

    def write(self, name: str, row: int, values: np.ndarray) -> None:
        """Write one float32 row: the values at index `row` of the first axis of `name`."""
        shape = self._shapes[name]
        if values.dtype != np.float32 or values.shape != shape[1:]:
            raise ValueError(
                f"A row of {name!r} is float32 of shape {shape[1:]}, "
                f"got {values.dtype} of shape {values.shape}."
            )
        offset = self._starts[name] + row * values.nbytes
        os.pwrite(self._file.fileno(), np.ascontiguousarray(values).tobytes(), offset)

    def __exit__(self, *exception: Any) -> None:
        self._file.close()
        self._context.__exit__(*exception)
