"""The gallery: one script a figure, rebuilt from committed results without a model."""

from pathlib import Path

import plotly.graph_objects as go

OUT = Path(__file__).parent / "out"


def save(figure: go.Figure, name: str) -> None:
    """Write a figure as a page of its own; plotly.js comes from the network."""
    OUT.mkdir(exist_ok=True)
    figure.write_html(OUT / f"{name}.html", div_id=name, include_plotlyjs="cdn")
