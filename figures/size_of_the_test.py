"""How close the exact test comes to the error it is allowed, by enumeration."""

from pathlib import Path

import pandas as pd

from mera_tl.plots import size_of_the_test

NAME = Path(__file__).stem
RECORDS = Path(__file__).parents[1] / "experiments" / "results" / NAME
OUT = Path(__file__).parent / "out"


def main() -> None:
    frames = [pd.read_json(path, lines=True) for path in sorted(RECORDS.glob("*.jsonl"))]
    OUT.mkdir(exist_ok=True)
    figure = size_of_the_test(pd.concat(frames))
    figure.write_html(OUT / f"{NAME}.html", div_id=NAME, include_plotlyjs="cdn")


if __name__ == "__main__":
    main()
