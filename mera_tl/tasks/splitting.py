"""Which example goes where: three disjoint splits, by number or by row ranges.

Only places are dealt out, by two columns: `rows`, the numbers that ranges speak of, and `keys`,
equal for examples with the same text. No key ever lands in two splits.
"""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

SHARES = {"train": 3, "calibration": 1, "test": 1}

Dealt = dict[str, list[int]]
"""The places of the examples of each split."""


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
    given = {
        role: _count_or_ranges(role, value) for role, value in wanted.items() if value is not None
    }
    ranges = {role: value for role, value in given.items() if isinstance(value, str)}
    sizes = {role: value for role, value in given.items() if isinstance(value, int)}
    if not ranges:
        return _by_number(keys, sizes, seed, title)
    if len(ranges) < len(SHARES):
        raise ValueError(
            f"Row ranges are given for {' and '.join(ranges)} only; "
            "give ranges for train, calibration and test, or for none of them."
        )
    return _by_ranges(rows, keys, ranges, title)


def _count_or_ranges(role: str, value: int | str) -> int | str:
    """Read a count written as text; each split needs an example."""
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if isinstance(value, int) and value < 1:
        raise ValueError(f"`{role}={value}`, but each split needs an example; give 1 or more.")
    return value


def _by_number(
    keys: Sequence[str], sizes: Mapping[str, int], seed: int, title: str
) -> tuple[Dealt, dict[str, Any]]:
    """Deal shuffled groups of equal texts; the part of a group beyond a size is left out.

    Splits of a given size come first and test before calibration, so the same seed and size give
    the same test split whatever the others are.
    """
    groups: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)

    rest = len(keys) - sum(sizes.values())
    shares = {role: share for role, share in SHARES.items() if role not in sizes}
    goals = {**sizes, **{r: rest * share // sum(shares.values()) for r, share in shares.items()}}
    if "train" in shares:
        goals["train"] = len(keys)  # whatever is left: training comes last
    dealt: Dealt = {}
    queue = iter(shuffled)
    for role in sorted(("test", "calibration", "train"), key=lambda role: role in shares):
        places: list[int] = []
        while len(places) < goals[role] and (group := next(queue, None)) is not None:
            places.extend(group)
        if len(places) < sizes.get(role, 1):
            asked = " + ".join(f"{size} {role}" for role, size in sizes.items())
            raise ValueError(
                f"{title} has {len(keys)} examples ({len(groups)} different texts), too few for "
                f"{asked or 'three splits'}; ask for fewer, or load more data."
            )
        dealt[role] = places[: goals[role]]
    unused = len(keys) - sum(map(len, dealt.values()))
    return dealt, {"seed": seed, "sizes": {r: len(dealt[r]) for r in SHARES}, "unused": unused}


def _by_ranges(
    rows: Sequence[int], keys: Sequence[str], ranges: Mapping[str, str], title: str
) -> tuple[Dealt, dict[str, Any]]:
    """Take rows as given; a text that recurs is left to test before calibration before train."""
    place_of = {row: place for place, row in enumerate(rows)}
    named = {role: _rows(text, role, title, max(rows)) for role, text in ranges.items()}
    for one, other in (("train", "calibration"), ("train", "test"), ("calibration", "test")):
        if shared := set(named[one]) & set(named[other]):
            raise ValueError(
                f"Row {min(shared)} is in {one} ({ranges[one]}) and in {other} ({ranges[other]}); "
                "give ranges that do not overlap."
            )
    dealt: Dealt = {}
    dropped: dict[str, int] = {}
    taken: set[str] = set()
    for role in ("test", "calibration", "train"):
        places = [place_of[row] for row in named[role] if row in place_of]
        dealt[role] = [place for place in places if keys[place] not in taken]
        dropped[role] = len(places) - len(dealt[role])
        taken |= {keys[place] for place in places}
        if not dealt[role]:
            raise ValueError(
                f"`{role}={ranges[role]!r}` leaves no example of {title} whose text is not in a "
                "later split; give other rows."
            )
    return dealt, {"rows": dict(ranges), "dropped": dropped}


def _rows(text: str, role: str, title: str, last_row: int) -> list[int]:
    """Read "0-599,700-799"."""
    rows: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part)
        first, last = map(int, match.groups()) if match else (1, 0)
        if first > last:
            raise ValueError(
                f"`{role}={text!r}` is neither a number of examples nor row ranges; "
                'write ranges as "0-599" or "0-599,700-799".'
            )
        if last > last_row:
            raise ValueError(
                f"`{role}={text!r}`, but the rows of {title} are numbered 0 to {last_row}; "
                "give rows that exist."
            )
        rows.extend(range(first, last + 1))
    if len(set(rows)) < len(rows):
        raise ValueError(f"`{role}={text!r}` names a row twice; give each row once.")
    return rows
