"""How often the guarantee is wrong, and how often it lets a real gain through."""

from pathlib import Path

import pandas as pd

from mera_tl.plots import coverage

NAME = Path(__file__).stem
RECORDS = Path(__file__).parents[1] / "experiments" / "results" / NAME
OUT = Path(__file__).parent / "out"


def main() -> None:
    frames = [pd.read_json(path, lines=True) for path in sorted(RECORDS.glob("*.jsonl"))]
    OUT.mkdir(exist_ok=True)
    coverage(pd.concat(frames)).write_html(
        OUT / f"{NAME}.html", div_id=NAME, include_plotlyjs="cdn"
    )


if __name__ == "__main__":
    main()
