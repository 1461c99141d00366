"""How many examples a certificate needs, by expected gain and churn."""

import pandas as pd

from figures import save
from mera_tl.certificate import likely_effects, sample_size_table
from mera_tl.plots import sample_size_curves

NAME = "sample_size_curves"


def main() -> None:
    rows = sample_size_table(likely_effects())
    save(sample_size_curves(pd.DataFrame(rows)), NAME)


if __name__ == "__main__":
    main()
