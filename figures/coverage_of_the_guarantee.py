"""How often the guarantee is wrong, and how often it lets a real gain through."""

from figures import results, save
from mera_tl.plots import coverage

NAME = "coverage_of_the_guarantee"


def main() -> None:
    save(coverage(results(NAME)), NAME)


if __name__ == "__main__":
    main()
