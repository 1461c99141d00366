"""Every method on every task: impact in both spaces, its certainty, what became of examples."""

import pandas as pd

from figures import results, save
from mera_tl.plots import spi_dots, spi_heatmap, transitions
from mera_tl.report import records_frame

FEW = (
    *("prompt_steering", "additive_probe", "vanilla_contrastive", "optimal_probe"),
    *("optimal_contrastive", "controlled_contrastive", "flip", "searched"),
)
"""The rows of the main figure; the appendix has all."""
SETTINGS = (
    "organism{space}: 1,500 examples fit, 500 certify, 500 test, 3 splits; "
    'readout exact_anywhere<br>mean SPI; "-": every split abstained'
)
ALL = "{} flip and the search correct what can be corrected"
ONE = "One split: class-controlled directions gain most, fixed lengths mostly lose"
GRID = "organism: {n} test examples, one split, ten thresholds; readout exact_anywhere"


def main() -> None:
    raw = results("methods_by_task", "*-raw.jsonl").query("model == 'organism'")
    few = pd.DataFrame(raw[raw["method"].isin(FEW)])
    finding = "The search and flip correct what can be corrected; fixed strengths do harm"
    settings = SETTINGS.format(space="")
    save(spi_heatmap(few), "spi_heatmap", finding=finding, settings=settings)
    save(
        spi_heatmap(raw),
        "spi_heatmap_all",
        finding=ALL.format("Of all methods,"),
        settings=settings,
    )
    latents = results("methods_by_task", "*-sae.jsonl")
    settings = SETTINGS.format(space=" in SAE latents")
    save(spi_heatmap(latents), "spi_heatmap_sae", finding=ALL.format("In SAE latents, too,"),
         settings=settings)  # fmt: skip
    one = records_frame(results("steer_or_abstain", "records-*.jsonl").to_dict("records"))
    settings = GRID.format(n=one["n"].iloc[0])
    save(spi_dots(one), "spi_dots", finding=ONE, settings=settings)
    finding = "Holding the class fixed recovers most; fixed lengths mostly break"
    save(transitions(sorted_by_gain(one)), "transitions", finding=finding, settings=settings)


def sorted_by_gain(df: pd.DataFrame) -> pd.DataFrame:
    """Return the telling methods, the task that gains most first."""
    few = ("prompt_steering", "vanilla_contrastive", "optimal_probe", "optimal_contrastive")
    df = pd.DataFrame(df[df["method"].isin((*few, "controlled_contrastive, grid"))])
    best = df.groupby("task")["accuracy_change"].max()
    return df.assign(best=df["task"].map(best)).sort_values("best", ascending=False, kind="stable")


if __name__ == "__main__":
    main()
