"""Which direction corrects planted failures, what has to be read for it, and what it rests on."""

import numpy as np

from figures import models_of, results, save
from mera_tl.plots import spi_heatmap

NAME = "reading_is_not_steering"
SETTINGS = (
    "{models}; readout exact_anywhere;<br>mean SPI over models and splits; layer and threshold "
    'searched on training data, one test at delta .05; "-": abstained'
)


def main() -> None:
    df = results(NAME).assign(space="raw")
    settings = SETTINGS.format(models=models_of(df))
    df = df.assign(model="").rename(columns={"arm": "method", "n_test": "n"})
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
        save(figure, name, finding=title, settings=settings)


if __name__ == "__main__":
    main()
