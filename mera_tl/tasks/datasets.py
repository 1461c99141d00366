"""What each data set is: its options, where its rows lie, and how a row becomes a question.

`DATASETS` is the whole list; a new data set is one entry. A user's own data set is the same entry,
read from a file (`own.py`). Wordings are templates: `{name}` stands for a column, every other
brace for itself, and nothing in the data is ever taken for a field.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from typing import Any

from mera_tl.tasks import scored
from mera_tl.tasks.files import Row, text_of
from mera_tl.tasks.task import Example

FIELD = re.compile(r"\{([^\W\d]\w*)\}")
"""A field of a template."""
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Form:
    """How a row becomes a question."""

    template: str
    label: str = "label"
    """The column that holds the true option; none of a scored task."""
    text: str = ""
    """The field that may be shortened to fit a context; none if empty."""
    columns: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    """Names of fields for columns; several columns, or a column of lists, are lettered choices."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Options for the values of `label` that are not an option's own text; case does not count."""
    keep: Mapping[str, str] = field(default_factory=dict)
    """A pattern for each column that says which rows belong to the task; case does not count."""
    label_in_prompt: bool = False
    """Whether a field may show the column of the true answer: it is then in the prompt."""
    prepare: Callable[[Callable[[str], Any]], Row] | None = None
    """From the columns of a row, found by name, the row that is asked; no key of a task file."""

    def check(self, title: str, reference: str = "") -> None:
        """Refuse a wording that names no field, another one than `text`, or the true answer.

        That is in the column `label` or, of a scored row, in the column `reference`.

        Raises:
            ValueError: saying which.
        """
        names = FIELD.findall(self.template)
        if not names:
            raise ValueError(
                "The template names no column, so every prompt would be the same; write {text}, "
                "or another column's name in braces, where the row's text belongs."
            )
        if self.text and self.text not in names:
            raise ValueError(
                f"{title} has text = {self.text!r}, but the template's fields are "
                f"{', '.join(names)}; name the one that may be shortened, or leave text out."
            )
        for name in names:
            # A field of the label's own name is no field: `_field` says so.
            columns = self.columns.get(name, name if reference else ())
            shown = {columns} if isinstance(columns, str) else set(columns)
            told = shown & {self.label, reference} - {""}
            if told and not self.label_in_prompt:
                raise ValueError(
                    f"The field {{{name}}} of {title} is the column {told.pop()!r}, the true "
                    "answer, so the prompt would give it away; take another column, or say "
                    "label_in_prompt = true if you mean it."
                )


@dataclass(frozen=True)
class Plain:
    """Plain files: all that fit `pattern` in `folder`, in the order of their names."""

    folder: str
    pattern: str
    form: Form
    line: str = ""
    """A pattern with a named group for each column, for files without a header."""
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Hub:
    """One split of a data set on the Hugging Face hub, or of a `save_to_disk` copy of it."""

    id: str
    split: str
    form: Form
    config: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Options, and the sources that have rows for them."""

    options: tuple[str, ...]
    plain: Plain | None = None
    hub: Hub | None = None
    grading: scored.Grading | None = None
    """How free replies are scored, where no option is to be answered."""


_SPAM = """Someone received this text message:
{text}

Is the message spam or ham? Reply with one word.
Answer:"""
_NEWS = """A sentence from the financial news:
{text}

Does an investor read it as positive, neutral or negative? Reply with one word.
Answer:"""
_PASSAGE = """Passage: {passage}

Going by the passage alone, {question}? Reply with yes or no.
Answer:"""
_YES_NO = """{text}

Reply to the question with yes or no.
Answer:"""
_CHOICES = """{question}

{choices}

Exactly one of these choices is right. Reply with its letter.
Answer:"""
_FILM = """A viewer wrote about a film:
{text}

Is this review positive or negative? Reply with one word.
Answer:"""


_MESSAGE = """Someone received this text message:
{text}

"""
_WHY = """Passage: {passage}

Going by the passage alone, {question}? """


def _mmlu(subjects: str) -> Dataset:
    """Describe the MMLU subjects whose name begins with a word."""
    choices = tuple(f"choice{number}" for number in range(4))
    numbered = {str(number): letter for number, letter in enumerate("ABCD")}
    plain = Form(_CHOICES, "answer", columns={"choices": choices}, labels=numbered)
    hub = Form(_CHOICES, "answer", keep={"subject": f"{subjects}_.*"})
    return Dataset(
        tuple("ABCD"),
        Plain("mmlu", f"test/{subjects}_*.csv", plain),
        Hub("cais/mmlu", "test", hub, config="all"),
    )


def _sms(options: tuple[str, ...], form: Form, grading: scored.Grading | None = None) -> Dataset:
    """Describe the SMS spam collection, asked in some way."""
    line = r"(?P<label>[^\t]*)\t(?P<text>.*)"
    plain = Plain("sms_spam", "SMSSpamCollection", form, line=line)
    hub = Hub("ucirvine/sms_spam", "train", replace(form, columns={"text": "sms"}))
    return Dataset(options, plain, hub, grading)


def _sujet(template: str, task_type: str, options: tuple[str, ...]) -> Hub:
    """Describe a part of Sujet-Finance: rows of one type whose answer is one of the options."""
    keep = {"task_type": task_type, "answer": "|".join(options)}
    form = Form(template, "answer", "text", columns={"text": "inputs"}, keep=keep)
    return Hub("sujet-ai/Sujet-Finance-Instruct-177k", "train", form)


def _four(question: Any, right: Any, wrong: Iterable[Any]) -> Row:
    """Letter the right answer among three wrong ones; too few stay too few, and are left out.

    Drawn and shuffled by the question alone: the same wherever, and in whatever order, it is read.
    """
    question, right = (str(each or "").strip() for each in (question, right))
    others = [each for each in dict.fromkeys(str(one).strip() for one in wrong) if each]
    if right in ("", *others):
        return {"question": question, "choices": [], "answer": ""}
    by_question = random.Random(f"truthfulqa/{question}")
    choices = [right, *by_question.sample(others, min(3, len(others)))]
    by_question.shuffle(choices)
    return {"question": question, "choices": choices, "answer": _LETTERS[choices.index(right)]}


def _truthful_plain(column: Callable[[str], Any]) -> Row:
    wrong = str(column("Incorrect Answers") or "").split(";")
    return _four(column("Question"), column("Best Answer"), wrong)


def _truthful_hub(column: Callable[[str], Any]) -> Row:
    targets = column("mc1_targets")
    marked = list(zip(targets["choices"], targets["labels"], strict=True))
    right = [choice for choice, is_right in marked if is_right]
    wrong = [choice for choice, is_right in marked if not is_right]
    return _four(column("question"), right[0] if len(right) == 1 else "", wrong)


_TRUTH = {"true": "yes", "false": "no"}
_SENTIMENTS = ("positive", "neutral", "negative")
DATASETS: dict[str, Dataset] = {
    "sms_spam": _sms(("ham", "spam"), Form(_SPAM, text="text")),
    "sentiment_analysis": Dataset(
        _SENTIMENTS,
        Plain(
            "financial_phrasebank",
            "Sentences_75Agree.txt",
            Form(_NEWS, text="text"),
            line="(?P<text>.*)@(?P<label>[^@]*)",
            encoding="iso-8859-1",
        ),
        _sujet(_NEWS, "sentiment_analysis", _SENTIMENTS),
    ),
    "yes_no_question": Dataset(
        ("yes", "no"),
        Plain("boolq", "dev.jsonl", Form(_PASSAGE, "answer", "passage", labels=_TRUTH)),
        _sujet(_YES_NO, "yes_no_question", ("yes", "no")),
    ),
    "mmlu_high_school": _mmlu("high_school"),
    "mmlu_professional": _mmlu("professional"),
    # MC1 has one right choice among two to thirteen. Options are the same for every example here,
    # so questions with three wrong answers or more are asked, with four choices.
    "truthfulqa": Dataset(
        tuple("ABCD"),
        Plain("truthfulqa", "TruthfulQA.csv", Form(_CHOICES, "answer", prepare=_truthful_plain)),
        Hub(
            "truthfulqa/truthful_qa",
            "validation",
            Form(_CHOICES, "answer", prepare=_truthful_hub),
            config="multiple_choice",
        ),
    ),
    "imdb": Dataset(
        ("positive", "negative"),
        hub=Hub(
            "stanfordnlp/imdb",
            "test",
            Form(_FILM, text="text", labels={"pos": "positive", "neg": "negative"}),
        ),
    ),
    # Only questions with all ten choices: with fewer, some options would be no choice at all.
    "mmlu_pro_natural_science": Dataset(
        tuple("ABCDEFGHIJ"),
        hub=Hub(
            "TIGER-Lab/MMLU-Pro",
            "test",
            Form(
                _CHOICES,
                "answer",
                columns={"choices": "options"},
                keep={"category": "biology|chemistry|physics"},
            ),
        ),
    ),
    "sms_json": _sms(scored.OPTIONS, Form(_MESSAGE, "", "text"), scored.SMS_JSON),
    "boolq_reason": Dataset(
        scored.OPTIONS,
        Plain("boolq", "dev.jsonl", Form(_WHY, "", "passage")),
        Hub("google/boolq", "validation", Form(_WHY, "", "passage")),
        scored.BOOLQ_REASON,
    ),
    "gsm8k": Dataset(
        scored.OPTIONS,
        Plain("gsm8k", "test.jsonl", Form("{question}", "", "question")),
        Hub("openai/gsm8k", "test", Form("{question}", "", "question"), config="main"),
        scored.GSM8K,
    ),
    # The rows whose instructions the scorers of this package can all check.
    "ifeval": Dataset(
        scored.OPTIONS,
        Plain("ifeval", "*.jsonl", Form("{prompt}", "")),
        Hub("google/IFEval", "train", Form("{prompt}", "")),
        scored.IFEVAL,
    ),
}


def questions(
    rows: Iterable[Row],
    title: str,
    form: Form,
    options: tuple[str, ...],
    grading: scored.Grading | None = None,
) -> tuple[list[Example], dict[str, int]]:
    """Ask every row that belongs to the task; also count, by reason, the rows left out.

    Left out are rows that `keep` does not want, rows with a blank field in the prompt or a blank
    reference, and rows whose lettered choices are blank, more or fewer than the options.

    Raises:
        ValueError: if a column is missing, a label is no option, or no row remains.
    """
    form.check(title, "" if grading is None else grading.reference)
    asked: list[Example] = []
    left_out: dict[str, int] = {}
    for number, row in enumerate(rows):
        question = _ask(row, number, title, form, options)
        if grading is not None and not isinstance(question, str):
            question = _graded(question, row, grading, title)
        if isinstance(question, str):
            left_out[question] = left_out.get(question, 0) + 1
        else:
            asked.append(question)
    if not asked:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise ValueError(f"{title} has no row to ask ({reasons or 'it is empty'}); check the data.")
    return asked, left_out


def _ask(row: Row, number: int, title: str, form: Form, options: tuple[str, ...]) -> Example | str:
    """Ask one row, or name the reason to leave it out."""
    if form.prepare is not None:
        row = form.prepare(partial(_column, row, number=number, title=title))
    for column, pattern in form.keep.items():
        value = text_of(_column(row, column, number, title))
        if not re.fullmatch(pattern, value, re.IGNORECASE):
            return "not of this task"
    texts: dict[str, str] = {}
    for name in FIELD.findall(form.template):
        value = _field(row, name, number, title, form)
        if isinstance(value, list | tuple):
            if len(value) != len(options) or not all(map(text_of, value)):
                return "without a choice for every option"
            value = "\n".join(f"{letter}. {v}" for letter, v in zip(_LETTERS, value, strict=False))
        # Blanks around a field are accidents of its source: the same message ends in a line feed
        # on the hub and in spaces in the plain file.
        texts[name] = text_of(value)
        if not texts[name]:
            return f"with a blank {name}"
    label = scored.RIGHT  # of a scored row: what its reply should be
    if form.label:
        label = _label(_column(row, form.label, number, title), form.labels, options)
    if label is None:
        raise ValueError(
            f"Row {number} of {title} has the label {row[form.label]!r}, but the options are "
            f"{', '.join(options)}; map this label to an option, or correct the row."
        )
    # One pass over the template: braces inside the data are never looked at.
    prompt = FIELD.sub(lambda match: texts[match[1]], form.template)
    if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(
            f"Row {number} of {title} holds half a character, as JSON of a text that was cut may, "
            "which no tokenizer reads; correct the row."
        )
    return Example(number, prompt, options, label, texts.get(form.text, ""))


def _graded(question: Example, row: Row, grading: scored.Grading, title: str) -> Example | str:
    """Say how the reply is scored, and ask for it where the wording does not."""
    scorer, prompt = grading.scorer_of(row), question.prompt
    if scorer is None:
        return "with an instruction that no scorer checks"
    if grading.instruction not in prompt:
        prompt = f"{prompt}{'' if prompt[-1].isspace() else ' '}{grading.instruction}"
    try:
        told = {"reference": grading.reference_of(row), "instruction": grading.instruction}
    except ValueError as error:
        raise ValueError(f"Row {question.row} of {title}: {error}") from None
    if grading.reference and not told["reference"]:
        return f"with a blank {grading.reference}"
    graded = replace(question, prompt=prompt, scorer=scorer, **told)
    if not scorer.own_code:  # what can grade no reply to this row is found before any is given
        graded.score("{}")
    return graded


def _column(row: Row, column: str, number: int, title: str) -> Any:
    if column not in row:
        raise ValueError(
            f"Row {number} of {title} has no column {column!r}; its columns are "
            f"{', '.join(row)}; name the right one, or use data that has it."
        )
    return row[column]


def _field(row: Row, name: str, number: int, title: str, form: Form) -> Any:
    """Find what a template's field stands for; the true answer is not among it."""
    columns = form.columns.get(name, name)
    if not isinstance(columns, str):
        return [_column(row, column, number, title) for column in columns]
    if name in form.columns:
        return _column(row, columns, number, title)
    if name not in row or name == form.label:
        there = dict.fromkeys([*form.columns, *row])
        raise ValueError(
            f"The template asks for {{{name}}}, but the fields of {title} are "
            f"{', '.join(other for other in there if other != form.label)}; "
            "correct the name in braces."
        )
    return row[name]


def _label(value: Any, labels: Mapping[str, str], options: tuple[str, ...]) -> int | None:
    """Find the option that a label names, by `labels` first, by the option's own text second."""
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    key = text_of(whole).casefold()
    mapped = {str(given).strip().casefold(): option for given, option in labels.items()}
    places = {option.casefold(): place for place, option in enumerate(options)}
    return places.get(mapped.get(key, key).casefold())


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known names come nearest: the end of a sentence about an unknown one."""
    names = sorted(known)
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known are {', '.join(names)}."
