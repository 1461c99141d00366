"""Raw against SAE in numbers: reading, shifting, what is certified and won, and what it costs."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from figures import results, save
from mera_tl.plots import style

NAME = "sae_or_raw"
WHERE = ["model", "layer", "kind", "space", "correction"]
KINDS = {"probe": "ridge", "logistic_probe": "logistic", "contrastive": "contrastive"}


def main() -> None:
    df = results(NAME, "records-*.jsonl")
    df = df.assign(certified=(df["decision"] == "STEER").astype(float), SPI=df["spi"])
    df = df.rename(columns={"steered_share": "steered", "cpu_seconds": "CPU s"})
    kinds = df["method"].str.removeprefix("optimal_").map(KINDS)
    won = df.assign(kind=kinds).groupby(WHERE)[["certified", "SPI", "steered", "CPU s"]].mean()
    names = {"auroc": "AUROC", "relative_shift": "shift", "reencoded_above": "above"}
    read = results(NAME, "reading-*.jsonl").rename(columns=names)
    read = read.groupby(WHERE)[[*names.values(), "cosine"]].mean()
    frame = read.join(won).reset_index(level=["space", "correction"])
    way = frame.pop("space") + frame.pop("correction").map({"gain": ", gain", "none": ""})
    frame.insert(0, "way", way)
    caption = "MERA's rule, means over tasks and splits; shift: norms, at .1; above: after it"
    figure = number_table(frame.reset_index(), title="Raw or SAE, in numbers", caption=caption)
    save(figure, f"{NAME}_table")


def number_table(df: pd.DataFrame, *, title: str, caption: str) -> go.Figure:
    """Draw a table; numbers to two digits, three if small, nothing where there is none."""

    def shown(value: Any) -> str:
        if isinstance(value, float):
            return "" if pd.isna(value) else f"{value:.{2 if abs(value) >= 0.095 else 3}f}"
        return str(value)

    look = {"fill_color": "rgba(0,0,0,0)", "line_color": style.LINE, "height": 24}
    table = go.Table(
        columnwidth=[1 if pd.api.types.is_numeric_dtype(df[c]) else 1.6 for c in df],
        header={"values": [f"<b>{column}</b>" for column in df], "align": "left"} | look,
        cells={"values": [[shown(v) for v in df[c]] for c in df], "align": "left"} | look,
    )
    height, meta = 190 + 25 * len(df), {"min_width": 90 * len(df.columns)}
    margin = {"l": 12, "r": 12, "t": 90, "b": 20}
    return style.finish(go.Figure(table), title, caption, height=height, meta=meta, margin=margin)


if __name__ == "__main__":
    main()
