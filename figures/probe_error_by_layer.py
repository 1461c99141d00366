"""Where in the organism its errors can be read: probes by layer, on one task."""

import pandas as pd

from figures import results, save
from mera_tl.plots import probe_error

TASK = "spam_cue"


def main() -> None:
    probes = results("steer_or_abstain", "probes-*.jsonl")
    rows = pd.DataFrame(probes[probes["task"] == TASK])
    for metric in ("rmse", "auroc"):
        save(probe_error(rows, metric=metric, n=1000), f"probe_{metric}_by_layer")


if __name__ == "__main__":
    main()
