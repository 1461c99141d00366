"""What a person sees in a terminal: tables of 80 columns, a verdict per task, a line per stage."""

import json
import logging
import math
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 80
"""Where there is no terminal whose width could be asked for."""


def console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """Return what prints: colours in a terminal, plain text of 80 columns in a file."""
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else WIDTH
    return Console(highlight=False, quiet=quiet, stderr=stderr, width=width, soft_wrap=False)


def start_logging(*, verbose: bool = False, quiet: bool = False) -> None:
    """Let the library's log lines through to stderr, each with the seconds since the start.

    A terminal has progress bars instead of a line per stage, unless it is asked for both.
    """
    watched = sys.stderr.isatty() and not verbose
    level = logging.ERROR if quiet else logging.WARNING if watched else logging.INFO
    handler = logging.StreamHandler()
    handler.setFormatter(_Stages("{seconds:>6.0f} s  {message}", style="{"))
    handler.addFilter(_with_seconds)
    handler.addFilter(_Once())
    logger = logging.getLogger("mera_tl")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)
    # How rows were split, and what single candidates of a search lack, are details, not stages.
    for name in ("mera_tl.tasks", "mera_tl.steering.directions"):
        logging.getLogger(name).setLevel(level if verbose else max(level, logging.WARNING))


class _Stages(logging.Formatter):
    """Log lines: one each in a file; in a terminal words stay whole."""

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).splitlines()
        if not sys.stderr.isatty():
            return "\n".join(lines)
        wrap = textwrap.TextWrapper(
            shutil.get_terminal_size().columns,
            subsequent_indent=" " * 10,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return "\n".join(map(wrap.fill, lines))


class _Once(logging.Filter):
    """What probes say of the same examples, each method fitting its own, is said once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        known = record.name.startswith("mera_tl.probes") and said in self._said
        self._said.add(said)
        return not known


def _with_seconds(record: logging.LogRecord) -> bool:
    record.seconds = record.relativeCreated / 1e3
    return True


def read_lines(path: Path) -> list[str]:
    """Return the lines of a user's text file.

    Raises:
        ValueError: if it is not text.
    """
    try:
        # At line feeds only: a text may hold other characters that Python counts as line ends.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as such."
        ) from None


def require_page(path: Path | None) -> None:
    """Refuse to write a page over what is none, such as the records of a run.

    Raises:
        ValueError: if the name does not end in .html.
    """
    if path is not None and path.suffix not in (".html", ".htm"):
        raise ValueError(f"{path} is no name of a page; let it end in .html.")


def print_json(value: Any) -> None:
    """Print JSON for scripts; what is not a number there becomes null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rich_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return rows as a table: numbers to the right, three digits, blanks for None and NaN.

    A column without any value is left out.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    names = [name for name in (rows[0] if rows else ()) if any(cell(row[name]) for row in rows)]
    texts = {name: [cell(row[name]) for row in rows] for name in names}
    # Texts wrap between their words; of columns of single words the longest is cut, if one must be.
    whole = [name for name in names if not any(" " in text for text in texts[name])]
    widths = {name: max(map(len, [name, *texts[name]])) for name in names}
    room = WIDTH - 2 * len(names) - sum(min(10, widths[name]) for name in {*names} - {*whole})
    while sum(widths[name] for name in whole) > room and len(whole) > 1:
        whole.remove(max(whole, key=lambda name: widths[name]))
    for name in names:
        number = all(isinstance(row[name], int | float | None) for row in rows)
        look: Any = {"justify": "right" if number else "left", "overflow": "fold"}
        # Where a heading must break, it is between its words.
        heading = name.replace("_", "\n" if number and sum(widths.values()) > WIDTH else " ")
        table.add_column(heading, no_wrap=name in whole and not number, **look)
    for row in rows:
        table.add_row(*(escape(cell(row[name])) for name in names))
    return table


def cell(value: Any) -> str:
    """Return a value in three digits at most; nothing for None and NaN."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3f}"
    return "" if value is None else str(value)


def records_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return the records of runs in 80 columns; +/- are recovered and regressed examples.

    What is the same in all records is left to the line above.
    """
    from mera_tl.benchmark.recommendation import decided

    rows = []
    for record in records:
        names = ("model", "task", "space", "seed")
        row = {name: record[name] for name in names if len({r[name] for r in records}) > 1}
        moved, threshold = record["transitions"], record["threshold"]
        at = "" if threshold is None else f" {threshold:.3g}"
        row |= {"method": record["method"], "accuracy": record["accuracy"], "SPI": record["spi"]}
        row |= {"+/-": f"{moved['0->1']}/{moved['1->0']}"}
        rows.append(row | {"decision": f"{decided(record['method'], record['decision'])}{at}"})
    return rich_table(rows)


def shared_words(records: Sequence[Mapping[str, Any]]) -> str:
    """Return in words what is the same in all records, and what the table's signs mean."""
    words = {
        "model": "{}",
        "task": "{}",
        "space": "{} space",
        "seed": "seed {}",
        "n": "{:,} test examples",
    }
    same = {name: {record[name] for record in records} for name in words}
    said = ", ".join(words[name].format(*v) for name, v in same.items() if len(v) == 1)
    return f"{said}; +/-: recovered/regressed; after a decision its threshold"


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def print_warnings(out: Console, records: Sequence[Mapping[str, Any]]) -> None:
    """Print what records are warned of, each sentence once; nothing if all is well."""
    said = {(r["task"], text): None for r in records for text in r.get("warnings", ())}
    wrap = textwrap.TextWrapper(width=WIDTH, subsequent_indent="    ")
    for task, text in said:
        out.print(wrap.fill(f"WARNING, {task}: {text}"), markup=False, style="yellow")


def markdown(frame: Any) -> str:
    """Return a table in Markdown."""
    cells = [[cell(v).replace("|", "\\|") for v in row] for row in frame.itertuples(index=False)]
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict_table(runs: Sequence[Any]) -> Table:
    """Return a line per run: the task, accuracy before and after, the decision and who takes it."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    several = len({run.records[0]["model"] for run in runs}) > 1
    for run in runs:
        verdict, first = run.verdict, run.records[0]
        name = f"{first['model']}, {first['task']}" if several else first["task"]
        style = "green" if verdict.method else "yellow"
        table.add_row(
            escape(name), verdict.change, f"[{style}]{escape(verdict.sentence)}[/{style}]"
        )
    return table
