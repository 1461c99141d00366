"""How close the exact test comes to the error it is allowed, by enumeration."""

from figures import results, save
from mera_tl.plots import size_of_the_test

NAME = "size_of_the_test"


def main() -> None:
    save(size_of_the_test(results(NAME)), NAME)


if __name__ == "__main__":
    main()
