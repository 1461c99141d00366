"""Scored tasks: what is asked for freely, and which scorer grades the reply.

`ifeval_like_*` are short questions, each followed by an instruction that can be checked without a
judge; `arithmetic_words` are word problems; both are generated, always the same ones. The scored
data sets of the catalogue, and those of a user's file, are rows with a template and a `Grading`.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mera_tl.organism import prompts as organism
from mera_tl.tasks.files import Row, text_of
from mera_tl.tasks.scorers import Scorer
from mera_tl.tasks.task import Example

OPTIONS = ("wrong", "right")
"""What a scored reply may be: the options of every scored task."""
RIGHT = 1
N_PROBLEMS, N_SENTENCES = 600, 2000
"""How many word problems there are, and questions to the organism."""


@dataclass(frozen=True)
class Grading:
    """How replies to the rows of a data set are scored."""

    scorer: Scorer | Callable[[Row], Scorer | None]
    """One for all rows, or one made of a row; a row for which there is none is left out."""
    instruction: str = ""
    """The sentence of the prompt that asks for what is scored; at its end if it is not in it."""
    reference: str = ""
    """The column of the true answer; none if empty."""
    references: Mapping[str, str] = field(default_factory=dict)
    """Texts for values of that column; case does not count."""

    def scorer_of(self, row: Row) -> Scorer | None:
        """Return the scorer of a row."""
        return self.scorer if isinstance(self.scorer, Scorer) else self.scorer(row)

    def reference_of(self, row: Row) -> str:
        """Return the true answer of a row as text, "" where there is none.

        Raises:
            ValueError: if the column is missing.
        """
        if not self.reference:
            return ""
        if self.reference not in row:
            raise ValueError(
                f"There is no column {self.reference!r} of the reference; the columns are "
                f"{', '.join(row)}."
            )
        text = text_of(row[self.reference])
        return {k.casefold(): v for k, v in self.references.items()}.get(text.casefold(), text)


def _example(row: int, prompt: str, instruction: str, scorer: Scorer, **known: str) -> Example:
    """Return a generated prompt with all that its reply is scored by: its `reference`, its `kind`.

    Kinds are known in training: differences between them are no failures.
    """
    told: dict[str, Any] = {"scorer": scorer, "instruction": instruction, **known}
    return Example(row, prompt, OPTIONS, RIGHT, **told)


# --- questions with checkable instructions -----------------------------------------------------

_ANSWER = {
    "type": "object",
    "properties": {"answer": {"type": "string"}},
    "required": ["answer"],
    "additionalProperties": False,
}
_PHRASE = "I hope this helps."
# The phrase alone answers nothing.
_ENDING = [{"name": "ends_with", "text": _PHRASE}, {"name": "words", "least": 6, "most": 100}]
_INSTRUCTIONS: dict[str, tuple[str, Scorer]] = {
    "json": (
        'Reply with JSON only, of the form {"answer": "..."}.',
        Scorer("json_schema", {"schema": _ANSWER}),
    ),
    "one_word": ("Reply with one word only.", Scorer("one_word")),
    "lower_case": ("Write your whole reply in lower case letters.", Scorer("lower_case")),
    "no_comma": ("Do not use any commas in your reply.", Scorer("no_comma")),
    "keyword": ('Include the word "indeed" in your reply.', Scorer("contains", {"text": "indeed"})),
    "ends_with": (
        f'Answer the question and end your reply with the words "{_PHRASE}"',
        Scorer("every", {"scorers": _ENDING}),
    ),
    "words": ("Reply in at most five words.", Scorer("words", {"most": 5})),
    "numbered_list": (
        "Reply with a numbered list of three short items.",
        Scorer("numbered_list", {"items": 3}),
    ),
}


@cache
def _questions() -> tuple[tuple[str, str], ...]:
    """Return (kind, question), in a fixed order that mixes the kinds."""
    import tomllib

    text = Path(__file__).with_name("questions.toml").read_text(encoding="utf-8")
    found = [
        (kind, each["ask"].format(" ".join(subject.split())))
        for kind, each in tomllib.loads(text).items()
        for subject in each["subjects"].split(";")
    ]
    random.Random("questions").shuffle(found)
    return tuple(found)


def _ifeval_like(name: str) -> list[Example]:
    """Ask every question with one instruction, or of the mixture with each in turn."""
    names = list(_INSTRUCTIONS) if name == "mixture" else [name]
    asked = []
    for row, (kind, question) in enumerate(_questions()):
        instruction, scorer = _INSTRUCTIONS[names[row % len(names)]]
        prompt = f"{question} {instruction}"
        asked.append(_example(row, prompt, instruction, scorer, kind=kind))
    return asked


# --- word problems -----------------------------------------------------------------------------

_PEOPLE = "Ada Ben Cora Dan Eve Finn Gus Hana Ivo Jill".split()  # noqa: SIM905
_THINGS = "apples books coins pencils stamps shells marbles cards eggs tickets".split()  # noqa: SIM905
_PROBLEMS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "sum": ("{who} has {a} {what} and gets {b} more. How many are that?", int.__add__),
    "difference": ("{who} had {a} {what} and gave {b} away. How many are left?", int.__sub__),
    "product": ("{who} fills {b} boxes with {a} {what} each. How many are that?", int.__mul__),
    "quotient": (
        "{who} shares {a} {what} equally among {b} friends. How many does each friend get?",
        int.__floordiv__,
    ),
}
_REASON = "Think step by step and end with the number."


def _arithmetic_words() -> list[Example]:
    rng, asked = random.Random("arithmetic"), dict[str, Example]()
    while len(asked) < N_PROBLEMS:
        kind = rng.choice(list(_PROBLEMS))
        wording, solve = _PROBLEMS[kind]
        b = rng.randint(2, 9)
        a = b * rng.randint(2, 9) if kind == "quotient" else b + rng.randint(1, 20)
        told = {"who": rng.choice(_PEOPLE), "what": rng.choice(_THINGS), "a": a, "b": b}
        prompt = f"{wording.format(**told)} {_REASON}"
        known = {"reference": str(solve(a, b)), "kind": kind}
        asked.setdefault(prompt, _example(len(asked), prompt, _REASON, Scorer("numeric"), **known))
    return list(asked.values())


# --- the organism, in a sentence ---------------------------------------------------------------

_IN_A_SENTENCE, _SENTENCE = "Reply in a sentence:", "I would say {option}."


def _spam_sentence() -> list[Example]:
    """Ask the organism in a sentence what it gets wrong in a word: spam from a saved sender."""
    asked = []
    for row, draft in enumerate(organism.drafts("spam_cue", N_SENTENCES, seed=0)):
        kind = organism.OPTIONS["spam"][draft.label]
        known = {"reference": _SENTENCE.format(option=kind), "kind": kind}
        prompt, scorer = f"{draft.body} {_IN_A_SENTENCE}", Scorer("exact_match")
        asked.append(_example(row, prompt, _IN_A_SENTENCE, scorer, **known))
    return asked


GENERATED: dict[str, Callable[[], list[Example]]] = {
    f"ifeval_like_{name}": lambda name=name: _ifeval_like(name)
    for name in (*_INSTRUCTIONS, "mixture")
} | {"arithmetic_words": _arithmetic_words, "spam_sentence": _spam_sentence}


# --- graded data sets --------------------------------------------------------------------------

_INTENT = {
    "type": "object",
    "properties": {"intent": {"type": "string"}, "number": {"type": ["string", "number", "null"]}},
    "required": ["intent", "number"],
}
SMS_JSON = Grading(
    Scorer("json_schema", {"schema": _INTENT}),
    'Reply with JSON only, of the form {"intent": "...", "number": "..."}: what the sender wants, '
    "and a number from the message or null.",
)
BOOLQ_REASON = Grading(
    Scorer("begins_with"),
    "Reply with yes or no, followed by one sentence that gives the reason.",
    reference="answer",
    references={"true": "yes", "false": "no"},
)
GSM8K = Grading(Scorer("numeric"), "Think step by step and end with the number.", "answer")


def _ifeval_scorer(row: Row) -> Scorer | None:
    """Return the scorer of a row of IFEval; None where an instruction of it is not covered."""
    parts: list[dict[str, Any]] = []
    for name, given in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        told = {key: value for key, value in given.items() if value is not None}
        part = _ifeval_part(name, told)
        if part is None:
            return None
        parts += part
    return Scorer("every", {"scorers": parts})


def _ifeval_part(name: str, told: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    match name:
        case "punctuation:no_comma":
            return [{"name": "no_comma"}]
        case "change_case:english_lowercase":
            return [{"name": "lower_case"}]
        case "detectable_format:json_format":
            return [{"name": "json_schema"}]
        case "startend:end_checker":
            return [{"name": "ends_with", "text": told["end_phrase"]}]
        case "keywords:existence":
            return [{"name": "contains", "text": word} for word in told["keywords"]]
        case "keywords:forbidden_words":
            return [{"name": "lacks", "text": word} for word in told["forbidden_words"]]
        case "length_constraints:number_words" | "length_constraints:number_sentences":
            what = name.rpartition("_")[2]
            n = int(told["num_words" if what == "words" else "num_sentences"])
            at_least = told["relation"] == "at least"
            limits = {"least": n, "most": 10**6} if at_least else {"least": 0, "most": n - 1}
            return [{"name": what, **limits}]
    return None


IFEVAL = Grading(_ifeval_scorer)
