"""How many examples a certificate needs, by expected gain and churn."""

import pandas as pd

from figures import save
from mera_tl.certificate import likely_effects, sample_size_table
from mera_tl.plots import sample_size_curves

NAME = "sample_size_curves"


def main() -> None:
    rows = sample_size_table(likely_effects())
    finding = "A gain of 6 points takes about 300 to 850 examples to certify"
    settings = "One of ten thresholds, delta .05, power 80 %; churn: share of answers that change"
    save(sample_size_curves(pd.DataFrame(rows)), NAME, finding=finding, settings=settings)


if __name__ == "__main__":
    main()
