"""One verdict per run: steer, flip, classify, withhold, or leave alone.

The rule, which looks at calibration examples and never at test ones:

1. Of the methods whose certificate says that they gain, keep those whose observed gain is within
   half a point of the best one's.
2. Of these take the one that turned fewest right answers wrong; then the cheapest (flip, classify,
   steer in one pass, steer in two); then the one with the greater gain.
3. If none is certified, withhold where that is certified; else leave the model alone.

Choosing is paid for: the certificates of a run share its delta, so all hold at once, whichever is
chosen. Test outcomes are there to check the verdict, and play no part in it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mera_tl import storage
from mera_tl.certificate.certificate import Calibration, promised_points
from mera_tl.certificate.evidence import Evidence

What = Literal["steer", "flip", "classify", "withhold", "leave alone"]
CLOSE = 0.005
"""Observed gains that differ by no more are not told apart."""
KINDS: Mapping[str, What] = {"flip": "flip", "class_probe": "classify", "withhold": "withhold"}
"""What a method comes to; any other that has a certificate steers."""
ORDER: tuple[What, ...] = ("flip", "classify", "steer", "withhold", "leave alone")
"""From the cheapest that corrects to what corrects nothing."""


@dataclass(frozen=True)
class Way:
    """One thing that could be done, with its evidence on calibration examples."""

    what: What
    method: str
    certified: bool
    certificate: str
    """The certificate's first line."""
    gain: float | None = None
    """Observed mean gain on calibration examples."""
    at_least: float | None = None
    """What is promised of it, where it is certified."""
    recoveries: int | None = None
    """Wrong answers that became right on calibration examples."""
    regressions: int | None = None
    """Right answers that became wrong there: the harm."""
    n: int | None = None
    """Number of calibration examples."""
    passes: int = 1
    """Passes of the model per answer; of two, the second often repeats one token only."""
    needs: tuple[str, ...] = ()
    """What it takes, to find it and to use it."""
    baseline: str = ""
    """What is doubtful about the unsteered answers: a gain may only put these right."""


@dataclass(frozen=True)
class Recommendation:
    """What to do with a model on a task, and what else was considered."""

    what: What
    method: str | None
    sentence: str
    confidence: float
    """With which all certificates of the run hold at once."""
    ways: tuple[Way, ...] = field(repr=False)
    """The best of each kind: the chosen one first."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return self.sentence


def recommend(folder: str | Path) -> Recommendation:
    """Say what a run comes to, by the rule above; reads its folder and loads no model.

    Raises:
        ValueError: if the folder holds no run, or a certificate is damaged.
    """
    folder = Path(folder)
    records = {record["method"]: record for record in read_run(folder)}
    ways = [_way(folder, record) for record in records.values() if record["certificate"]]
    chosen = choose_way(ways)
    best = {what: choose_way(ways, what) for what in ("flip", "classify", "steer", "withhold")}
    others = [way for way in best.values() if way is not None and way != chosen]
    risk = max((r.get("familywise_delta") or 0.0 for r in records.values()), default=0.0)
    if chosen is None:
        said = "LEAVE ALONE. " + _why_not(others)
        way = Way("leave alone", "no_steering", certified=True, certificate="")
        return Recommendation("leave alone", None, said, 1 - risk, (way, *others))
    told = chosen.what, chosen.method, _sentence(chosen), 1 - risk, (chosen, *others)
    return Recommendation(*told)


def read_run(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run.

    Raises:
        ValueError: if the folder holds none, naming the runs in it if there are any.
    """
    runs = sorted(str(path.parent) for path in folder.glob("*/records.jsonl"))
    # A grid keeps the records of all its runs, and of those that failed, beside their folders.
    is_grid = runs and not (folder / "config.json").exists()
    records = storage.read_records(folder / "records.jsonl")
    if records and not is_grid:
        return records
    wanted = f"one of the runs in it: {', '.join(runs)}" if runs else "the folder of a `mera run`"
    what = "is a grid of several runs" if records else "holds no records.jsonl"
    raise ValueError(f"{folder} {what}; pass {wanted}.")


def decided(method: str, decision: str | None) -> str:
    """Return a record's decision as people read it: flip and class_probe steer nothing."""
    return KINDS.get(method, "steer").upper() if decision == "STEER" else decision or ""


def choose_way(ways: list[Way], what: str | None = None) -> Way | None:
    """Return the way that the rule takes; of one kind, also where nothing of it is certified."""
    some = [way for way in ways if way.what == what or (what is None and way.certified)]
    certified = [way for way in some if way.certified]
    correcting = [way for way in certified or some if way.gain is not None]
    if not correcting:
        return some[0] if some else None
    best = max(way.gain or 0.0 for way in correcting)
    close = [way for way in correcting if (way.gain or 0.0) >= best - CLOSE]

    def merit(way: Way) -> tuple[Any, ...]:
        return way.regressions or 0, ORDER.index(way.what), way.passes, -(way.gain or 0.0)

    return min(close, key=merit)


def _way(folder: Path, record: Mapping[str, Any]) -> Way:
    method, what = record["method"], KINDS.get(record["method"], "steer")
    first = record["certificate"].split("\n")[0]
    if what == "withhold":
        needs = ("labels to find the threshold", "someone for what is withheld")
        return Way(what, method, record["decision"] == "WITHHOLD", first, needs=needs)
    decision = Calibration.load(folder / "certificates" / method)
    row: Evidence = decision.best
    # In SAE space the steering is not at hand.
    steering = None if decision.chosen is None else decision.steerings.get(decision.chosen)
    per_answer = what == "steer" and steering is not None and steering.per_answer
    needs = ["labels to find it"]
    if what != "steer" or per_answer:
        needs.append("a list of options")
    if per_answer:
        needs.append("the unsteered answer first")
    return Way(
        what,
        method,
        not decision.abstained,
        first,
        gain=row.gain,
        at_least=None if decision.abstained else decision.promised,
        recoveries=row.recoveries,
        regressions=row.regressions,
        n=decision.n,
        passes=2 if per_answer else 1,
        needs=tuple(needs),
        baseline=decision.baseline,
    )


def _sentence(way: Way) -> str:
    if way.what == "withhold":
        why = "Nothing is certified to correct errors, but some answers can be trusted."
        return f"{way.certificate} {why}"
    words = {
        "steer": f"STEER by {way.method}",
        "flip": "FLIP: answer the second-best option where the predicted error is high",
        "classify": "CLASSIFY: answer by a classifier of the activations",
    }
    promise = 0.0 if way.at_least is None else way.at_least
    return (
        f"{words[way.what]}. Certified at least {promised_points(promise)} points; observed "
        f"{100 * (way.gain or 0):+.1f} on {way.n} calibration examples ({way.recoveries} better, "
        f"{way.regressions} worse).{way.baseline}"
    )


def _why_not(others: list[Way]) -> str:
    tried = [way for way in others if way.gain is not None]
    if not tried:
        return "No method with a certificate was run."
    best = max(tried, key=lambda way: way.gain or 0.0)
    return (
        f"Nothing is certified to gain; the best seen is {best.method} with "
        f"{100 * (best.gain or 0):+.1f} points on {best.n} calibration examples ({best.recoveries} "
        f"better, {best.regressions} worse)."
    )
