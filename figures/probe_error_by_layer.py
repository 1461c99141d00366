"""Where errors can be read: by layer, features and position; by token; how rightly; elsewhere."""

import pandas as pd

from figures import results, save
from mera_tl import plots

NAME = "probe_error_by_layer"


def main() -> None:
    df, rows = placed("layers"), ["place", "features", "position", "layer"]
    for metric, best in (("auroc", pd.Series.idxmax), ("rmse", pd.Series.idxmin)):
        chosen = df.loc[df.reset_index(drop=True).groupby(rows)[metric].agg(best)]
        columns = {f"untouched_{metric}": "value", f"{metric}_sd": "sd", f"{metric}_dummy": "dummy"}
        chosen = chosen.drop(columns=metric).rename(columns=columns)
        save(plots.probe_overlay(chosen.sort_index(), metric=metric), f"probe_{metric}_by_layer")
    save(plots.predicted_against_observed(placed("observed")), "predicted_against_observed")
    save(plots.layer_by_position(placed("tokens")), "layer_by_position")
    save(plots.transfer_matrix(results(NAME, "transfer-*.jsonl")), "transfer_of_probes")


def placed(kind: str) -> pd.DataFrame:
    df = results(NAME, f"{kind}-*.jsonl")
    return df.assign(place=df["model"] + "<br>" + df["task"]).reset_index(drop=True)


if __name__ == "__main__":
    main()
