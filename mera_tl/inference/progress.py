"""Progress bars, only where a person is watching: a terminal or a notebook."""

import sys


def is_watched() -> bool:
    """Return whether a bar would be seen; a notebook's kernel is no terminal, but has a reader."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
