"""Which direction corrects planted failures, what has to be read for it, and what it rests on."""

import numpy as np

from figures import results, save
from mera_tl.plots import spi_heatmap

NAME = "reading_is_not_steering"


def main() -> None:
    df = results(NAME).assign(space="raw", model="")
    df = df.rename(columns={"arm": "method", "n_test": "n"})
    df["decision"] = np.where(df["certified"], "STEER", "ABSTAIN")
    df["ablated"] = df["method"].str.contains("classes")
    for name, which, title in (
        (NAME, "not ablated", "Reading is not steering: mean SPI over models and splits"),
        (f"{NAME}_ablations", "ablated", "The same with classes shuffled, or nine in ten hidden"),
    ):
        figure = spi_heatmap(df.query(which))
        figure.update_layout(title_text=title, meta={"min_width": 1100})
        save(figure, name)


if __name__ == "__main__":
    main()
