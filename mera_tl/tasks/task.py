"""What is asked of a model: examples with options or with a scorer, and disjoint splits.

An `Example` is one prompt with the options that count as answers, or with a scorer of free replies,
whose options are then "wrong" and "right". A `Task` is a tuple of examples with a role. The role is
a type as well as a value: `Task[Train]` and `Task[Calibration]` differ for a type checker, so what
is searched freely and what certifies cannot be exchanged by accident.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from html import escape
from typing import Any, Generic, Literal, NamedTuple, SupportsIndex, TypeVar, overload

from mera_tl.storage import fingerprint
from mera_tl.tasks import splitting as splits
from mera_tl.tasks.scorers import Scorer

logger = logging.getLogger(__name__)

All = Literal["all"]
Train = Literal["train"]
Calibration = Literal["calibration"]
Test = Literal["test"]
Role = Literal["all", "train", "calibration", "test"]
RoleT = TypeVar("RoleT", bound=Role, covariant=True)
NewRoleT = TypeVar("NewRoleT", bound=Role)

_ANSWER = re.compile(r"answer\s*:", re.IGNORECASE)


@dataclass(frozen=True, repr=False)
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
    scorer: Scorer | None = None
    """What grades a free reply; None where an option is to be answered."""
    reference: str = ""
    """The true answer, for scorers that compare with one."""
    instruction: str = ""
    """The sentence of the prompt that asks for what the scorer checks."""
    kind: str = ""
    """The kind of question, where a task has several."""

    def __post_init__(self) -> None:
        if isinstance(self.options, str):
            raise ValueError(
                f"options={self.options!r:.60} is one text; pass several, as ('yes', 'no')."
            )
        if not isinstance(self.label, SupportsIndex):
            raise ValueError(
                f"label={self.label!r:.60} is no place of an option; pass one, as 0 for the first."
            )

    def __repr__(self) -> str:
        told = ((f.name, getattr(self, f.name)) for f in fields(self))
        return f"Example({', '.join(f'{k}={v!r}' for k, v in told if v not in ('', None))})"

    @property
    def key(self) -> str:
        """What duplicates share: that of the prompt; another instruction is the same text."""
        return splits.key_of(self.without_instruction().prompt)

    def without_instruction(self) -> "Example":
        """Take the instruction off the prompt; without one nothing changes."""
        if not self.instruction:
            return self
        before, _, after = self.prompt.rpartition(self.instruction)
        return replace(self, prompt=f"{before.rstrip()}{after}", instruction="")

    def score(self, reply: str) -> float:
        """Return how good a reply is, in [0, 1].

        Raises:
            ValueError: if the scorer fails or returns no such number, naming the row and the reply.
        """
        assert self.scorer is not None  # asked of scored tasks only
        try:
            return self.scorer(reply, self.reference)
        except ValueError as error:
            raise ValueError(
                f"The scorer {self.scorer.name!r} failed on row {self.row} with the reply "
                f"{reply!r:.80} ({error}); correct the scorer, or leave the row out."
            ) from None

    def with_text(self, text: str) -> "Example":
        """Put another text in the place of `text`; the question around it stays.

        Raises:
            ValueError: if no part of the prompt may be shortened.
        """
        if not self.text:
            raise ValueError(
                f"Row {self.row} has no text that may be shortened; leave the row out, or take a "
                "model with a longer context."
            )
        return replace(self, prompt=self.prompt.replace(self.text, text, 1), text=text)

    def with_instruction(self, instruction: str) -> "Example":
        """Put a sentence before the last "Answer:", or at the end of a prompt that has none.

        Case does not count, white space at the end of the prompt stays at the end, and an
        "Answer:" inside `text` is data, not a cue. "{instruction}" in the sentence stands for the
        example's own instruction.
        """
        instruction = instruction.replace("{instruction}", self.instruction)
        after_text = self.prompt.find(self.text) + len(self.text) if self.text else 0
        cues = list(_ANSWER.finditer(self.prompt, after_text))
        if cues:
            start = cues[-1].start()
            prompt = f"{self.prompt[:start]}{instruction} {self.prompt[start:]}"
        else:
            end = len(self.prompt.rstrip())
            prompt = f"{self.prompt[:end]} {instruction}{self.prompt[end:]}"
        return replace(self, prompt=prompt)


@dataclass(frozen=True, repr=False)
class Task(Generic[RoleT]):
    """Examples that share their options, and what they may be used for.

    A sequence of them: `task[0]` is an `Example`, `task[:10]` a task of the same role.

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
            if not isinstance(example, Example):
                raise ValueError(f"{example!r:.60} is no example; pass Example(...)s.")
            if example.options != self.options or not 0 <= example.label < len(self.options):
                raise ValueError(
                    f"Row {example.row} of {self.name} has options {example.options} and label "
                    f"{example.label}, but the task's options are {self.options}; "
                    "give every example the same options and a label among them."
                )
            if (example.scorer is None) is self.scored:
                raise ValueError(
                    f"Row {example.row} of {self.name} has {'no' if self.scored else 'a'} scorer, "
                    "unlike the rows before it; give every example one, or none."
                )
        if len({example.row for example in self.examples}) < len(self.examples):
            raise ValueError(f"{self._title} holds a row twice; give every example its own row.")

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> "Task[RoleT]": ...
    def __getitem__(self, place: int | slice) -> "Example | Task[RoleT]":
        if isinstance(place, slice):
            return replace(self, examples=self.examples[place])
        if not isinstance(place, SupportsIndex):
            raise ValueError(
                f"{place!r:.60} is no place of an example; pass one, as 0, or task[:10] for some."
            )
        return self.examples[place]

    def __repr__(self) -> str:
        told = self.examples[0].scorer
        how = f"scored by {told.name}" if told else f"options {'/'.join(self.options)}"
        return f"Task({self.name}, {self.role}, {len(self)} examples, {how})"

    def _repr_html_(self) -> str:
        if self.scored:
            return f"<b>{escape(repr(self))}</b>{_wrapped(self.examples[0].prompt)}"
        first, counts = self.examples[0], [self.labels.count(i) for i in range(len(self.options))]
        shares = ", ".join(f"{o} {n}" for o, n in zip(self.options, counts, strict=True))
        return (
            f"<b>{escape(repr(self))}</b><br>labels: {escape(shares)}"
            f"{_wrapped(first.prompt)}true: {escape(first.options[first.label])}"
        )

    @property
    def _title(self) -> str:
        return self.name if self.role == "all" else f"The {self.role} split of {self.name}"

    @property
    def options(self) -> tuple[str, ...]:
        """The options that every example shares."""
        return self.examples[0].options

    @property
    def scored(self) -> bool:
        """Whether free replies are scored, instead of options answered."""
        return self.examples[0].scorer is not None

    @property
    def labels(self) -> tuple[int, ...]:
        """The true options' indices, in the order of the examples."""
        return tuple(example.label for example in self.examples)

    @cached_property
    def data_hash(self) -> str:
        """16 hex digits that change with any row, prompt, option, label, scorer and their order."""
        rows: list[list[Any]] = [[e.row, e.prompt, e.options, e.label] for e in self.examples]
        for row, example in zip(rows, self.examples, strict=True):
            if example.scorer is not None:
                row += [example.scorer.to_json(), example.reference, example.instruction]
        return fingerprint(rows)

    @property
    def repeats(self) -> list[list[int]]:
        """The rows that share a text, a list for each text that is there more than once."""
        rows: dict[str, list[int]] = {}
        for example in self.examples:
            rows.setdefault(example.key, []).append(example.row)
        return [same for same in rows.values() if len(same) > 1]

    def require_classes(self) -> None:
        """Check that at least two classes occur; a scored task has none.

        Raises:
            ValueError: if every example has the same label: nothing can be learned from it.
        """
        if len(set(self.labels)) == 1 and not self.scored:
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

    def without_instruction(self) -> "Task[RoleT]":
        """Take the instruction off every prompt, as the direction `instruction` needs it.

        Raises:
            ValueError: if an example has none.
        """
        for example in self.examples:
            if not example.instruction:
                raise ValueError(
                    f"Row {example.row} of {self.name} has no instruction that could be taken off "
                    "its prompt; give the task's `instruction`, or take another direction."
                )
        return replace(self, examples=tuple(e.without_instruction() for e in self.examples))

    @overload
    def subset(self, indices: Iterable[int]) -> "Task[RoleT]": ...
    @overload
    def subset(self, indices: Iterable[int], *, role: NewRoleT) -> "Task[NewRoleT]": ...
    def subset(self, indices: Iterable[int], *, role: Role | None = None) -> "Task[Any]":
        """Take the examples at these places (not row numbers), in this order.

        With role calibration or test, of examples with the same text one is taken: a repeated text
        is no new evidence.

        Raises:
            ValueError: if these are no places.
        """
        if not isinstance(indices, Iterable):
            raise ValueError(f"indices={indices!r} are no places; pass several, as range(100).")
        examples = tuple(self.examples[index] for index in indices)
        if role in splits.EVIDENCE:
            once = splits.distinct([example.key for example in examples], 0)
            if len(once) < len(examples):
                logger.info("%s: %d repeated texts left out", role, len(examples) - len(once))
            examples = tuple(examples[index] for index in once)
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
        then train, so the same seed and size give the same test split whatever the others are. By
        ranges, rows keep their order, and train leaves out the texts that recur in calibration or
        test, calibration those in test. Calibration and test take one example of a group, by a
        seeded choice, and the others go unused (`source["split"]` counts them); train may take all.

        Raises:
            ValueError: if the task is a split already, examples are too few, or ranges overlap.
        """
        if self.role != "all":
            raise ValueError(
                f"{self._title} is a split already; split the whole task, or take a `subset`."
            )
        wanted = {"train": train, "calibration": calibration, "test": test}
        rows = [example.row for example in self.examples]
        keys = [example.key for example in self.examples]
        dealt, how = splits.deal(rows, keys, wanted, seed=seed, title=self._title)
        said = ", ".join(f"{what} {count}" for what, count in how.items())
        logger.info("%s split: %s", self.name, re.sub(r"[{}']", "", said))
        source = {**self.source, "split": how}
        part = replace(self, source=source)
        return Splits(
            part.subset(dealt["train"], role="train"),
            part.subset(dealt["calibration"], role="calibration"),
            part.subset(dealt["test"], role="test"),
        )


class Splits(NamedTuple):
    """Three tasks that share no row and no text."""

    train: Task[Train]
    """To fit probes and directions, and to search."""
    calibration: Task[Calibration]
    """To certify, once."""
    test: Task[Test]
    """To look at afterwards."""

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(split)} {split.role}" for split in self)
        return f"Splits({self.train.name}: {sizes})"

    def _repr_html_(self) -> str:
        return f"<b>{escape(repr(self))}</b>"


def _wrapped(prompt: str) -> str:
    """Return a prompt as a notebook shows it: its line breaks kept, long lines whole."""
    return f"<pre style='white-space: pre-wrap'>{escape(prompt)}</pre>"
