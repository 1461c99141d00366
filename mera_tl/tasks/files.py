"""Rows as they stand at their source: plain files, `save_to_disk` folders, the Hugging Face hub.

Nothing is renamed, sorted or left out here, so a row's place in `Table.rows` is its row number for
good. Text is cut into lines at line feeds only: messages may hold other characters that Python
counts as line ends, and quotes that are no CSV quotes.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows in their source's order."""

    title: str
    """What messages call the source."""
    rows: Iterable[Row]
    """To be read once: the rows of large sources come one at a time."""
    files: tuple[Path, ...] = ()


def text_of(value: Any) -> str:
    """Return a value as text without blanks around it; "" for none.

    JSON and Parquet have numbers that are none: NaN, which no number equals, itself included.
    """
    return "" if value is None or value != value else str(value).strip()


def read_files(paths: Sequence[Path], *, line: str = "", encoding: str = "utf-8") -> Table:
    """Read plain files, one after the other, in the order given.

    The file's type says how, unless `line` does: a pattern with one named group for each column.

    Raises:
        ValueError: if a file is missing, empty, wrongly encoded, or not of its type.
    """
    rows: list[Row] = []
    for path in paths:
        found = _read_file(path, line, encoding)
        if not found:
            raise ValueError(f"{path} holds no row; get the file again, or name another one.")
        rows.extend(found)
    title = paths[0].name if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} files)"
    return Table(title, rows, tuple(paths))


def _read_file(path: Path, line: str, encoding: str) -> Sequence[Row]:
    """Read one file, and say in one sentence what is wrong with it."""
    suffix = path.suffix.lower()
    if not line and suffix != ".parquet" and suffix not in _READERS:
        raise ValueError(f"{path} is neither .parquet nor {', '.join(_READERS)}; convert the file.")
    try:
        if suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(path).to_pylist()
        text = path.read_bytes().decode(encoding).removeprefix("\ufeff")
        return _matched(text, line) if line else _READERS[suffix](text)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror or error}); check the path of the data."
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not {encoding} (byte {error.start}); "
            "convert it, or give its `encoding` in the task's file."
        ) from None
    except LookupError:
        raise ValueError(f"`encoding: {encoding}` is not known; write for example utf-8.") from None
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error}); get the file again.") from None


def _lines(text: str) -> list[str]:
    """Cut at line feeds only; blank lines at the end do not count."""
    text = text.rstrip("\r\n")
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []


def _matched(text: str, pattern: str) -> Sequence[Row]:
    """Read lines by a pattern; every line is a row, so row numbers are line numbers."""
    rows: list[Row] = []
    for number, line in enumerate(_lines(text)):
        match = re.fullmatch(pattern, line)
        if line.strip() and not match:
            raise ValueError(f"line {number + 1} is not of the form {pattern}")
        rows.append(match.groupdict() if match else dict.fromkeys(re.compile(pattern).groupindex))
    return rows


def _json_lines(text: str) -> Sequence[Row]:
    """Read one JSON object a line."""
    rows: list[Row] = []
    for number, line in enumerate(_lines(text)):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number + 1} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number + 1} is not a JSON object")
        rows.append(row)
    return rows


def _csv(text: str) -> Sequence[Row]:
    """Read comma-separated values with a header; quoted fields may hold line ends."""
    return _delimited(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def _tsv(text: str) -> Sequence[Row]:
    """Read tab-separated values with a header; a quote is a character like any other."""
    return _delimited(csv.DictReader(_lines(text), delimiter="\t", quoting=csv.QUOTE_NONE))


def _delimited(reader: Any) -> Sequence[Row]:
    """Refuse rows that are longer or shorter than the header: their columns are not known."""
    header = [name.strip() for name in reader.fieldnames or ()]
    if len({name.casefold() for name in header} - {""}) < len(header):
        raise ValueError(f"the header {', '.join(header)} has a column twice, or one without name")
    limit = csv.field_size_limit(2**31 - 1)  # of Python's own it is no more than 131,072 characters
    try:
        rows = list(reader)
    finally:
        csv.field_size_limit(limit)
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has not as many fields as the header")
    return rows


_READERS = {".csv": _csv, ".tsv": _tsv, ".jsonl": _json_lines}


def read_keys(path: Path) -> dict[str, Any]:
    """Read the keys of a TOML or YAML file.

    Raises:
        ValueError: if the file is missing, damaged, or holds no keys.
    """
    import tomllib

    import yaml

    try:
        text = path.read_bytes().decode().removeprefix("\ufeff")
        keys = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check the path.") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a TOML or YAML file ({reason}); correct it.") from None
    if not isinstance(keys, dict):
        raise ValueError(f"{path} holds no keys; write `key: value` lines into it.")
    return keys


def read_template(path: Path) -> str:
    """Read a template byte for byte: white space at its ends is part of the prompt.

    A byte order mark is none of it: some editors write one.

    Raises:
        ValueError: if the file is missing, empty or not UTF-8.
    """
    try:
        template = path.read_bytes().decode().removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The template {path} cannot be read ({error}); check it.") from None
    if not template.strip():
        raise ValueError(f"The template {path} is empty; write the prompt into it.")
    return template


def is_saved(folder: Path) -> bool:
    """Tell whether `datasets` wrote this folder with `save_to_disk`."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_saved(folder: Path, split: str) -> Table:
    """Read a folder written by `save_to_disk`: a data set, or a dictionary that holds `split`.

    The split of a dictionary that has only one may have any name.

    Raises:
        ValueError: if the folder is damaged or has several splits, none of them called `split`.
    """
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is damaged ({error}); save the data set again.") from None
    if not isinstance(found, Dataset):
        splits = [str(name) for name in found]
        if split not in splits and len(splits) != 1:
            raise ValueError(f"{folder} has the splits {', '.join(splits)}; {split!r} is needed.")
        found = found[split if split in splits else splits[0]]
    files = tuple(Path(cache["filename"]) for cache in found.cache_files)
    return Table(str(folder), _plain_rows(found), files)


def read_hub(hub_id: str, config: str | None, split: str) -> Table:
    """Read one split from the Hugging Face hub, or from its local cache.

    Raises:
        ValueError: if there is neither a network nor a cached copy, or the data set has changed.
    """
    from datasets import load_dataset

    try:
        found = load_dataset(hub_id, config, split=split)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"{hub_id} cannot be read from the Hugging Face hub ({reason}); without a network, "
            "give a folder that holds the data with --data-dir."
        ) from None
    return Table(hub_id, _plain_rows(found))


def _plain_rows(dataset: Any) -> Iterator[Row]:
    """Name class labels, and take the line end off texts that the hub's copies end with one."""
    names = {
        column: feature.names
        for column, feature in dataset.features.items()
        if hasattr(feature, "names")
    }
    for row in dataset:
        plain = dict(row)
        for column, value in row.items():
            if column in names and value in range(len(names[column])):
                plain[column] = names[column][value]
            elif isinstance(value, str):
                plain[column] = value.rstrip("\r\n")
        yield plain
