"""What a person waits for: bars where one is watching, and times as people write them."""

import re
import sys


def is_watched() -> bool:
    """Return whether a bar would be seen; a notebook's kernel is no terminal, but has a reader."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def seconds_of(text: str) -> float:
    """Turn "90s", "10m" or "1.5h" into seconds.

    Raises:
        ValueError: if the text is no such time.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip(), re.ASCII)
    if not match or not float(match[1]):
        raise ValueError(f"{text!r} is no time above 0 with its unit; give one as 90s, 10m or 2h.")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
