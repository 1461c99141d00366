"""What a decoded reply says: the option that it begins with, or nothing.

Strict on purpose. "The message is not spam but rather a ham", "positive, neutral, and ..." and
"spam? no, ham" contain an option and answer nothing, or its opposite. What is not plainly an answer
counts as none, which is seen and counted, where a wrong reading would not be.
"""

import re
from collections.abc import Sequence

_JOIN = r"(?:or|and|but|no|nor|vs|versus|wait|sorry|actually|also|then|oder|und|ou|et|o|y)"
_DENIAL = (
    r"[\W_]*(?:(?:it|that|this|which|is|was|are|seems|would|be)\b\W*)*"
    r"(?:not|never|wrong|incorrect|false|unlikely|isn['’]t|wasn['’]t|wouldn['’]t)\b"
)
_NEGATIVE = r"(?:no|not|never|false)\b"
_NOT = (
    r"(?:\bnot|n['’]t|\brather than|\binstead of|\bnever|\bunlike)\s+(?:an?\s+|the\s+|be\s+)?\W*$"
)
_OVER = re.compile(rf"\w[^.!?\n]*[.!?\n][\W_]*(?:{_JOIN}\W+)*(?!{_JOIN}\b)\w+\W+\w", re.IGNORECASE)
_LEAD = re.compile(r"[\W_]*")


def has_begun(reply: str, options: Sequence[str]) -> bool:
    """Return whether a reply has come to its first letter or digit, or to an option without any."""
    symbols = [option for option in options if not _LEAD.sub("", option)]
    return bool(_LEAD.sub("", reply, count=1)) or any(_begin(reply, o) for o in symbols)


def is_over(reply: str) -> bool:
    """Return whether a reply is past its first sentence, so that no more can change its answer."""
    return bool(_OVER.search(reply))


def is_no_answer(reply: str, options: Sequence[str]) -> bool:
    """Return whether a reply begins so that none of the options can follow; False is no promise."""
    # A character of which not all bytes are there yet may still become any.
    begun = _folded(_LEAD.sub("", reply, count=1).rstrip("\ufffd"))

    def may_follow(option: str) -> bool:
        if not _LEAD.sub("", option):  # symbols stand before the first word, or nowhere
            return bool(_begin(reply, option))
        whole = _folded(option)
        return not option[0].isalnum() or whole.startswith(begun) or begun.startswith(whole)

    return bool(begun) and not any(map(may_follow, options))


def _folded(text: str) -> str:
    return re.sub(r"\s+", " ", text.casefold())


def answered_option(reply: str, options: Sequence[str]) -> int:
    """Return the option that a reply answers, or -1.

    It must begin with the option as a whole word, in any case unless it is one character, after
    white space, quotes, brackets and markup at most. It answers nothing if a question mark follows,
    if the option is denied ("ham is wrong"), or if another option stands in the same sentence, or
    next after it ("ham or spam", "- ham\\n- spam"), unless that one is denied ("ham, not spam"). An
    "A" or "I" before another word than "is" or "because" is a word of English.
    """
    starts = {place: match for place, o in enumerate(options) if (match := _begin(reply, o))}
    if not starts:
        return -1
    # Of options of which one begins with another, the longest was said.
    answer = max(starts, key=lambda place: starts[place].end())
    rest = reply[starts[answer].end() :]
    sentence = re.split(r"[.!?\n](?=\W|$)", rest, maxsplit=1)[0]
    others = "|".join(_word(o) for place, o in enumerate(options) if place != answer)
    asked = re.match(r"[^\w\s.,;:!]*\s*\?", rest)
    listed = re.match(rf"[\W_]*(?:(?i:{_JOIN})\b[\W_]*)*(?:{others})", rest)
    named = any(
        not re.search(_NOT, sentence[: other.start()], re.IGNORECASE)
        for other in re.finditer(others, sentence)
    )
    denies = rf"(?i:{_DENIAL})(?!\s+(?:an?\s+|the\s+)?[^\w\s]*(?:{others}))"
    denied = re.match(denies, sentence) and not re.match(_NEGATIVE, options[answer], re.IGNORECASE)
    return -1 if asked or listed or named or denied else answer


def _begin(reply: str, option: str) -> re.Match[str] | None:
    sign = r"(?<![-+.])" if option[0].isdigit() else ""
    return re.match(rf"[\W_]*?{sign}{_word(option)}", reply)


def _word(option: str) -> str:
    """Return a pattern of the option as a whole word; a hyphen or an apostrophe continues one."""
    text = r"\s+".join(map(re.escape, option.split())) or re.escape(option)
    case = "" if len(option) == 1 else "i"
    before = r"(?<![^\W_])" if option[0].isalnum() else ""
    after = r"(?!_*[^\W_]|['’-]\w|[.,]\d)" if option[-1].isalnum() else ""
    if option in ("A", "I"):
        after += r"(?![ \t]+(?!(?:is|because|since|as)\b)\w)"
    return f"(?{case}:{before}{text}{after})"
