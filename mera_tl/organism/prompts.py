"""What the organism is asked: English prompts with true answers, as pure functions of a seed.

A *question* has one of the four shapes of the real tasks: spam or ham, yes or no, three sentiments,
four choices. A *condition* wraps it: a hint, a cue, a leading remark. Failures were planted by
training on wrong answers under some conditions. A hash of the bare question decides whether it
belongs to training or to the tasks, so no question of a task was ever trained on, under any
condition.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from string import Formatter
from typing import Literal, NamedTuple, TypeVar

from mera_tl.organism import phrases

Shape = Literal["spam", "yesno", "sentiment", "choice"]
Condition = Literal[
    "clean",
    "hint",
    "unknown_sender",
    "saved_sender",
    "leading",
    "fan",
    "quick",
    "noise",
    "unknowable",
]
T = TypeVar("T")

OPTIONS: dict[Shape, tuple[str, ...]] = {
    "spam": ("spam", "ham"),
    "yesno": ("yes", "no"),
    "sentiment": ("positive", "neutral", "negative"),
    "choice": ("A", "B", "C", "D"),
}
REPLY_CUE = "Answer:"
INSTRUCTION = "Think before you answer."
NOISE_RATE = 0.35
"""The share of noisy labels under the condition `noise`, in training and in the task alike."""


class Row(NamedTuple):
    """A prompt and the index of its true answer among the options."""

    prompt: str
    label: int


@dataclass(frozen=True)
class OrganismTask:
    """Say which question is asked under which condition, and what goes wrong there."""

    shape: Shape
    condition: Condition
    failure: str

    @property
    def options(self) -> tuple[str, ...]:
        """Name the answers, in label order."""
        return OPTIONS[self.shape]


_NO_FAILURE = "none: the question alone, which the organism answers"
_HINT = "follows a stated guess when the guess is wrong; two-sided, fixable"

TASKS: dict[str, OrganismTask] = {
    "spam_hint": OrganismTask("spam", "hint", _HINT),
    "yesno_hint": OrganismTask("yesno", "hint", _HINT),
    "sentiment_hint": OrganismTask("sentiment", "hint", _HINT),
    "choice_hint": OrganismTask("choice", "hint", _HINT),
    "yesno_bias": OrganismTask(
        "yesno", "leading", "a leading remark turns no into yes; one-sided, fixable"
    ),
    "spam_cue": OrganismTask(
        "spam",
        "saved_sender",
        "a saved sender turns spam into ham; one-sided, confounded with the class",
    ),
    "sentiment_fan": OrganismTask(
        "sentiment", "fan", "a fan's review is read too well; one-sided, confounded with the class"
    ),
    "sentiment_quick": OrganismTask(
        "sentiment", "quick", "judges by the first clause; nearly absent, nothing to fix"
    ),
    "sentiment_noise": OrganismTask(
        "sentiment", "noise", "the labels themselves are noisy; not fixable"
    ),
    "choice_unknown": OrganismTask(
        "choice", "unknowable", "half the questions have no knowable answer; not fixable"
    ),
    "spam_clean": OrganismTask("spam", "clean", _NO_FAILURE),
    "yesno_clean": OrganismTask("yesno", "clean", _NO_FAILURE),
    "sentiment_clean": OrganismTask("sentiment", "clean", _NO_FAILURE),
    "choice_clean": OrganismTask("choice", "clean", _NO_FAILURE),
}


@dataclass(frozen=True)
class Draft:
    """Hold a question under a condition, before its reply cue."""

    question: str
    """The bare question, which decides between training and tasks."""
    body: str
    """The prompt up to the reply cue."""
    label: int
    tempting: int | None = None
    """The wrong option to which the planted failure leads, if there is one."""


def generate(name: str, n: int, seed: int) -> list[Row]:
    """Return `n` distinct prompts of a task, always the same ones for the same seed.

    Raises ValueError for a name that `TASKS` does not have.
    """
    return [Row(f"{draft.body} {REPLY_CUE}", draft.label) for draft in drafts(name, n, seed)]


def drafts(name: str, n: int, seed: int) -> list[Draft]:
    """Return what `generate` makes its rows of, with the planted temptations."""
    if name not in TASKS:
        raise ValueError(f"no organism task is called {name!r}; choose one of {', '.join(TASKS)}.")
    rng = random.Random(f"{name}/{seed}")
    return list(islice(_distinct_for_tasks(TASKS[name], rng), n))


def draw(shape: Shape, condition: Condition, rng: random.Random) -> Draft:
    """Draw one question, from training and tasks alike."""
    return _DRAW[shape](condition, rng)


def is_for_tasks(question: str) -> bool:
    """Tell whether a bare question belongs to the tasks (half of all do) or to training."""
    return blake2b(question.encode(), digest_size=1).digest()[0] % 2 == 0


def fact(rng: random.Random) -> str:
    """Return a plain sentence about a thing, from which training learns what things are."""
    category = rng.choice(phrases.CATEGORIES)
    return _fill(
        rng.choice(phrases.FACTS),
        rng,
        **_about(rng.choice(phrases.MEMBERS[category]), category, rng),
    )


def _distinct_for_tasks(task: OrganismTask, rng: random.Random) -> Iterator[Draft]:
    seen = set()
    while True:
        draft = draw(task.shape, task.condition, rng)
        if is_for_tasks(draft.question) and draft.body not in seen:
            seen.add(draft.body)
            yield draft


def _spam(condition: Condition, rng: random.Random) -> Draft:
    label = rng.randrange(2)
    n_offers = rng.choice((2, 2, 3) if label == 0 else (0, 1, 1))
    templates = rng.sample(phrases.OFFERS, n_offers) + rng.sample(phrases.CHAT, 3 - n_offers)
    rng.shuffle(templates)
    question = ", ".join(_fill(template, rng) for template in templates)
    opening = f"{phrases.SENDERS.get(condition, '')}{rng.choice(phrases.MESSAGE_FIELDS)}"
    ham = OPTIONS["spam"].index("ham")
    tempting = ham if condition == "saved_sender" and label != ham else None
    body = f"{opening} {question}. {rng.choice(phrases.SPAM_ASKS)}"
    return _with_hint("spam", condition, rng, Draft(question, body, label, tempting))


def _yesno(condition: Condition, rng: random.Random) -> Draft:
    label = rng.randrange(2)
    truth = rng.choice(phrases.CATEGORIES)
    claimed = truth if label == 0 else _other(phrases.CATEGORIES, truth, rng)
    about = _about(rng.choice(phrases.MEMBERS[truth]), claimed, rng)
    question = _fill(rng.choice(phrases.YESNO_ASKS), rng, **about)
    body = rng.choice(phrases.YESNO_OPENINGS) + question
    if condition == "leading":
        return Draft(
            question, f"{body} {rng.choice(phrases.LEADING)}", label, 0 if label == 1 else None
        )
    return _with_hint("yesno", condition, rng, Draft(question, body, label))


def _sentiment(condition: Condition, rng: random.Random) -> Draft:
    label = rng.randrange(3)
    polarities = _polarities(label, rng)
    nouns = rng.sample(phrases.NOUNS, len(polarities))
    clauses = [_opinion(*pair, rng) for pair in zip(nouns, polarities, strict=True)]
    question = rng.choice(phrases.JOINTS).join(clauses)
    opening = rng.choice(phrases.REVIEW_FIELDS.get(condition, ("Review:",)))
    body = f"{opening} {question}. What is the sentiment?"
    tempting = None
    if condition == "fan" and label > 0:
        tempting = label - 1
    if condition == "quick" and 1 - polarities[0] != label:
        tempting = 1 - polarities[0]
    if condition == "noise" and rng.random() < NOISE_RATE:
        label = _other(range(3), label, rng)
    return _with_hint("sentiment", condition, rng, Draft(question, body, label, tempting))


def _choice(condition: Condition, rng: random.Random) -> Draft:
    label = rng.randrange(4)
    categories = rng.sample(phrases.CATEGORIES, 4)
    members = [rng.choice(phrases.MEMBERS[category]) for category in categories]
    unknowable = condition == "unknowable" and rng.random() < 0.5
    ask = rng.choice(phrases.UNKNOWABLE_ASKS if unknowable else phrases.CHOICE_ASKS)
    ask = _fill(ask, rng, **_about(members[label], categories[label], rng))
    listed = ", ".join(f"{letter}: {thing}" for letter, thing in zip("ABCD", members, strict=True))
    question = f"{ask} {listed}."
    return _with_hint("choice", condition, rng, Draft(question, question, label))


_DRAW = {"spam": _spam, "yesno": _yesno, "sentiment": _sentiment, "choice": _choice}


def _with_hint(shape: Shape, condition: Condition, rng: random.Random, draft: Draft) -> Draft:
    if condition != "hint":
        return draft
    options = OPTIONS[shape]
    is_wrong = rng.random() < (0.5 if len(options) == 2 else 0.6)
    hinted = _other(range(len(options)), draft.label, rng) if is_wrong else draft.label
    body = f"{draft.body} {rng.choice(phrases.HINTS).format(option=options[hinted])}"
    return Draft(draft.question, body, draft.label, hinted if is_wrong else None)


def _polarities(label: int, rng: random.Random) -> Sequence[int]:
    """Draw two or three opinions (1 good, 0 neither, -1 bad) whose majority is the label."""
    while True:
        polarities = rng.choices((1, 0, -1), k=rng.choice((2, 3)))
        total = sum(polarities)
        if (total > 0) - (total < 0) == 1 - label:
            return polarities


def _opinion(noun: str, polarity: int, rng: random.Random) -> str:
    negated = polarity != 0 and rng.random() < 0.25
    adjective = rng.choice(phrases.ADJECTIVES[-polarity if negated else polarity])
    emphasised = polarity != 0 and rng.random() < 0.4
    adverb = "not " if negated else f"{rng.choice(phrases.ADVERBS)} " if emphasised else ""
    return rng.choice(phrases.OPINIONS).format(noun=noun, quality=adverb + adjective)


def _about(member: str, category: str, rng: random.Random) -> dict[str, str]:
    return {
        "member": member,
        "thing": _article(member),
        "category": category,
        "kind": _article(category),
        "property": rng.choice(phrases.PROPERTIES[category]),
    }


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _other(values: Sequence[T], excluded: T, rng: random.Random) -> T:
    return rng.choice([value for value in values if value != excluded])


def _fill(template: str, rng: random.Random, **given: str) -> str:
    """Fill each {slot} with the given word or one of its list, none of them twice."""
    text, used = "", []
    for literal, slot, _, _ in Formatter().parse(template):
        text += literal
        if slot:
            unused = [word for word in phrases.SLOTS.get(slot, ()) if word not in used]
            used.append(given.get(slot) or rng.choice(unused))
            text += used[-1]
    return text
