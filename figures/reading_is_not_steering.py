"""Which direction corrects planted failures, and what has to be read for it."""

import pandas as pd

from figures import results, save
from mera_tl.plots import spi_heatmap

NAME = "reading_is_not_steering"


def main() -> None:
    df = results(NAME)
    main_arms = df[~df["arm"].str.contains("classes") & (df["task"] != "sms_spam")]
    n_models, n_seeds = main_arms["model"].nunique(), main_arms["seed"].nunique()
    as_records = pd.DataFrame(main_arms).assign(
        method=main_arms["arm"],
        decision=main_arms["certified"].map({True: "STEER", False: "ABSTAIN"}),
        n=main_arms["n_test"],
        space="raw",
        model=f"{n_models} organisms" if n_models > 1 else "organism",
    )
    figure = spi_heatmap(as_records)
    title = "Reading is not steering: SPI by direction, each certified once"
    figure.update_layout(title_text=title, margin_l=250)
    figure.update_layout(meta={"min_width": 1100, **{"runs": f"{n_models} x {n_seeds}"}})
    save(figure, NAME)


if __name__ == "__main__":
    main()
