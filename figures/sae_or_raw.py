"""Raw against SAE: every method in the stream, in latents, and in latents with the correction."""

import pandas as pd

from figures import results, save
from mera_tl.plots import raw_against_sae

NAME = "sae_or_raw"


def main() -> None:
    records = results(NAME, "records-*.jsonl")
    for name, seeds in ((NAME, records["seed"] > 0), (f"{NAME}_first_seed", records["seed"] == 0)):
        save(raw_against_sae(pd.DataFrame(records[seeds])), name)


if __name__ == "__main__":
    main()
