"""Prompts as token ids: plain, or as the user's turn of a chat template.

A message is data, so what looks like a control token in it ("<|im_end|>") stays text; only the
template's own markers become control tokens. A plain prompt is taken as it is written, so that one
may write a template by hand: there "<|im_end|>" is a control token, in data too. The pre-flight of
a run counts such data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SAME_DAY = "{%- macro strftime_now(form) -%}26 Jul 2024{%- endmacro -%}"
"""The date in every prompt, where a template writes today's (Llama 3.2's "Today Date"): prompts of
tomorrow would not be those that were collected, or certified, today. It is that template's own
where the date is not known."""
_PLACEHOLDER = "MESSAGEPLACEHOLDER"
_N_AT_ONCE = 256
"""A tokenizer at work holds far more than ids, so it does not get all prompts at once."""


@dataclass(frozen=True)
class Turn:
    """The text that a chat template writes around one message of the user's."""

    before: str
    after: str
    strips: bool
    """Whether the template strips white space around the message."""

    @classmethod
    def of(cls, tokenizer: Any, system: str | None = None) -> "Turn":
        """Read the turn off a tokenizer's chat template.

        Raises:
            ValueError: if the template leaves out the message or the system prompt.
        """
        text = _render(tokenizer, _PLACEHOLDER, system)
        before, found, after = text.rpartition(_PLACEHOLDER)
        if not found or (system and system.strip() not in before):
            what = "system prompt" if found else "message"
            raise ValueError(f"The chat template leaves out the {what}; pass chat=False.")
        return cls(before, after, strips=_render(tokenizer, f" {_PLACEHOLDER} ", system) == text)

    def encode(
        self, tokenizer: Any, messages: Sequence[str], *, prefix: str = ""
    ) -> list[list[int]]:
        """Return the ids of each message in its turn, the assistant's turn begun with `prefix`."""
        after = self.after + prefix
        messages = [message.strip() if self.strips else message for message in messages]
        # In one piece where that is safe, so that the ids are those of `apply_chat_template`.
        ids = _encode(tokenizer, [self.before + message + after for message in messages])
        head, tail = _encode(tokenizer, [self.before, after])
        controls = control_tokens(tokenizer)
        own = sum(number in controls for number in (*head, *tail))
        for row, message in enumerate(messages):
            if sum(number in controls for number in ids[row]) > own:
                (text,) = _encode(tokenizer, [message], split_special_tokens=True)
                ids[row] = [*head, *text, *tail]
        return ids


def undated(tokenizer: Any) -> dict[str, str]:
    """Return what `apply_chat_template` takes so that prompts are the same on every day."""
    template = str(tokenizer.get_chat_template())
    return {"chat_template": _SAME_DAY + template} if "strftime_now" in template else {}


def _render(tokenizer: Any, message: str, system: str | None) -> str:
    turns = [{"role": "user", "content": message}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    try:
        told: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        return tokenizer.apply_chat_template(turns, **told, **undated(tokenizer))
    except Exception as error:  # templates raise what they like
        raise ValueError(f"The chat template does not take these turns: {error}") from None


def control_tokens(tokenizer: Any) -> set[int]:
    """Return the ids of a tokenizer's control tokens, that of unknown words aside."""
    # It names few of them by their use, but marks all.
    marked = tokenizer.added_tokens_decoder.items()
    return {number for number, token in marked if token.special} - {tokenizer.unk_token_id}


def encode_plain(tokenizer: Any, prompts: Sequence[str], *, prefix: str = "") -> list[list[int]]:
    """Return the ids of each prompt as it is written, control tokens that are typed in it included.

    The special tokens that the tokenizer asks for are put around it.
    """
    return _encode(tokenizer, [prompt + prefix for prompt in prompts], add_special_tokens=True)


def _encode(
    tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = False, **options: bool
) -> list[list[int]]:
    ids: list[list[int]] = []
    for start in range(0, len(texts), _N_AT_ONCE):
        some = list(texts[start : start + _N_AT_ONCE])
        ids += tokenizer(some, add_special_tokens=add_special_tokens, **options)["input_ids"]
    return ids
