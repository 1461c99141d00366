"""Which direction corrects planted failures, and what has to be read for it."""

import pandas as pd

from figures import results, save
from mera_tl.plots import spi_heatmap

NAME = "reading_is_not_steering"


def main() -> None:
    df = results(NAME)
    kept = ~df["arm"].str.contains("classes") & (df["model"] == "organism")
    records = pd.DataFrame(df[kept]).assign(
        method=df["arm"],
        decision=df["certified"].map({True: "STEER", False: "ABSTAIN"}),
        n=df["n_test"],
        space="raw",
    )
    figure = spi_heatmap(records)
    title = "Reading is not steering: SPI by direction, each certified once"
    figure.update_layout(title_text=title, meta={"min_width": 1100})
    save(figure, NAME)


if __name__ == "__main__":
    main()
