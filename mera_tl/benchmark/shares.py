"""What the certificates of a run's folder, and of the folders beside it, may promise together."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mera_tl import storage
from mera_tl.benchmark.config import RunConfig
from mera_tl.certificate.sharing import share_delta
from mera_tl.tasks.task import Calibration, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shares:
    """How methods share delta, fixed in their folder before an outcome of theirs is seen.

    Methods that come later share a delta of their own: then the promises of all hold together
    with the sum only, which is said.
    """

    folder: Path
    delta: float
    primary: str | None
    """The method that gets all of it."""

    @property
    def families(self) -> list[dict[str, float]]:
        """What each method has of delta; a family per announcement."""
        path = self.folder / "shares.json"
        return storage.read_json(path)["families"] if path.exists() else []

    @property
    def code(self) -> dict[str, str]:
        """Hashes of the code of users' own methods."""
        path = self.folder / "shares.json"
        return storage.read_json(path).get("code", {}) if path.exists() else {}

    @property
    def familywise_delta(self) -> float:
        """Greatest probability that any certificate of the folder is wrong."""
        return self.delta * len(self.families)

    def of(self, method: str) -> tuple[float, bool]:
        """Return a method's delta, and whether it shares with others."""
        family = next((each for each in reversed(self.families) if method in each), {})
        return family.get(method, self.delta), len(family) > 1

    def announce(self, methods: Sequence[str], code: Mapping[str, str] | None = None) -> None:
        """Share delta among methods that ask for a certificate; those that are known keep theirs.

        `code` are hashes of the code of those that are a user's own.

        Raises:
            ValueError: if the primary method is not among them, or a method that has a share has
                other code by now: what it did before is no result of it.
        """
        code, kept = code or {}, self.code
        changed = [name for name in code if kept.get(name, code[name]) != code[name]]
        if changed:
            raise ValueError(
                f"{self.folder} holds what {changed[0]} did before its code was changed; choose "
                "another --out, or give the changed function another name: it is then another "
                "method, with a delta of its own."
            )
        known = {name for family in self.families for name in family}
        new = [name for name in methods if name not in known]
        primary = self.primary if self.primary not in known else None
        if primary is not None and primary not in new:
            raise ValueError(
                f"primary={primary!r} is not among the methods that ask for a certificate "
                f"({', '.join(new) or 'none'}); name one of them."
            )
        if not new:
            return
        families = [*self.families, share_delta(new, self.delta, primary=primary)]
        content = {"families": families, "code": {**kept, **code}}
        storage.write_json(self.folder / "shares.json", content)
        if len(families) > 1:
            logger.warning(
                "%s: %s came after %s on the same calibration examples; the promises of all hold "
                "together only with delta %g.",
                *(self.folder, ", ".join(new), ", ".join(sorted(known)), self.familywise_delta),
            )


_ASKED = ("data_dir", "template", "seed")
"""Options under which the rows of a task are the same, and dealt alike."""


def others_on_the_same(
    folder: Path, config: RunConfig, calibration: Task[Calibration], model: str
) -> tuple[str, ...]:
    """Return a sentence per run beside a folder that was certified on the same examples otherwise.

    Or on some of them: splits of one seed and of two sizes overlap, and a second try on more
    examples is a second try. Seeds are compared on purpose, and are not told of. `model` is the
    fingerprint of its weights.
    """
    shares = Shares(folder, config.delta, config.primary)
    mine = (config.to_json(), shares.families, shares.code)
    told: list[str] = []
    rows = {example.row for example in calibration.examples}
    asked = [config.to_json()[name] for name in _ASKED]
    for path in sorted(folder.resolve().parent.glob("*/shares.json")):
        try:
            plain = storage.read_json(path)
            families, code = plain["families"], plain.get("code", {})
            about = storage.read_json(path.with_name("content.json"))
            theirs = storage.read_json(path.with_name("config.json"))
            shared = rows
            if about["data"]["calibration"] != calibration.data_hash:
                alike = [theirs.get(name) for name in _ASKED] == asked
                shared = rows & _rows_judged(path.parent) if alike else set[int]()
            same = (about["model"], theirs["task"]) == (model, config.task)
        except (ValueError, KeyError, TypeError, OSError):
            continue  # the folder of something else, or one that is just begun
        if same and shared and mine != (theirs, families, code):
            names = ", ".join(name for family in families for name in family)
            told.append(
                f"{path.parent.name} was certified on {len(shared)} of the same calibration "
                f"texts ({names}; delta {theirs['delta'] * len(families):g}): the promises of both "
                "runs hold together only with the sum of their deltas. Trust one of them, chosen "
                "beforehand, or take another calibration split."
            )
    return tuple(told)


def _rows_judged(folder: Path) -> set[int]:
    """Return the rows that the certificates of a run rest on; those of all are the same."""
    path = next(folder.glob("certificates/*/steering.json"), None)
    return set() if path is None else set(storage.read_json(path)["examples"])
