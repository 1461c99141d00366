"""How good a reply is: named, pure functions from a reply and its reference to a number in [0, 1].

A scored task has no list of options: the model replies freely and a `Scorer` grades the reply. Most
of them answer 0 or 1, so that a gain is a change of correctness and the certificate is exact; a
function of the user's may be graded. The checkable instructions are of the kind that IFEval uses
(Zhou et al., 2023, arXiv:2311.07911); the normalisation of `exact_match` is that of SQuAD
(Rajpurkar et al., 2016, arXiv:1606.05250).
"""

import inspect
import json
import math
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from mera_tl import storage

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_NUMBER = re.compile(
    r"(?:(?<![\w.])[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+"
)
_MINUS = str.maketrans("\u2212", "-")
"""What is typeset as a minus sign is one."""
_FENCE = re.compile(r"```(?:json)?\s*\n?(.*?)\n?\s*```", re.DOTALL | re.IGNORECASE)
_ITEM = re.compile(r"(?m)^[ \t]*(\d+)[.)][ \t]+\S")
_SENTENCE_END = re.compile(r"(?<!\d)(?<!\b[A-Z])[.!?]+(?=[\s\"'”’)]|$)|(?<=\d)[.!?]+(?=\s|$)")


@dataclass(frozen=True)
class Scorer:
    """A scorer by name, with its arguments.

    Raises:
        ValueError: if there is none of that name, or an argument is unknown, missing or ill-typed.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in SCORERS:
            close = get_close_matches(self.name, SCORERS, n=3, cutoff=0.4)
            raise ValueError(
                f"There is no scorer {self.name!r}; nearest: "
                f"{', '.join(close) or ', '.join(SCORERS)}."
            )
        wanted = arguments_of(self.name)
        for name, value in self.arguments.items():
            if name not in wanted:
                known = ", ".join(wanted) or "none"
                raise ValueError(
                    f"The scorer {self.name!r} has no argument {name!r}; it takes {known}."
                )
            if not isinstance(value, wanted[name].annotation) or isinstance(value, bool):
                raise ValueError(
                    f"The scorer {self.name!r} has {name} = {value!r}; give a value of another "
                    "kind."
                )
        for name, each in wanted.items():
            if each.default is each.empty and name not in self.arguments:
                raise ValueError(f"The scorer {self.name!r} needs {name!r}; give it.")

    def __call__(self, reply: str, reference: str = "") -> float:
        """Return the score of a reply, checked.

        Raises:
            ValueError: if the scorer fails, or its value is no number from 0 to 1.
        """
        try:
            score = float(SCORERS[self.name](reply, reference, **self.arguments))
        except (Exception, SystemExit) as error:  # a function of the user's raises what it likes
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if not 0 <= score <= 1:  # NaN is neither
            kind = "NaN" if math.isnan(score) else f"{score:g}"
            raise ValueError(f"it returned {kind}, which is no number from 0 to 1")
        return score

    @property
    def own_code(self) -> tuple[str, ...]:
        """The user's Python files that it runs, also as one of several scorers."""
        if self.name == "function":
            return (str(self.arguments["file"]),)
        parts = (each for each in self.arguments.get("scorers", ()) if isinstance(each, Mapping))
        return tuple(file for part in parts for file in make_scorer(part).own_code)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for a hash or a file, with hashes of the code that it runs."""
        code = [storage.file_hash(Path(file)) for file in self.own_code]
        return {"name": self.name, **self.arguments} | ({"code": code} if code else {})


# --- what a reply says -------------------------------------------------------------------------


def _normalised(text: str) -> str:
    """Lower case, without punctuation, articles and the width of white space: SQuAD's.

    A text that is nothing else stays as it is: "+" is not the empty reply.
    """
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLE.sub(" ", plain).split()) or text.strip().lower()


def _answers(reference: str, text: str = "") -> list[str]:
    """Return the accepted answers of a reference, which a vertical bar keeps apart, or the text.

    Raises:
        ValueError: if there is neither: then every reply would be wrong, or every one right.
    """
    found = [text] if text.strip() else [part for part in reference.split("|") if part.strip()]
    if not found:
        raise ValueError("it has no reference, and no argument, to compare a reply with")
    return found


def exact_match(reply: str, reference: str) -> bool:
    """Whether the reply is the reference, or one of several ("a|b"), normalised as SQuAD does."""
    return any(_normalised(reply) == _normalised(each) for each in _answers(reference))


def _occurs(text: str, reply: str) -> bool:
    """Whether a text occurs, its words whole: no letter or digit goes on where one ends it."""
    before = r"(?<!\w)" if text[:1].isalnum() else ""
    after = r"(?!\w)" if text[-1:].isalnum() else ""
    return bool(re.search(rf"{before}{re.escape(text)}{after}", reply, re.IGNORECASE))


def contains(reply: str, reference: str, text: str = "") -> bool:
    """Whether the reference, or a given text, occurs as whole words; case does not count."""
    return any(_occurs(each, reply) for each in _answers(reference, text))


def lacks(reply: str, reference: str, text: str = "") -> bool:
    """Whether the reference, or a given text, does not occur; an empty reply lacks everything."""
    return not contains(reply, reference, text)


def regex(reply: str, reference: str, pattern: str = "") -> bool:
    """Whether a pattern, or else the reference, matches anywhere; the dot takes no line end."""
    if not (pattern or reference):
        raise ValueError("it has neither a pattern nor a reference")
    return re.search(pattern or reference, reply) is not None


def numeric(reply: str, reference: str, tolerance: int | float = 1e-6) -> bool:
    """Whether the last number of the reply is the reference's, within a relative tolerance.

    Of a reference of zero the tolerance is absolute.
    """
    said, wanted = last_number(reply), last_number(reference)
    if wanted is None:
        raise ValueError(f"the reference {reference!r} has no number")
    return said is not None and abs(said - wanted) <= tolerance * (abs(wanted) or 1.0)


def last_number(text: str) -> float | None:
    """Return the last number of a text, commas between thousands allowed, or None."""
    found = _NUMBER.findall(text.translate(_MINUS))
    return float(found[-1].replace(",", "")) if found else None


def begins_with(reply: str, reference: str, text: str = "") -> bool:
    """Whether the first words are the reference, or a given text; case and quotes do not count."""
    bare, start = reply.lstrip().casefold(), reply.lstrip(" \t\r\n\"'“‘*").casefold()
    return any(
        # What begins in a quote itself is looked for before quotes are taken off.
        each.startswith(whole := wanted.strip().casefold())
        and not (whole[-1:].isalnum() and each[len(whole) :][:1].isalnum())
        for wanted in _answers(reference, text)
        for each in (bare, start)
    )


def ends_with(reply: str, reference: str, text: str = "") -> bool:
    """Whether the reply ends in the reference or a given text; case and a last quote do not count.

    Of both, the punctuation at the very end does not count either, unless the text is nothing else.
    """
    return any(_ends(reply, each.casefold()) for each in _answers(reference, text))


def _ends(reply: str, text: str) -> bool:
    words = text.rstrip(" .!")
    if not words:
        return reply.rstrip(" \t\r\n\"'”’*").endswith(text.strip())
    end = reply.rstrip(" \t\r\n\"'”’*.!").casefold()
    goes_on = end[: -len(words)][-1:].isalnum() and words[:1].isalnum()  # 18 does not end in 8
    return end.endswith(words) and not goes_on


def json_schema(reply: str, reference: str, schema: Mapping | str = "") -> bool:
    """Whether the whole reply is JSON that a schema accepts, in a code fence or bare.

    Without a schema any object or list will do. A reference that is JSON itself must be equal in
    all the keys that it has.
    """
    fenced = _FENCE.fullmatch(reply.strip())
    try:
        value = json.loads(fenced[1] if fenced else reply.strip(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict | list) and not schema:
        return False
    if schema and not _validator(
        schema if isinstance(schema, str) else json.dumps(schema)
    ).is_valid(value):
        return False
    wanted = json.loads(reference) if reference.strip().startswith("{") else {}
    said = value if isinstance(value, dict) else {}
    return all(k in said and _same(said[k], v) for k, v in wanted.items())


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")  # Python reads NaN and Infinity, the standard does not


@cache
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator

    plain = json.loads(schema)
    Draft202012Validator.check_schema(plain)
    return Draft202012Validator(plain)


def _same(said: Any, wanted: Any) -> bool:
    if isinstance(said, str) and isinstance(wanted, str):
        return _normalised(said) == _normalised(wanted)
    return type(said) is type(wanted) and said == wanted


def words(reply: str, reference: str, most: int = 10, least: int = 1) -> bool:  # noqa: ARG001
    """Whether the reply has so many words: what white space keeps apart and a letter is in."""
    return least <= _n_words(reply) <= most


def one_word(reply: str, reference: str) -> bool:  # noqa: ARG001
    """Whether the reply is one word, with punctuation or without."""
    return _n_words(reply) == 1


def _n_words(text: str) -> int:
    return sum(any(c.isalnum() for c in word) for word in text.split())


def sentences(reply: str, reference: str, most: int = 1, least: int = 1) -> bool:  # noqa: ARG001
    """Whether the reply has so many sentences; one that is cut off counts, "3.5" ends none."""
    ends = list(_SENTENCE_END.finditer(reply))
    rest = reply[ends[-1].end() :] if ends else reply
    return least <= len(ends) + any(c.isalnum() for c in rest) <= most


def lower_case(reply: str, reference: str) -> bool:  # noqa: ARG001
    """Whether no letter is a capital, and there is a letter."""
    return reply == reply.lower() and any(c.isalpha() for c in reply)


def no_comma(reply: str, reference: str) -> bool:  # noqa: ARG001
    """Whether there is no comma, and a word."""
    return "," not in reply and _n_words(reply) > 0


def numbered_list(reply: str, reference: str, items: int = 3) -> bool:  # noqa: ARG001
    """Whether exactly so many lines begin with a number, which are 1., 2., ... in order."""
    numbers = [int(match[1]) for match in _ITEM.finditer(reply)]
    return numbers == list(range(1, items + 1))


def every(reply: str, reference: str, scorers: list) -> float:
    """Return the least of several scorers' values: all of them must be content."""
    return min(make_scorer(each)(reply, reference) for each in scorers)


def function(reply: str, reference: str, file: str, call: str) -> float:
    """Ask a function of the user's, `reply, reference -> float`, in a Python file."""
    return float(_loaded(file, call, storage.file_hash(Path(file)))(reply, reference))


@cache
def _loaded(file: str, name: str, code: str) -> Callable[..., Any]:  # noqa: ARG001  the file's hash
    found: Any = storage.run_python(file).get(name)
    if not callable(found):
        raise ValueError(f"{file} defines no function {name!r}")
    return found


# --- the table -----------------------------------------------------------------------------------

SCORERS: dict[str, Callable[..., float]] = {
    each.__name__: each
    for each in (
        exact_match,
        contains,
        lacks,
        regex,
        numeric,
        begins_with,
        ends_with,
        json_schema,
        words,
        one_word,
        sentences,
        lower_case,
        no_comma,
        numbered_list,
        every,
        function,
    )
}


@cache
def arguments_of(name: str) -> Mapping[str, inspect.Parameter]:
    """Return the arguments that a scorer takes: those of its function after reply and reference."""
    return dict(list(inspect.signature(SCORERS[name]).parameters.items())[2:])


def make_scorer(keys: Mapping[str, Any]) -> Scorer:
    """Make a scorer of plain values: its `name` and, beside it, its arguments.

    Raises:
        ValueError: as `Scorer`.
    """
    arguments = {key: value for key, value in keys.items() if key != "name"}
    return Scorer(str(keys.get("name", "")), arguments)
