"""Does what corrects one task correct another with the same failure?"""

import numpy as np

from figures import results, save
from mera_tl.plots import spi_heatmap

NAME = "directions_across_tasks"


def main() -> None:
    df = results(NAME).query("arm == 'controlled_contrastive'")
    whose = df["source"].where(df["taken"] == "both", df["source"] + ", own probe")
    records = df.assign(
        method=whose,
        decision=np.where(df["certified"], "STEER", "ABSTAIN"),
        n=df["n_test"],
        space="raw",
        model="",
    )
    figure = spi_heatmap(records)
    title = "Probe and direction of one task (rows) at work on another (columns): mean SPI"
    figure.update_layout(title_text=title, meta={"min_width": 700})
    save(figure, NAME)


if __name__ == "__main__":
    main()
