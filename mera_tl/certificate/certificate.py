"""What a calibration promises: the terms, the evidence, and the decision in words.

A `Calibration` is a value. It prints one sentence with its confidence and its scope, saves itself
with a hash of its content, and may be asked again at another `min_gain`, since its lower bounds
hold for all of them at once. Nothing else may be chosen after outcomes are seen: `Protocol` holds
all the rest. Imports neither torch nor pandas.
"""

import html
import math
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from mera_tl import storage
from mera_tl.certificate.bounds import PValue, hoeffding_curve, mcnemar, unconditional
from mera_tl.certificate.sample_sizes import Effect, continuous_sample_size, sample_size
from mera_tl.certificate.terms import Protocol

_TESTS = {
    "unconditional": "exact unconditional paired test",
    "mcnemar": "exact McNemar test",
    "betting": "betting bound",
    "hoeffding": "Hoeffding's bound",
}


class Decision(StrEnum):
    """Whether to steer; a value, not an error."""

    STEER = "STEER"
    ABSTAIN = "ABSTAIN"

    @property
    def advice(self) -> str:
        """Say what to do."""
        if self is Decision.STEER:
            return "Steer at the certified threshold, and audit a share of the traffic."
        return "Steer nothing; collect more examples, ask for less gain, or steer otherwise."


@dataclass(frozen=True)
class Evidence:
    """What the calibration examples say about one threshold."""

    threshold: float
    recoveries: int
    """Examples that steering improved; for `correct`, from incorrect to correct."""
    regressions: int
    """Examples that steering made worse."""
    gain: float
    """Mean gain."""
    spread: float
    """Standard deviation of the gains."""
    lower: float
    """Lower confidence bound of the mean gain, holding for all thresholds at once."""
    p: float | None
    """P-value of a mean gain of at most `min_gain`, in the order that serves `level`; None where
    it can no longer be computed."""
    level: float
    """Probability of error this threshold may spend: delta times its share."""


@dataclass(frozen=True)
class Calibration:
    """A decision to steer at a threshold or to abstain, with all that it rests on."""

    decision: Decision
    threshold: float | None
    """The paper's alpha to steer at; None when abstaining."""
    min_gain: float
    """The gain asked for (the paper's epsilon)."""
    evidence: tuple[Evidence, ...]
    n: int
    """Number of calibration examples."""
    protocol: Protocol
    delta: float
    """What this certificate spends of `protocol.delta`."""
    spent: float
    """What was spent up to and including this look, over all groups."""
    data_hash: str
    """Hash of the gains and the examples they belong to."""
    examples: tuple[int | str, ...] = ()
    """Identities of the examples, to recognise them at a second look."""
    look: int = 1
    group: str | None = None
    n_groups: int = 1
    """Groups certified together, sharing delta."""
    base: float | None = None
    """Unsteered mean of the metric, where known."""

    @property
    def abstained(self) -> bool:
        """Whether nothing is steered."""
        return self.decision is Decision.ABSTAIN

    @property
    def n_thresholds(self) -> int:
        """Number of thresholds tried."""
        return len(self.evidence)

    @property
    def best(self) -> Evidence:
        """Return the evidence for the chosen threshold or, when abstaining, the highest bound."""
        if self.threshold is not None:
            return next(row for row in self.evidence if row.threshold == self.threshold)
        return max(self.evidence, key=lambda row: (row.lower, row.gain))

    @property
    def needed(self) -> int | None:
        """Return about how many examples certify with probability .8, if the best gain is real.

        None where the best gain does not exceed `min_gain`, or no practical number is enough.
        """
        best = max(self.evidence, key=lambda row: (row.gain, row.lower))
        if best.gain <= self.min_gain or best.level == 0:
            return None
        if self.protocol.test in ("unconditional", "mcnemar"):
            effect = Effect.of_pilot(best.recoveries, best.regressions, self.n)
            return sample_size(effect, min_gain=self.min_gain, level=best.level)
        return continuous_sample_size(
            best.gain - self.min_gain,
            best.spread,
            level=best.level,
            by_range=self.protocol.test == "hoeffding",
        )

    def at(self, *, min_gain: float) -> "Calibration":
        """Ask for another gain, at no cost: the bounds hold for every `min_gain` at once."""
        check_min_gain(min_gain)
        rows = tuple(replace(row, p=self._p_value(row, min_gain)) for row in self.evidence)
        return decide(replace(self, evidence=rows, min_gain=min_gain))

    def _p_value(self, row: Evidence, min_gain: float) -> float | None:
        if min_gain == self.min_gain or row.level == 0:
            return row.p
        curve: PValue
        match self.protocol.test:
            case "unconditional":
                curve = unconditional(row.recoveries, row.regressions, self.n, row.level)
            case "mcnemar":
                curve = mcnemar(row.recoveries, row.regressions, self.n, row.level)
            case "hoeffding":
                curve = hoeffding_curve(row.gain, self.n)
            case _:
                return None  # needs the gains in their order, which a certificate does not keep
        return curve(min_gain)

    def fwd_hooks(self, steering: Any) -> list[Any]:
        """Return the hooks of `steering` at the certified threshold; none when abstaining."""
        return [] if self.threshold is None else list(steering.at(self.threshold).fwd_hooks())

    def __str__(self) -> str:
        return _steer_sentence(self) if not self.abstained else _abstain_sentence(self)

    def _repr_html_(self) -> str:
        names = ("threshold", "recoveries", "regressions", "gain", "lower", "p")
        head = "".join(f"<th>{name}</th>" for name in names)
        rows = []
        for row in self.evidence:
            values = (getattr(row, name) for name in names)
            cells = "".join(f"<td>{'-' if v is None else f'{v:.4g}'}</td>" for v in values)
            mark = " style='font-weight:bold'" if row.threshold == self.threshold else ""
            rows.append(f"<tr{mark}>{cells}</tr>")
        return f"<p>{html.escape(str(self))}</p><table><tr>{head}</tr>{''.join(rows)}</table>"

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with a hash over all of them."""
        content = asdict(self)
        return {"calibration": content, "hash": storage.fingerprint(content)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Calibration":
        """Rebuild a calibration from `to_json`.

        Raises:
            ValueError: if anything was changed since.
        """
        content = dict(value.get("calibration", {}))
        if not content or storage.fingerprint(content) != value.get("hash"):
            raise ValueError(
                "This certificate was changed after it was issued, or is none: its content does "
                "not match its hash; calibrate again."
            )
        content["protocol"] = Protocol.from_json(content["protocol"])
        content["decision"] = Decision(content["decision"])
        content["evidence"] = tuple(Evidence(**row) for row in content["evidence"])
        content["examples"] = tuple(content["examples"])
        return cls(**content)

    def save(self, path: str | Path) -> None:
        """Write the certificate as JSON, whole or not at all.

        Raises:
            ValueError: if `path` holds another certificate on some of the same examples, which
                this one does not account for: that is a second look with the whole delta.
        """
        if Path(path).exists():
            earlier = Calibration.load(path)
            shared = set(earlier.examples) & set(self.examples)
            again = earlier.data_hash == self.data_hash and earlier.protocol == self.protocol
            if shared and not again and self.look <= earlier.look:
                raise ValueError(
                    f"{path} holds a certificate on {len(shared)} of the same examples, so this is "
                    "a second look with the whole delta; pass after=Calibration.load(...), or "
                    "save elsewhere and trust only one of the two, chosen beforehand."
                )
        storage.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read a certificate and verify its hash."""
        return cls.from_json(storage.read_json(path))


def check_min_gain(min_gain: float) -> None:
    """Refuse a gain that no mean of gains in [-1, 1] can exceed or fall short of."""
    if not -1 < min_gain < 1:
        raise ValueError(
            f"`min_gain={min_gain!r}` is not a gain between -1 and 1; pass a share of examples, "
            "as 0.02 for two points."
        )


def decide(calibration: Calibration) -> Calibration:
    """Choose, among the certified thresholds, the best observed gain; ties go to the mildest.

    Free of charge: the bounds hold for all thresholds at once. Mildest is what changed the fewest
    examples, then the highest threshold.
    """
    certified = [
        row for row in calibration.evidence if row.level > 0 and row.lower >= calibration.min_gain
    ]
    if not certified:
        return replace(calibration, decision=Decision.ABSTAIN, threshold=None)
    best = max(certified, key=lambda r: (r.gain, -(r.recoveries + r.regressions), r.threshold))
    return replace(calibration, decision=Decision.STEER, threshold=best.threshold)


def _points(gain: float) -> str:
    return f"{100 * gain:.1f} points"


def _at_least(gain: float) -> str:
    # Rounded down: a promise must not grow by rounding.
    return _points(math.floor(1000 * gain + 1e-9) / 1000)


def _scope(calibration: Calibration) -> str:
    group = calibration.group
    where = "" if group is None else f" in group {group!r} (one of {calibration.n_groups} at once)"
    return (
        f"with confidence {1 - calibration.protocol.delta:.4g} over the draw of the "
        f"{calibration.n} calibration examples{where}"
    )


def _terms(calibration: Calibration) -> str:
    look = f", look {calibration.look}" if calibration.look > 1 else ""
    return (
        f"({_TESTS[calibration.protocol.test]}, {calibration.n_thresholds} "
        f"{calibration.protocol.knob}s tried, "
        f"min_gain {calibration.min_gain:g}{look})"
    )


def _steer_sentence(calibration: Calibration) -> str:
    best = calibration.best
    raises = "raises accuracy" if calibration.protocol.metric == "correct" else "lowers the error"
    sign = 1 if calibration.protocol.metric == "correct" else -1
    base = calibration.base
    moved = "" if base is None else f", from {base:.3f} to {base + sign * best.gain:.3f}"
    others = "other groups" if calibration.group is not None else "any subgroup of them"
    return (
        f"STEER at {calibration.protocol.knob} {best.threshold:.4g}: {_scope(calibration)}, "
        f"steering {raises} by at least {_at_least(best.lower)} "
        f"on data drawn as these were (observed: "
        f"{_points(best.gain)}{moved}, {best.recoveries} better, {best.regressions} worse), which "
        f"says nothing of {others} nor of other prompts, models or data {_terms(calibration)}."
    )


def _abstain_sentence(calibration: Calibration) -> str:
    best, needed = calibration.best, calibration.needed
    most = max(calibration.evidence, key=lambda row: (row.gain, row.lower))
    observed = (
        f"the best gain observed is {_points(most.gain)} at {calibration.protocol.knob} "
        f"{most.threshold:.4g} "
        f"({most.recoveries} better, {most.regressions} worse)"
    )
    if most.gain <= calibration.min_gain:
        reason = f"{observed}, which more examples cannot certify unless chance hid a gain"
    else:
        enough = f"about {needed} examples" if needed else "more examples than is practical"
        reason = (
            f"{observed} and the best lower bound {_at_least(best.lower)}; were that gain real, "
            f"{enough} would certify it with probability 0.8"
        )
    return (
        f"ABSTAIN, steering nothing: {_scope(calibration)}, no {calibration.protocol.knob} is "
        f"certain to gain {_at_least(calibration.min_gain)} or more, since {reason} "
        f"{_terms(calibration)}."
    )
