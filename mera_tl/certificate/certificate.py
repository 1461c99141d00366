"""What a calibration promises: the terms, the evidence, and the decision in words.

A `Calibration` is a value. Its decision is no field but follows from its evidence, also when it is
read from a file, where the evidence itself is derived again from the counts. It may be asked again
at another `min_gain`, since its lower bounds hold for all of them at once; nothing else may be
chosen after outcomes are seen. Imports neither torch nor pandas.
"""

import html
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mera_tl.certificate.evidence import Evidence
from mera_tl.certificate.sample_sizes import Effect, continuous_sample_size, sample_size
from mera_tl.certificate.terms import Terms

if TYPE_CHECKING:
    import pandas as pd

    from mera_tl.steering.spaces import Space
    from mera_tl.steering.steering import Steering

_TESTS = {
    "unconditional": "exact unconditional paired test",
    "mcnemar": "exact McNemar test",
    "betting": "betting bound",
    "hoeffding": "Hoeffding's bound",
}
_IDENTITY = {
    "n_layers": "number of layers",
    "d_model": "width",
    "model_fingerprint": "weights",
    "dtype": "dtype",
    "chat": "chat template in use:",
    "tokenizer": "tokenizer or chat template",
    "system": "system prompt",
    "eos_ids": "tokens that end a reply",
}
"""What must not differ, in the words of an error."""


class Decision(StrEnum):
    """Whether to steer; a value, not an error."""

    STEER = "STEER"
    ABSTAIN = "ABSTAIN"


@dataclass(frozen=True)
class Calibration:
    """A decision to steer or to abstain, with all that it rests on; holds what was certified."""

    evidence: tuple[Evidence, ...]
    """One row per candidate, in the order in which they were given."""
    n: int
    """Number of calibration examples, each of its own text."""
    terms: Terms
    min_gain: float
    """The gain asked for (the paper's epsilon)."""
    data_hash: str
    """Hash of the gains and the examples they belong to."""
    examples: tuple[int | str, ...] = field(default=(), repr=False)
    """Identities of the examples."""
    base: float | None = None
    """Unsteered mean of the metric, where known."""
    unused: int = 0
    """Examples left out since their text is that of another one."""
    setup: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What the promise is about: model, tokenizer, readout, data and code versions, by hash."""
    steerings: Mapping[int, "Steering"] = field(default_factory=dict, repr=False, compare=False)
    """Candidates by number: all of them, or after loading the certified one."""

    @property
    def chosen(self) -> int | None:
        """Number of the certified candidate with the best observed gain; None when abstaining.

        Choosing is free of charge: the bounds hold for all candidates at once. Ties go to the
        mildest: fewest examples changed, then the highest threshold, then the least strength.
        """
        certified = [i for i, row in enumerate(self.evidence) if self.certifies(row)]

        def merit(i: int) -> tuple[float, ...]:
            row = self.evidence[i]
            changed = row.recoveries + row.regressions
            return row.gain, -float(changed), row.threshold or 0.0, -(row.strength or 0.0)

        return max(certified, key=merit, default=None)

    def certifies(self, row: Evidence) -> bool:
        """Return whether the terms are met by what the examples say about a candidate."""
        harmless = row.regressed_at_most is None or row.regressed_at_most <= (
            self.terms.max_regressions or 0.0
        )
        return row.level > 0 and row.lower >= self.min_gain and harmless

    @property
    def decision(self) -> Decision:
        """Whether to steer."""
        return Decision.ABSTAIN if self.chosen is None else Decision.STEER

    @property
    def abstained(self) -> bool:
        """Whether nothing is steered."""
        return self.chosen is None

    @property
    def best(self) -> Evidence:
        """Return the evidence for the chosen candidate or, when abstaining, the highest gain."""
        if self.chosen is not None:
            return self.evidence[self.chosen]
        return max(self.evidence, key=lambda row: (row.gain, row.lower))

    @property
    def baseline(self) -> str:
        """What is doubtful about the unsteered answers, as a sentence that follows another."""
        doubts = " ".join(self.setup.get("warnings", ()))
        return f" Baseline: {doubts}" if doubts else ""

    @property
    def promised(self) -> float:
        """The gain that is promised where it steers: the lower bound, if the terms allow it."""
        return self.best.lower if self.terms.promises_bounds else self.min_gain

    @property
    def threshold(self) -> float | None:
        """The certified threshold; None when abstaining, or for a rule without one."""
        return None if self.abstained else self.best.threshold

    @property
    def strength(self) -> float | None:
        """The certified strength; None when abstaining, or for a rule without one."""
        return None if self.abstained else self.best.strength

    @property
    def steering(self) -> "Steering | None":
        """The certified steering, with this certificate; None when abstaining.

        Raises:
            ValueError: if the decision is to steer but the steering is not at hand: the
                certificate was made from gains alone, or loaded without its SAEs.
        """
        if self.chosen is None:
            return None
        if self.chosen not in self.steerings:
            raise ValueError(
                f"This certificate does not hold the steering it certifies ({self.best.candidate}):"
                " it was made from gains alone, or loaded without its tensors; make it with "
                "calibrate(model, task, steering), or load its folder with its space."
            )
        return self.steerings[self.chosen].with_certificate(self)

    def fwd_hooks(self) -> list[Any]:
        """Return the hooks of the certified steering; none when abstaining.

        Raises:
            ValueError: as `steering`.
        """
        return [] if self.steering is None else list(self.steering.fwd_hooks())

    def check(self, model: Any) -> None:
        """Refuse a model, tokenizer, chat template or system prompt other than those certified for.

        A model of transformers, or a bare `HookedTransformer`, has the tokenizer that its user
        gives it: of such, weights, sizes and dtype are looked at.

        Raises:
            ValueError: naming what differs.
        """
        check_certified(
            self.setup, model, "load it with anyway=True (--anyway), without its certificate"
        )

    @property
    def needed(self) -> int | None:
        """Return about how many examples certify with probability .8, if the best gain is real.

        None where the best gain does not exceed `min_gain`, or no practical number is enough.
        """
        best = max(self.evidence, key=lambda row: (row.gain, row.lower))
        if best.gain <= self.min_gain or best.level == 0:
            return None
        if self.terms.test in ("unconditional", "mcnemar"):
            effect = Effect.of_pilot(best.recoveries, best.regressions, self.n)
            return sample_size(effect, min_gain=self.min_gain, level=best.level)
        return continuous_sample_size(
            best.gain - self.min_gain,
            best.spread,
            level=best.level,
            by_range=self.terms.test == "hoeffding",
        )

    def at(self, *, min_gain: float) -> "Calibration":
        """Ask for another gain, at no cost: the bounds hold for every `min_gain` at once.

        Raises:
            ValueError: if the terms limit regressions, or delta was handed over: then only what
                was fixed beforehand is promised.
        """
        check_min_gain(min_gain)
        if not self.terms.promises_bounds:
            raise ValueError(
                "This certificate promises the min_gain that was fixed beforehand and no other; "
                "to ask afterwards, calibrate without max_regressions and without stepping down."
            )
        return self._derived(self.terms, min_gain)

    def with_delta(self, delta: float) -> "Calibration":
        """Decide on the same evidence with the delta that `step_down` hands over."""
        return self._derived(replace(self.terms, delta=delta, step_down=True), self.min_gain)

    def _derived(self, terms: Terms, min_gain: float) -> "Calibration":
        levels = terms.levels(len(self.evidence))
        rows = tuple(
            row.again(level, terms, min_gain, self.n)
            for row, level in zip(self.evidence, levels, strict=True)
        )
        return replace(self, evidence=rows, terms=terms, min_gain=min_gain)

    def __str__(self) -> str:
        first = _abstain_sentence(self) if self.abstained else _steer_sentence(self)
        return f"{first}\n{_terms_sentence(self)}"

    def __repr__(self) -> str:
        s = "s" * (len(self.evidence) != 1)
        rows = f"{len(self.evidence)} candidate{s}, n={self.n}"
        if self.abstained:
            return f"Calibration(ABSTAIN, {rows})"
        return f"Calibration({_what(self.best)} at {self.best.candidate}, {rows})"

    def frame(self, method: str = "") -> "pd.DataFrame":
        """Return the evidence, one row per candidate, with the terms in every row, for figures."""
        import pandas as pd

        knobs = {key for row in self.evidence for key in row.steering}
        knob = "threshold" if "threshold" in knobs else "strength"
        counts = ("recoveries", "regressions", "gain", "lower", "p", "level")
        rows = [{name: getattr(row, name) for name in counts} for row in self.evidence]
        known = self.base is not None and self.terms.metric == "correct"
        return pd.DataFrame(rows).assign(
            threshold=[row.steering.get(knob, i) for i, row in enumerate(self.evidence)],
            chosen=[i == self.chosen for i in range(len(rows))],
            certified=[self.certifies(row) for row in self.evidence],
            method=method,
            knob=knob,
            n=self.n,
            min_gain=self.min_gain,
            confidence=1 - self.terms.delta,
            base=self.base if known else float("nan"),
        )

    def plot(self) -> Any:
        """Draw the gain and its lower bound over the candidates, as a plotly figure."""
        from mera_tl.plots import steering_curve

        return steering_curve(self.frame("accuracy"))

    def _repr_html_(self) -> str:
        names = ("recoveries", "regressions", "gain", "lower", "p")
        head = "".join(f"<th>{name}</th>" for name in ("candidate", *names))
        rows = []
        for i, row in enumerate(self.evidence):
            cells = "".join(f"<td>{getattr(row, name):.4g}</td>" for name in names)
            mark = " style='font-weight:bold'" if i == self.chosen else ""
            rows.append(f"<tr{mark}><td>{html.escape(row.candidate)}</td>{cells}</tr>")
        sentence, terms = map(html.escape, str(self).split("\n"))
        return (
            f"<p><b>{sentence}</b><br><small>{terms}</small></p>"
            f"<table><tr>{head}</tr>{''.join(rows)}</table>"
        )

    def save(self, folder: str | Path) -> Path:
        """Write the decision to a folder of its own, whole or not at all; return the folder.

        Certificate, steering and a model card, nothing executable. `mera_tl.load_steering` reads
        the steering back, `Calibration.load` the decision.

        Raises:
            ValueError: if the folder holds anything else.
        """
        from mera_tl.certificate.folder import write_folder
        from mera_tl.storage import path_of

        steering = None if self.chosen is None else self.steerings.get(self.chosen)
        return write_folder(path_of(folder), self.to_json(), steering, str(self))

    @classmethod
    def load(cls, folder: str | Path, *, space: "Space | None" = None) -> "Calibration":
        """Read a decision that `save` wrote; a steering in SAE space is read with its `space` only.

        Raises:
            ValueError: if a file is missing, damaged or was changed.
        """
        from mera_tl.certificate.folder import place_of, read_folder, read_steering

        folder = place_of(Path(folder))
        content = read_folder(folder)
        decision = cls.from_json(content)
        steering = read_steering(folder, content, space)
        return decision if steering is None else replace(decision, steerings=steering)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with the decision that follows."""
        content = asdict(replace(self, steerings={}))
        del content["steerings"]
        return {"decision": str(self.decision), "chosen": self.chosen, **content}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Calibration":
        """Rebuild a calibration from `to_json`, deriving evidence and decision again.

        Raises:
            ValueError: if it is none, or does not follow from its counts.
        """
        try:
            rows = ({**row, "gains": tuple(row["gains"])} for row in value["evidence"])
            parts = {each.name: value[each.name] for each in fields(cls) if each.name in value}
            parts |= {"evidence": tuple(Evidence(**row) for row in rows)}
            parts |= {"terms": Terms.from_json(value["terms"]), "examples": (*value["examples"],)}
            issued = cls(**parts)
            follows = (value["decision"], value["chosen"]) == (issued.decision, issued.chosen)
            follows = follows and _follows(issued)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"This is no certificate, or one of another version ({error!r}); calibrate again."
            ) from None
        if not follows:
            raise ValueError(
                "This certificate does not follow from its own evidence: bounds, p-values or "
                "decision are not those of its counts; calibrate again."
            )
        return issued


def _follows(issued: Calibration) -> bool:
    """Whether every number of a certificate is what its counts (or gains) give."""
    check_min_gain(issued.min_gain)
    if issued.examples and len({*issued.examples}) != issued.n:
        return False
    for row in issued.evidence:
        counts = (row.recoveries, row.regressions, issued.n - row.recoveries - row.regressions)
        if min(counts) < 0 or (row.gains and len(row.gains) != issued.n):
            return False
    again = issued._derived(issued.terms, issued.min_gain)
    pairs = zip(issued.evidence, again.evidence, strict=True)
    return all(said.agrees(derived) for said, derived in pairs)


def check_certified(setup: Mapping[str, Any], model: Any, instead: str) -> None:
    """Refuse a model other than the one that a certificate is about.

    Raises:
        ValueError: naming what differs, and what to do `instead` of taking that model.
    """
    from mera_tl.models.identity import identity_of

    got = identity_of(model)
    for key, words in _IDENTITY.items():
        if key in setup and key in got and setup[key] != got[key]:
            raise ValueError(
                f"This was certified on {setup.get('model')} with {words} {setup[key]}, but "
                f"{got['model']} has {got[key]}; use that model, or {instead}."
            )


def check_min_gain(min_gain: float) -> None:
    """Refuse a gain that no mean of gains in [-1, 1] can exceed or fall short of."""
    if not isinstance(min_gain, Real) or not -1 < min_gain < 1:
        raise ValueError(
            f"`min_gain={min_gain!r}` is not a gain between -1 and 1; pass a share of examples, "
            "as 0.02 for two points."
        )


# --- in words ---------------------------------------------------------------------------------


def _points(gain: float) -> str:
    return f"{100 * gain:+.1f}"


def promised_points(gain: float) -> str:
    """Return a promised gain in points, rounded down: a promise must not grow by rounding."""
    return f"{math.floor(1000 * gain + 1e-9) / 10:+.1f}"


def percent(share: float) -> str:
    """Return a share in whole percent; in tenths where that would hide a last error or success."""
    whole = round(100 * share)
    hidden = whole in (0, 100) and abs(100 * share - whole) > 1e-6
    return f"{100 * share:.1f} %" if hidden else f"{whole} %"


def _counts(row: Evidence) -> str:
    return f"{row.recoveries} better, {row.regressions} worse"


def _what(row: Evidence) -> str:
    """Say what is done; what only reads, such as flip, steers nothing."""
    return "ANSWER OTHERWISE" if "reads" in row.steering else "STEER"


def _steer_sentence(calibration: Calibration) -> str:
    best, base, limit = calibration.best, calibration.base, calibration.terms.max_regressions
    correct = calibration.terms.metric == "correct"
    moved = f"observed gain {_points(best.gain)} points"
    if base is not None:
        after = base + best.gain if correct else base - best.gain
        moved = f"{'' if correct else 'mean error '}{percent(base)} -> {percent(after)}"
    kept = "" if limit is None else f" and at most {100 * limit:.1f} % of answers turned wrong"
    fall = "" if correct else " less error"
    promise = promised_points(calibration.promised)
    return f"{_what(best)}: {moved}, certified at least {promise} points{fall}{kept}"


def _abstain_sentence(calibration: Calibration) -> str:
    best, needed, terms = calibration.best, calibration.needed, calibration.terms
    if terms.delta == 0:
        return "ABSTAIN. The run left this method no share of delta: another one is primary."
    observed = (
        f"ABSTAIN. Best observed gain {_points(best.gain)} points at {best.candidate} "
        f"({_counts(best)}; lower bound {promised_points(best.lower)}); "
        f"required {_points(calibration.min_gain)}."
    )
    if best.gain <= calibration.min_gain:
        return f"{observed} More examples cannot certify it unless chance hid a gain."
    if best.lower >= calibration.min_gain and best.regressed_at_most is not None:
        return (
            f"{observed} But up to {100 * best.regressed_at_most:.1f} % of answers may turn wrong; "
            f"allowed {100 * (terms.max_regressions or 0):.1f} %."
        )
    enough = f"About {needed:,} examples" if needed else "More examples than is practical"
    return f"{observed} {enough} would certify this gain with 80 % power."


def _terms_sentence(calibration: Calibration) -> str:
    terms, n = calibration.terms, len(calibration.evidence)
    chosen = "" if calibration.abstained else f", best {calibration.best.candidate} "
    counts = "" if calibration.abstained else f"({_counts(calibration.best)})"
    shared = ""
    if terms.run_delta is not None:
        shared = f", {1 - terms.run_delta:.4g} for all certificates of the run"
    unused = f" ({calibration.unused} repeated texts unused)" if calibration.unused else ""
    return (
        f"Confidence {1 - terms.delta:.4g} over the draw of {calibration.n} calibration examples"
        f"{unused}{shared}; {_TESTS[terms.test]}, {n} candidate{'s' if n > 1 else ''}{chosen}"
        f"{counts}, min_gain {calibration.min_gain:g}. Holds on average for data drawn as these "
        f"were, not for a subgroup, other prompts or another model.{calibration.baseline}"
    )
