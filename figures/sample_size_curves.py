"""How many examples a certificate needs, by expected gain and churn."""

from pathlib import Path

import pandas as pd

from mera_tl.planning import likely_effects, sample_size_table
from mera_tl.plots import sample_size_curves

NAME = Path(__file__).stem
OUT = Path(__file__).parent / "out"


def main() -> None:
    rows = sample_size_table(likely_effects())
    OUT.mkdir(exist_ok=True)
    figure = sample_size_curves(pd.DataFrame(rows))
    figure.write_html(OUT / f"{NAME}.html", div_id=NAME, include_plotlyjs="cdn")


if __name__ == "__main__":
    main()
