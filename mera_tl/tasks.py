"""Classification asked as a prompt: examples, their options, and disjoint splits.

An `Example` is one prompt with the options that count as answers; a `Task` is a tuple of examples
with a role. The role is a type as well as a value: `Task[Train]` and `Task[Calibration]` differ
for a type checker, so what is searched freely and what certifies cannot be exchanged by accident.
"""

import logging
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar, overload

from mera_tl.store import file_hash, fingerprint

logger = logging.getLogger(__name__)

All = Literal["all"]
Train = Literal["train"]
Calibration = Literal["calibration"]
Test = Literal["test"]
Role = Literal["all", "train", "calibration", "test"]
RoleT = TypeVar("RoleT", bound=Role, covariant=True)
NewRoleT = TypeVar("NewRoleT", bound=Role)

_ANSWER = re.compile(r"answer\s*:", re.IGNORECASE)
_SHARES: dict[str, int] = {"train": 3, "calibration": 1, "test": 1}


@dataclass(frozen=True)
class Example:
    """One question with a known answer."""

    row: int
    """Its place in the source, counted from 0 before anything was left out."""
    prompt: str
    options: tuple[str, ...]
    label: int
    """The index of the true option."""
    text: str = ""
    """The part of the prompt that may be shortened to fit a context; "" if none may."""

    @property
    def key(self) -> str:
        """What duplicates share: the prompt without case and without the width of white space."""
        return " ".join(self.prompt.casefold().split())

    def with_text(self, text: str) -> "Example":
        """Put another text in the place of `text`; the question around it stays."""
        return replace(self, prompt=self.prompt.replace(self.text, text, 1), text=text)

    def with_instruction(self, instruction: str) -> "Example":
        """Put a sentence before the last "Answer:", or at the end of a prompt that has none.

        Case does not count, white space at the end of the prompt stays at the end, and an
        "Answer:" inside `text` is data, not a cue.
        """
        after_text = self.prompt.find(self.text) + len(self.text) if self.text else 0
        cues = list(_ANSWER.finditer(self.prompt, after_text))
        if cues:
            start = cues[-1].start()
            prompt = f"{self.prompt[:start]}{instruction} {self.prompt[start:]}"
        else:
            end = len(self.prompt.rstrip())
            prompt = f"{self.prompt[:end]} {instruction}{self.prompt[end:]}"
        return replace(self, prompt=prompt)


@dataclass(frozen=True)
class Task(Generic[RoleT]):
    """Examples that share their options, and what they may be used for.

    Raises:
        ValueError: if there is no example, or if options, labels or rows do not fit together.
    """

    name: str
    examples: tuple[Example, ...]
    role: RoleT
    source: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Where the examples come from: files and their hashes, template hash, split."""

    def __post_init__(self) -> None:
        if not self.examples:
            raise ValueError(f"{self._title} holds no example; check its rows and its data.")
        for example in self.examples:
            if example.options != self.options or not 0 <= example.label < len(self.options):
                raise ValueError(
                    f"Row {example.row} of {self.name} has options {example.options} and label "
                    f"{example.label}, but the task's options are {self.options}; "
                    "give every example the same options and a label among them."
                )
        if len({example.row for example in self.examples}) < len(self.examples):
            raise ValueError(f"{self._title} holds a row twice; give every example its own row.")

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def _title(self) -> str:
        return self.name if self.role == "all" else f"The {self.role} split of {self.name}"

    @property
    def options(self) -> tuple[str, ...]:
        """The options that every example shares."""
        return self.examples[0].options

    @property
    def labels(self) -> tuple[int, ...]:
        """The true options' indices, in the order of the examples."""
        return tuple(example.label for example in self.examples)

    @cached_property
    def data_hash(self) -> str:
        """16 hex digits that change with any row, prompt, option or label, and with their order."""
        return fingerprint([[e.row, e.prompt, e.options, e.label] for e in self.examples])

    def require_classes(self) -> None:
        """Check that at least two classes occur.

        Raises:
            ValueError: if every example has the same label: nothing can be learned from it.
        """
        if len(set(self.labels)) == 1:
            only = self.options[self.labels[0]]
            raise ValueError(
                f"{self._title} has only examples labelled {only!r} ({len(self)} of them); "
                "take rows of at least two classes."
            )

    def with_instruction(self, instruction: str) -> "Task[RoleT]":
        """Put a sentence before the last "Answer:" of every prompt: prompt steering."""
        return replace(
            self,
            examples=tuple(example.with_instruction(instruction) for example in self.examples),
            source={**self.source, "instruction": instruction},
        )

    @overload
    def subset(self, indices: Iterable[int]) -> "Task[RoleT]": ...
    @overload
    def subset(self, indices: Iterable[int], *, role: NewRoleT) -> "Task[NewRoleT]": ...
    def subset(self, indices: Iterable[int], *, role: Role | None = None) -> "Task[Any]":
        """Take the examples at these places (not row numbers), in this order."""
        examples = tuple(self.examples[index] for index in indices)
        return Task(self.name, examples, role or self.role, self.source)

    def split(
        self,
        seed: int = 0,
        *,
        train: int | str | None = None,
        calibration: int | str | None = None,
        test: int | str | None = None,
    ) -> "Splits":
        """Divide into disjoint train, calibration and test, no text in two of them.

        Each is a number of examples, or row ranges such as "0-599,700-799" (both ends included;
        all three or none). What is not given shares the rest, 3 : 1 : 1.

        By number, a seeded shuffle of groups of equal texts is dealt to test, then calibration,
        then train, so the same seed and size give the same test split whatever the others are;
        the part of a group that exceeds a size is left out. By ranges, rows keep their order, and
        train leaves out the texts that recur in calibration or test, calibration those in test.

        Raises:
            ValueError: if the task is a split already, examples are too few, or ranges overlap.
        """
        if self.role != "all":
            raise ValueError(
                f"{self._title} is a split already; split the whole task, or take a `subset`."
            )
        wanted = {"train": train, "calibration": calibration, "test": test}
        wanted = {role: _count_or_ranges(role, value) for role, value in wanted.items()}
        ranges = {role: value for role, value in wanted.items() if isinstance(value, str)}
        if ranges and len(ranges) < len(wanted):
            raise ValueError(
                f"Row ranges are given for {' and '.join(ranges)} only; "
                "give ranges for train, calibration and test, or for none of them."
            )
        if ranges:
            hands, how = _by_ranges(self, ranges)
        else:
            sizes = {role: v for role, v in wanted.items() if isinstance(v, int)}
            hands, how = _by_number(self, sizes, seed)
        return Splits(
            self._hand(hands, "train", how),
            self._hand(hands, "calibration", how),
            self._hand(hands, "test", how),
        )

    def _hand(
        self, hands: Mapping[str, list[Example]], role: NewRoleT, how: Mapping[str, Any]
    ) -> "Task[NewRoleT]":
        """Make one split of the examples dealt to it."""
        return Task(self.name, tuple(hands[role]), role, {**self.source, "split": how})


class Splits(NamedTuple):
    """Three tasks that share no row and no text."""

    train: Task[Train]
    calibration: Task[Calibration]
    test: Task[Test]


def _count_or_ranges(role: str, value: int | str | None) -> int | str | None:
    """Read a count written as text, and refuse what is neither a count nor ranges."""
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if isinstance(value, int) and value < 1:
        raise ValueError(f"`{role}={value}`; each split needs at least one example.")
    return value


def _by_number(
    task: Task[Any], sizes: dict[str, int], seed: int
) -> tuple[dict[str, list[Example]], dict[str, Any]]:
    """Deal shuffled groups of equal texts."""
    groups: dict[str, list[Example]] = {}
    for example in task.examples:
        groups.setdefault(example.key, []).append(example)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)

    asked = " + ".join(f"{size} {role}" for role, size in sizes.items())
    rest = len(task) - sum(sizes.values())
    open_roles = {role: share for role, share in _SHARES.items() if role not in sizes}
    sizes = sizes | {r: rest * s // sum(open_roles.values()) for r, s in open_roles.items()}
    if "train" in open_roles:  # what rounding and cut groups leave over is good for training
        sizes["train"] = max(sizes["train"], len(task) - sum(sizes.values()) + sizes["train"])
    hands: dict[str, list[Example]] = {}
    queue = iter(shuffled)
    for role in ("test", "calibration", "train"):
        hand: list[Example] = []
        while len(hand) < sizes[role] and (group := next(queue, None)) is not None:
            hand.extend(group)
        hands[role] = hand[: sizes[role]]
        short = len(hand) < sizes[role] and role not in open_roles
        if short or not hand or rest < 0:
            raise ValueError(
                f"{task.name} has {len(task)} examples ({len(groups)} different texts), too few "
                f"for {asked or 'three splits'}; ask for fewer, or load more data."
            )
    unused = len(task) - sum(map(len, hands.values()))
    return hands, {"seed": seed, "sizes": {r: len(h) for r, h in hands.items()}, "unused": unused}


def _by_ranges(
    task: Task[Any], ranges: dict[str, str]
) -> tuple[dict[str, list[Example]], dict[str, Any]]:
    """Take rows as given; the earlier the use, the more it gives way to a recurring text."""
    by_row = {example.row: example for example in task.examples}
    rows = {role: _rows(text, role, task.name, max(by_row)) for role, text in ranges.items()}
    for one, other in (("train", "calibration"), ("train", "test"), ("calibration", "test")):
        if shared := set(rows[one]) & set(rows[other]):
            raise ValueError(
                f"Row {min(shared)} is in {one} ({ranges[one]}) and in {other} ({ranges[other]}); "
                "give ranges that do not overlap."
            )
    hands: dict[str, list[Example]] = {}
    dropped: dict[str, int] = {}
    taken: set[str] = set()
    for role in ("test", "calibration", "train"):
        found = [by_row[row] for row in rows[role] if row in by_row]
        hands[role] = [example for example in found if example.key not in taken]
        dropped[role] = len(found) - len(hands[role])
        taken |= {example.key for example in found}
        if dropped[role]:
            logger.info("%s: %s rows of %s recur later", task.name, dropped[role], role)
    return hands, {"rows": ranges, "dropped": dropped}


def _rows(text: str, role: str, name: str, last_row: int) -> list[int]:
    """Read "0-599,700-799"."""
    rows: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part)
        first, last = map(int, match.groups()) if match else (1, 0)
        if first > last:
            raise ValueError(
                f"`{role}={text!r}` is not a number of examples and not row ranges; "
                'write ranges as "0-599" or "0-599,700-799".'
            )
        if last > last_row:
            raise ValueError(
                f"`{role}={text!r}`, but the rows of {name} are numbered 0 to {last_row}; "
                "give rows that exist."
            )
        rows.extend(range(first, last + 1))
    if len(set(rows)) < len(rows):
        raise ValueError(f"`{role}={text!r}` names a row twice; give ranges that do not overlap.")
    return rows


def load_task(
    name: str, *, data_dir: str | Path | None = None, template: str | Path | None = None
) -> Task[All]:
    """Load a task by its name, with prompts in our wording or in that of a template file."""
    if name != "sms_spam" or data_dir is None:
        raise ValueError(f"Only sms_spam from a data folder can be loaded so far, not {name!r}.")
    path = Path(data_dir) / "sms_spam" / "SMSSpamCollection"
    wording = (
        Path(template).read_bytes().decode()
        if template
        else "Is the following text message spam or ham?\nMessage: {text}\nAnswer:"
    )
    options = ("ham", "spam")
    examples: list[Example] = []
    for row, line in enumerate(path.read_bytes().decode().rstrip("\n").split("\n")):
        label, text = line.split("\t", 1)
        prompt = wording.replace("{text}", text)
        examples.append(Example(row, prompt, options, options.index(label), text))
    return Task(name, tuple(examples), "all", {"files": {path.name: file_hash(path)}})


def task_names() -> list[str]:
    """List the tasks that `load_task` knows."""
    return ["sms_spam"]
