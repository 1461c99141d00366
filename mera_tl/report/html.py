"""One HTML page that opens anywhere: templates, figures as data, plotly.js embedded once.

Figures are data in the page; a script draws them, so a hundred cost little more than one. Titles
and captions leave the figure and become text of the page, which wraps on a narrow screen. Light or
dark follows the reader's system. The templates escape whatever they are given. A report's figures
also lie beside it, as files.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mera_tl import storage


@dataclass(frozen=True)
class Block:
    """The place of a figure in a page: its title, the line below it, its size."""

    name: str
    title: str
    caption: str
    height: int
    min_width: int = 0
    folder: str = ""
    """Where its JSON and CSV lie, seen from the page; "" if they are not kept."""


@dataclass(frozen=True)
class Figures:
    """The figures of a page, each written as JSON and CSV when it is placed."""

    folder: Path
    images: bool = False
    prefix: str = ""
    """Begins the names of one run's figures, where there are several runs."""
    figures: dict[str, go.Figure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.folder / "records.jsonl").exists():
            raise ValueError(f"{self.folder} is the folder of a run; give the page another name.")

    def place(self, name: str, figure: go.Figure, frame: pd.DataFrame) -> Block:
        """Keep a figure and return its place in the page."""
        name = self.prefix + name
        self.figures[name] = figure
        storage.write_text(self.folder / f"{name}.json", str(figure.to_json(pretty=True)))
        storage.write_text(self.folder / f"{name}.csv", frame.to_csv(index=False))
        return block_of(name, figure, folder=self.folder.name)

    def write_images(self) -> str:
        """Write SVG and PNG files, if asked to; say in a sentence what came of it."""
        if not self.images:
            return (
                "For the figures as SVG and PNG files, write the report with --images; every "
                "figure's own menu saves a PNG."
            )
        if find_spec("kaleido") is None:
            return (
                "SVG and PNG files were not written: kaleido is not installed; run "
                "`pip install mera-tl[images]`."
            )
        figures = [str(self.folder / f"{name}.json") for name in self.figures]
        try:
            # In a process of its own: a browser that hangs must not hold up the page.
            subprocess.run(
                [sys.executable, "-c", _WRITE_IMAGES, *figures],
                check=True,
                capture_output=True,
                text=True,
                timeout=60 + 20 * len(figures),
            )
        except subprocess.TimeoutExpired:
            return "SVG and PNG files were not written: the browser did not answer in time."
        except subprocess.CalledProcessError as error:
            why = (str(error.stderr).strip().splitlines() or ["kaleido failed"])[-1]
            return f"SVG and PNG files were not written: {why}"
        return f"The figures also lie in {self.folder.name}/ as SVG and PNG."


_WRITE_IMAGES = """
import sys, plotly.io
figures = [plotly.io.from_json(open(path, encoding="utf-8").read()) for path in sys.argv[1:]]
for kind in ("svg", "png"):
    paths = [path.removesuffix("json") + kind for path in sys.argv[1:]]
    plotly.io.write_images(figures, paths, width=900)
"""


@dataclass(frozen=True)
class Table:
    """A table as the templates take it: everything is text."""

    columns: tuple[tuple[str, bool], ...]
    """Name, and whether the column holds words."""
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, frame: pd.DataFrame) -> "Table":
        """Write numbers to three digits, and nothing for what is missing."""

        def cell(value: object) -> str:
            if isinstance(value, float):
                return "" if pd.isna(value) else f"{value:.3f}"
            return "" if value is None else str(value)

        words = [not pd.api.types.is_numeric_dtype(frame[name]) for name in frame]
        rows = [tuple(map(cell, row)) for row in frame.itertuples(index=False)]
        return cls(tuple(zip(map(str, frame.columns), words, strict=True)), tuple(rows))


def render(
    title: str,
    figures: Mapping[str, go.Figure],
    *,
    template: str = "page.html",
    **context: Any,
) -> str:
    """Return a whole page.

    By default every figure is placed in its order, and `prompt`, if given, above them as it is,
    white space and all.
    """
    from plotly.offline import get_plotlyjs

    specs = {name: _bare(figure) for name, figure in figures.items()}
    blocks = [block_of(name, figure) for name, figure in figures.items()]
    shared = {"title": title, "specs": specs, "plotly": Markup(get_plotlyjs())}
    return environment().get_template(template).render(shared | {"blocks": blocks} | context)


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Return the Jinja environment of every page: everything is escaped, nothing is undefined."""
    loader = PackageLoader("mera_tl.report")
    found = Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
        finalize=_unbroken,
    )
    found.globals["parts"] = found.get_template("parts.html").module
    return found


def _unbroken(value: Any) -> Any:
    """Keep a number and its "%" on one line; what is escaped already stays as it is."""
    return re.sub(r"(?<=\d) %", "\xa0%", value) if type(value) is str else value


def block_of(name: str, figure: go.Figure, *, folder: str = "") -> Block:
    """Return the place of a figure in a page."""
    layout, heading = _bare(figure)["layout"], figure.to_dict()["layout"].get("title", {})
    return Block(
        name=name,
        title=heading.get("text", ""),
        caption=heading.get("subtitle", {}).get("text", ""),
        height=layout["height"],
        min_width=layout.get("meta", {}).get("min_width", 0),
        folder=folder,
    )


def _bare(figure: go.Figure) -> dict[str, Any]:
    """Return a figure's JSON without what the page says in its stead."""
    spec = json.loads(str(figure.to_json()))
    layout = spec["layout"]
    # Titles of panels stand in the margin.
    panels = [note for note in layout.get("annotations", ()) if note.get("yref") == "paper"]
    margin = {"l": 50, "r": 16, "t": 36 if panels else 12, "b": 50}
    layout |= {"title": {"text": ""}, "autosize": True, "margin": margin}
    layout |= {"paper_bgcolor": "rgba(0,0,0,0)"}
    layout["height"] = layout.get("height", 440) - 70
    return spec
