"""Raw against SAE: the impact of every method in both spaces, with and without the correction."""

import pandas as pd

from figures import results, save
from mera_tl.plots import raw_against_sae


def main() -> None:
    records = results("sae_or_raw", "records-*.jsonl")
    records = records[records["method"] != "no_steering"]
    for layer, of_layer in records.groupby("layer"):
        raw = of_layer[of_layer["space"] == "raw"]
        for correction in ("none", "gain"):
            sae = (of_layer["space"] == "sae") & (of_layer["correction"] == correction)
            name = f"sae_or_raw_layer_{layer}" + ("_gain" if correction == "gain" else "")
            save(raw_against_sae(pd.concat([raw, of_layer[sae]])), name)


if __name__ == "__main__":
    main()
