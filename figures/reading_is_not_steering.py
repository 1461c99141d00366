"""Which direction corrects planted failures, what has to be read for it, and what it rests on."""

import numpy as np

from figures import results, save
from mera_tl.plots import spi_heatmap

NAME = "reading_is_not_steering"
SETTINGS = (
    "Mean SPI over splits; layer and threshold searched on training data, one test at delta .05;"
    '<br>500 or 600 test examples; "-": abstained'
)


def main() -> None:
    df = results(NAME).assign(space="raw", model="")
    df = df.rename(columns={"arm": "method", "n_test": "n"})
    df["decision"] = np.where(df["certified"], "STEER", "ABSTAIN")
    df["ablated"] = df["method"].str.contains("classes")
    for name, which, title in (
        (
            NAME,
            "not ablated",
            "The probe's own direction corrects little; class-controlled ones do",
        ),
        (
            f"{NAME}_ablations",
            "ablated",
            "The true classes matter less where a probe per answer reads",
        ),
    ):
        figure = spi_heatmap(df.query(which))
        figure.update_layout(meta={"min_width": 1100})
        save(figure, name, finding=title, settings=SETTINGS)


if __name__ == "__main__":
    main()
