"""Does what corrects one task correct another with the same failure?"""

import numpy as np

from figures import models_of, results, save
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
    figure.update_layout(meta={"min_width": 700})
    finding = "Foreign directions (rows) correct spam_hint, hardly any other task (columns)"
    settings = (
        f"{models_of(df)}, two splits, readout exact_anywhere;<br>"
        'mean SPI of controlled_contrastive; "-": every split abstained'
    )
    save(figure, NAME, finding=finding, settings=settings)


if __name__ == "__main__":
    main()
