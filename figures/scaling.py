"""What the stages of a run cost, measured on small models and extrapolated."""

from figures import results, save
from mera_tl.plots import stage_costs

NAME = "scaling"


def main() -> None:
    save(stage_costs(results(NAME)), NAME)


if __name__ == "__main__":
    main()
