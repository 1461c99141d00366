"""The embedded organism: a tiny model with its tokenizer, SAEs and tasks, inside the package.

A model organism is small enough to know completely, with failures planted on purpose, so that one
sees steering correct what can be corrected and abstain where it cannot. `CARD.md` in `FOLDER` says
what was planted and what came of it.
"""

from pathlib import Path

from mera_tl.organism.prompts import TASKS, OrganismTask, Row, generate

FOLDER = Path(__file__).parent
"""Where the weights, the tokenizer, the SAEs and the card lie."""

__all__ = ["FOLDER", "TASKS", "OrganismTask", "Row", "generate"]
