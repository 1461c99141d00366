"""The gallery: one script a figure, rebuilt from committed results without a model.

`python -m figures` builds all into figures/out: a page for each and, where Chromium is installed,
a PNG for those who only look.
"""

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

OUT = Path(__file__).parent / "out"
RESULTS = Path(__file__).parents[1] / "experiments" / "results"


class NoResults(ValueError):
    """The experiment behind a figure has not been run."""


def results(experiment: str, pattern: str = "*.jsonl") -> pd.DataFrame:
    """Read the committed records of an experiment."""
    paths = sorted((RESULTS / experiment).glob(pattern))
    if not paths:
        raise NoResults(f"{experiment} has no results; run `python -m experiments.{experiment}`.")
    return pd.concat([pd.read_json(path, lines=True) for path in paths], ignore_index=True)


def models_of(df: pd.DataFrame, column: str = "n_test") -> str:
    """Say of every model on how many test examples a task it was asked."""
    by_size: dict[str, list[str]] = {}
    for model in sorted(set(df["model"])):
        sizes = df.loc[df["model"] == model, column]
        size = " to ".join(f"{n:,}" for n in sorted({sizes.min(), sizes.max()}))
        by_size.setdefault(size, []).append(model)
    told = [f"{', '.join(models)} ({size} test examples)" for size, models in by_size.items()]
    return ", ".join(told)


def save(figure: go.Figure, name: str, *, finding: str = "", settings: str = "") -> None:
    """Write a figure as a page of its own; plotly.js comes from the network.

    In the gallery a title says what was found, and the line below it under which settings.
    """
    if finding:
        figure.update_layout(title_text=finding)
    if settings:
        figure.update_layout(title_subtitle_text=settings)
    if "<br>" in settings:  # a second line must not reach the titles of panels
        figure.update_layout(margin_t=115)
    OUT.mkdir(exist_ok=True)
    figure.write_html(OUT / f"{name}.html", div_id=name, include_plotlyjs="cdn")
    figure.write_json(OUT / f"{name}.json")
