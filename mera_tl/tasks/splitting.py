"""Which example goes where: three disjoint splits, by number or by row ranges.

Only places are dealt out, by two columns: `rows`, the numbers that ranges speak of, and `keys`,
equal for examples with the same text. No key ever lands in two splits. Evidence rests on distinct
texts: of examples with one key, calibration and test get one, by a seeded choice; training may
have them all.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from numbers import Integral
from typing import Any

SHARES = {"train": 3, "calibration": 1, "test": 1}
EVIDENCE = ("calibration", "test")
"""Splits that hold a text once."""

Dealt = dict[str, list[int]]
"""The places of the examples of each split."""
Ranges = list[tuple[int, int]]
"""Rows from the first to the last number, both included."""


def deal(
    rows: Sequence[int],
    keys: Sequence[str],
    wanted: Mapping[str, int | str | None],
    *,
    seed: int,
    title: str,
) -> tuple[Dealt, dict[str, Any]]:
    """Deal examples to train, calibration and test; also tell, for the record, how.

    `wanted` gives a number, ranges such as "0-599,700-799" (both ends included), or None, for each.

    Raises:
        ValueError: if a wish cannot be read, ranges overlap or leave the data, or examples are few.
    """
    if not isinstance(seed, Integral):
        raise ValueError(f"`seed={seed!r}` is no whole number; pass one, as 0.")
    seed = int(seed)  # Python's generator takes no number of NumPy's
    wishes = read_wishes(wanted)
    sizes = {role: wish for role, wish in wishes.items() if isinstance(wish, int)}
    ranges = {role: wish for role, wish in wishes.items() if not isinstance(wish, int)}
    if ranges:
        return _by_ranges(rows, keys, ranges, wanted, seed, title)
    return _by_number(keys, sizes, seed, title)


def read_wishes(wanted: Mapping[str, int | str | None]) -> dict[str, int | Ranges]:
    """Read how many examples, or which rows, each split is to have; nothing is expanded.

    Raises:
        ValueError: if a wish is neither, or ranges overlap or are not given for all three.
    """
    given = {role: value for role, value in wanted.items() if value is not None}
    wishes = {role: _read_wish(role, value) for role, value in given.items()}
    ranges = {role: wish for role, wish in wishes.items() if not isinstance(wish, int)}
    if ranges and len(ranges) < len(SHARES):
        raise ValueError(
            f"Row ranges are given for {' and '.join(ranges)} only; "
            "give ranges for train, calibration and test, or for none of them."
        )
    for one, other in combinations(ranges, 2):
        for (first, last), (begin, end) in ((a, b) for a in ranges[one] for b in ranges[other]):
            if first <= end and begin <= last:
                raise ValueError(
                    f"Row {max(first, begin)} is in {one} ({given[one]}) and in {other} "
                    f"({given[other]}); give ranges that do not overlap."
                )
    return wishes


def _read_wish(role: str, value: int | str) -> int | Ranges:
    """Read a count, also one written as text, or "0-599,700-799"."""
    if not isinstance(value, Integral | str):
        raise ValueError(
            f"`{role}={value!r}` is no number of examples; give a whole one, as 600, or rows, as "
            '"0-599".'
        )
    if isinstance(value, Integral) or re.fullmatch(r"\s*-?\d{1,15}\s*", value, re.ASCII):
        if int(value) < 1:
            raise ValueError(f"`{role}={value}`, but each split needs an example; give 1 or more.")
        return int(value)
    ranges: Ranges = []
    for part in value.split(","):
        match = re.fullmatch(r"\s*(\d{1,15})\s*-\s*(\d{1,15})\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2])) if match else (1, 0)
        if first > last:
            raise ValueError(
                f"`{role}={value!r}` is neither a number of examples nor row ranges; "
                'write ranges as "0-599" or "0-599,700-799".'
            )
        ranges.append((first, last))
    if any(before[1] >= after[0] for before, after in pairwise(sorted(ranges))):
        raise ValueError(f"`{role}={value!r}` names a row twice; give each row once.")
    return ranges


def spans(rows: Iterable[int]) -> str:
    """Write row numbers as ranges, such as "0-4,7-7"; they may come in any order."""
    ordered = sorted(set(rows))
    starts = [
        row for row, before in zip(ordered, [None, *ordered], strict=False) if before != row - 1
    ]
    ends = [
        row for row, after in zip(ordered, [*ordered[1:], None], strict=True) if after != row + 1
    ]
    return ",".join(f"{first}-{last}" for first, last in zip(starts, ends, strict=True))


def rows_of(text: str) -> set[int]:
    """Return the rows that `spans` wrote."""
    pairs = (map(int, part.split("-")) for part in text.split(",") if part)
    return {row for first, last in pairs for row in range(first, last + 1)}


def key_of(text: str) -> str:
    """Return what copies of a text share: it without case and without the width of white space."""
    return " ".join(text.casefold().split())


def distinct(keys: Iterable[str], seed: int) -> list[int]:
    """Return the places of one example per key, in their order, by a seeded choice.

    The choice looks at a group of equal keys alone, so it does not change with the other groups.
    """
    groups: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return sorted(_one_of(group, key, seed) for key, group in groups.items())


def _one_of(group: Sequence[int], key: str, seed: int) -> int:
    return group[0] if len(group) == 1 else random.Random(f"{seed}/{key}").choice(group)


def _by_number(
    keys: Sequence[str], sizes: Mapping[str, int], seed: int, title: str
) -> tuple[Dealt, dict[str, Any]]:
    """Deal shuffled groups of equal texts; the part of a training group beyond a size is left out.

    Splits of a given size come first and test before calibration, so the same seed and size give
    the same test split whatever the others are.
    """
    groups: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)

    rest = len(groups) - sum(sizes.values())
    shares = {role: share for role, share in SHARES.items() if role not in sizes}
    goals = {**sizes, **{r: rest * share // sum(shares.values()) for r, share in shares.items()}}
    if "train" in shares:
        goals["train"] = len(keys)  # whatever is left: training comes last
    dealt: Dealt = {}
    repeated = dict.fromkeys(EVIDENCE, 0)
    queue = iter(shuffled)
    for role in sorted(("test", "calibration", "train"), key=lambda role: role in shares):
        places: list[int] = []
        while len(places) < goals[role] and (group := next(queue, None)) is not None:
            if role in EVIDENCE:
                repeated[role] += len(group) - 1
                group = [_one_of(group, keys[group[0]], seed)]
            places.extend(group)
        if len(places) < sizes.get(role, 1):
            asked = " + ".join(f"{size} {role}" for role, size in sizes.items())
            raise ValueError(
                f"{title} has {len(keys)} examples ({len(groups)} different texts), too few for "
                f"{asked or 'three splits'}; ask for fewer, or load more data."
            )
        dealt[role] = places[: goals[role]]
    unused = len(keys) - sum(map(len, dealt.values()))
    how = {"seed": seed, "sizes": {r: len(dealt[r]) for r in SHARES}, "unused": unused}
    return dealt, how | {"repeated": repeated}


def _by_ranges(
    rows: Sequence[int],
    keys: Sequence[str],
    ranges: Mapping[str, Ranges],
    wanted: Mapping[str, int | str | None],
    seed: int,
    title: str,
) -> tuple[Dealt, dict[str, Any]]:
    """Take rows as given; a text that recurs is left to test before calibration before train."""
    place_of = {row: place for place, row in enumerate(rows)}
    for role, parts in ranges.items():
        if max(last for _, last in parts) > max(rows):
            raise ValueError(
                f"`{role}={wanted[role]!r}`, but the rows of {title} are numbered 0 to "
                f"{max(rows)}; give rows that exist."
            )
    dealt: Dealt = {}
    dropped, repeated = dict.fromkeys(SHARES, 0), dict.fromkeys(EVIDENCE, 0)
    taken: set[str] = set()
    for role in ("test", "calibration", "train"):
        named = [row for first, last in ranges[role] for row in range(first, last + 1)]
        places = [place_of[row] for row in named if row in place_of]
        dealt[role] = [place for place in places if keys[place] not in taken]
        dropped[role] = len(places) - len(dealt[role])
        taken |= {keys[place] for place in places}
        if role in EVIDENCE:
            once = distinct([keys[place] for place in dealt[role]], seed)
            repeated[role] = len(dealt[role]) - len(once)
            dealt[role] = [dealt[role][index] for index in once]
        if not dealt[role]:
            raise ValueError(
                f"`{role}={wanted[role]!r}` leaves no example of {title} whose text is not in a "
                "later split; give other rows."
            )
    return dealt, {"rows": dict(wanted), "dropped": dropped, "repeated": repeated}
