"""Steer held-out examples by every candidate, and certify one of them or abstain.

Each candidate gets a lower bound of its mean gain, all of them holding at once with probability
1 - delta. A candidate is certified if its bound reaches `min_gain`. The promise: P(steering with a
mean gain below `min_gain`) <= delta, over the draw of the calibration examples, which must have no
part in fitting or choosing candidates, and each of which must be a text of its own.
"""

import hashlib
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import Real

from mera_tl.certificate.certificate import Calibration, check_min_gain
from mera_tl.certificate.description import describe, names_of
from mera_tl.certificate.evidence import Evidence
from mera_tl.certificate.terms import DEFAULT_THRESHOLDS, Terms
from mera_tl.inference.activations import rows_fitted
from mera_tl.inference.answers import ReadSettings, option_tokens
from mera_tl.inference.evaluation import check_call, tokenize_task
from mera_tl.inference.outcomes import Outcomes
from mera_tl.models.identity import identity_of
from mera_tl.models.model import Model
from mera_tl.steering.directions import origin_of
from mera_tl.steering.many import evaluate_many
from mera_tl.steering.rules import Adaptive
from mera_tl.steering.steering import Steering
from mera_tl.steering.unsteered import Passes
from mera_tl.tasks import splitting
from mera_tl.tasks.splitting import key_of
from mera_tl.tasks.task import Calibration as CalibrationRole
from mera_tl.tasks.task import Task

ExampleId = int | str


def calibrate(
    model: Model,
    task: Task[CalibrationRole],
    candidates: Steering | Sequence[Steering],
    *,
    terms: Terms | None = None,
    min_gain: float = 0.0,
    delta: float | None = None,
    settings: ReadSettings | None = None,
    passes: Passes | None = None,
) -> Calibration:
    """Steer held-out examples by every candidate, and certify one of them or abstain.

    Candidates are steerings that differ in whatever you like: thresholds, strengths, layers,
    directions. They must be fixed before a calibration outcome is seen. One steering without a
    threshold stands for the ten `DEFAULT_THRESHOLDS`. Of examples with the same text one is used,
    by a seeded choice. `min_gain` is in accuracy: 0.02 asks for two points. `delta`, the greatest
    probability of steering with less, is short for `Terms(delta=delta)`. With the same `passes`,
    several calibrations on the same examples run these unsteered once.

    Raises:
        ValueError: if the task is not a calibration split, a candidate moves nothing, or as
            `evaluate` and `certify`.
    """
    check_call(model, task)
    _check_terms(terms)
    if terms is not None and delta not in (None, terms.delta):
        raise ValueError(
            f"`delta={delta}` contradicts Terms(delta={terms.delta}); pass one of the two."
        )
    terms = terms or Terms(delta=0.05 if delta is None else delta)
    check_min_gain(min_gain)
    settings = ReadSettings.of(task, settings)
    steerings = _candidates(candidates)
    descriptions = describe(steerings)
    names_of(descriptions)  # refuses repetitions before anything is run
    origins = [each.probe.manifest for each in steerings]
    origins += [origin_of(each.direction) for each in steerings]
    n_given = len(task)
    task = evidence_of(task, terms.seed, origins, model=model, settings=settings)
    unsteered = replace(steerings[0], rule=Adaptive())  # without a limit nothing moves
    asked, counts = [unsteered, *steerings], terms.metric == "correct"
    told: dict[str, Any] = {"settings": settings, "decide": counts, "passes": passes}
    base, *runs = evaluate_many(model, task, asked, **told)
    about = setup_of(model, task, settings)
    decision = certify_outcomes(
        task, base, runs, candidates=descriptions, terms=terms, min_gain=min_gain, setup=about
    )
    unused = n_given - len(task)
    return replace(decision, unused=unused, steerings=dict(enumerate(steerings)))


def certify_outcomes(
    task: Task[CalibrationRole],
    base: Outcomes,
    runs: Sequence[Outcomes],
    *,
    candidates: Sequence[Mapping[str, Any] | str | float],
    terms: Terms,
    min_gain: float,
    setup: Mapping[str, Any],
) -> Calibration:
    """Certify one of several ways to answer a task whose texts are distinct, whatever answered.

    `base` are the unsteered outcomes, `runs` those of each candidate; `setup` is `setup_of`'s.

    Raises:
        ValueError: as `certify`.
    """
    decision = certify(
        np.stack([run.gain(base, terms.metric).numpy() for run in runs]),
        terms=terms,
        min_gain=min_gain,
        candidates=candidates,
        examples=[example.row for example in task.examples],
        texts=[example.key for example in task.examples],
    )
    unsteered = base.accuracy if terms.metric == "correct" else base.mean_error
    return replace(decision, base=unsteered, setup=setup)


def certify(
    gains: Real[np.ndarray, "candidate example"],
    *,
    terms: Terms | None = None,
    min_gain: float = 0.0,
    candidates: Sequence[Mapping[str, Any] | str | float] | None = None,
    examples: Sequence[ExampleId] | None = None,
    texts: Sequence[str] | None = None,
) -> Calibration:
    """Decide from paired gains, steered minus unsteered, whether to steer and by which candidate.

    Gains are in [-1, 1], of correctness -1, 0 or 1, as `after.gain(before)` gives them.
    `candidates` says what the rows are: names, thresholds, or descriptions; `examples` holds the
    identities of the columns, `texts` what was asked; case and white space make no other text.

    Raises:
        ValueError: if the gains are not what the terms announced, or an example or a text is there
            twice: what is repeated is no new evidence.
    """
    _check_terms(terms)
    terms, gains = terms or Terms(), np.asarray(gains)
    check_min_gain(min_gain)
    _check_gains(gains, terms)
    if candidates is None:
        candidates = [f"candidate {i}" for i in range(len(gains))]
    described = [_described(candidate) for candidate in candidates]
    if len(described) != len(gains):
        raise ValueError(
            f"{len(described)} candidates were named but the gains have {len(gains)} rows; pass "
            "an array of shape (candidate, example) and one name for each row."
        )
    ids = _distinct_values(examples, gains.shape[1], "Example")
    keys = None if texts is None else map(key_of, texts)
    _distinct_values(keys, gains.shape[1], "The text of example")
    levels = terms.levels(len(gains))
    rows = (
        Evidence.of(row, level, terms, min_gain, candidate=name, steering=about)
        for row, level, name, about in zip(
            gains, levels, names_of(described), described, strict=True
        )
    )
    return Calibration(tuple(rows), gains.shape[1], terms, min_gain, _hash(gains, ids), ids)


def distinct(texts: Sequence[str], seed: int) -> list[int]:
    """Return the places of one example per text, by the seeded choice that splits make."""
    return splitting.distinct(map(key_of, texts), seed)


def evidence_of(
    task: Task[CalibrationRole],
    seed: int,
    origins: Iterable[Mapping[str, Any]],
    *,
    model: Model,
    settings: ReadSettings,
) -> Task[CalibrationRole]:
    """Return the examples of a calibration split that are evidence: one of each text.

    `origins` say what the probes and directions that are to be certified were fitted to. Texts of
    which only what differs is cut off are one.

    Raises:
        ValueError: if it is another split, or a part was fitted to some of it.
    """
    if task.role != "calibration":
        raise ValueError(
            f"A certificate needs the calibration split, got the {task.role} split of {task.name}; "
            "pass task.split(...).calibration."
        )
    rows = {example.row for example in task.examples}
    for origin in {id(each): each for each in origins}.values():
        if seen := rows & rows_fitted(origin, task):
            raise ValueError(
                f"The probe or direction was fitted to {len(seen)} of the {len(rows)} calibration "
                f"examples (row {min(seen)}, ...), so these are no evidence; fit it on "
                "task.split(...).train, of the same split and seed."
            )
    task = task.subset(distinct([example.key for example in task.examples], seed))
    if settings.truncate:
        prompts = [str(tokens) for tokens in tokenize_task(model, task, settings)]
        task = task.subset(splitting.distinct(prompts, seed))
    return task


def setup_of(model: Model, task: Task[Any], settings: ReadSettings) -> dict[str, Any]:
    """Say what a certificate is about, in plain values and hashes."""
    unread = ("progress", "batch_size", "batch_tokens")
    packages = ("mera-tl", "torch", "transformers", "transformer-lens")
    options = option_tokens(model, task, settings)
    whole = [[list(ids) for ids in variants] for variants in options.continuations]
    return {
        **identity_of(model),
        "readout": {k: v for k, v in asdict(settings).items() if k not in unread},
        "task": task.name,
        "options": list(task.options),
        "answers": {"tokens": [list(ids) for ids in options.tokens], "continuations": whole},
        "template": task.source.get("template"),
        "data": task.data_hash,
        "versions": {p: version(p) for p in packages} | {"python": platform.python_version()},
    }


def _candidates(candidates: Steering | Sequence[Steering]) -> list[Steering]:
    """Return the steerings to try; one without a threshold stands for the default grid."""
    several = list(candidates) if isinstance(candidates, Sequence) else []
    steerings = [candidates] if isinstance(candidates, Steering) else several
    if not steerings or not all(isinstance(steering, Steering) for steering in steerings):
        raise ValueError(
            f"`candidates={candidates!r:.80}` is neither a Steering nor a sequence of them; pass "
            "one, as Steering(probe) or the steering of a search, found.steering, or several, as "
            "[steering.at(t) for t in (0.1, 0.3)]."
        )
    if len(steerings) == 1 and steerings[0].limit == math.inf:
        return [steerings[0].at(threshold) for threshold in DEFAULT_THRESHOLDS]
    idle = [i for i, steering in enumerate(steerings) if steering.limit == math.inf]
    if idle:
        raise ValueError(
            f"Candidate {idle[0]} has no threshold and moves nothing; pass steering.at(threshold), "
            "or a single steering for the default thresholds."
        )
    return steerings


def _described(candidate: Mapping[str, Any] | str | float) -> Mapping[str, Any]:
    if isinstance(candidate, Mapping):
        return candidate
    return {"threshold" if isinstance(candidate, float) else "name": candidate}


def _check_terms(terms: Any) -> None:
    if not isinstance(terms, Terms | None):
        raise ValueError(f"terms={terms!r:.60} are none; pass them as Terms(delta=0.05).")


def _check_gains(gains: Real[np.ndarray, "candidate example"], terms: Terms) -> None:
    if gains.ndim != 2 or 0 in gains.shape:
        raise ValueError(
            f"Gains of shape {gains.shape} do not fit; pass an array of shape (candidate, example) "
            "with at least one of each, as [gains] for one candidate."
        )
    if gains.dtype.kind not in "biuf":
        raise ValueError(f"Gains of type {gains.dtype} are no numbers; pass some in [-1, 1].")
    if not np.isfinite(gains).all():
        raise ValueError(
            f"{int((~np.isfinite(gains)).sum())} of the gains are not finite numbers; find out why "
            "those examples were not graded before certifying."
        )
    if np.abs(gains).max() > 1:
        raise ValueError(
            f"Gains reach from {gains.min():g} to {gains.max():g}; pass gains in [-1, 1]."
        )
    if terms.metric == "correct" and not np.isin(gains, (-1, 0, 1)).all():
        raise ValueError(
            "The metric is 'correct' but some gains are not -1, 0 or 1; pass Terms(metric="
            "'error') for changes of a continuous error."
        )


def _distinct_values(values: Iterable[Any] | None, n: int, what: str) -> tuple[Any, ...]:
    """Return one value per example, none twice."""
    if values is None:
        return ()
    given = tuple(values)
    if len(given) != n:
        raise ValueError(f"{len(given)} values came with {n} examples; pass one for each.")
    if len(set(given)) != n:
        seen: set[Any] = set()
        twice = next(value for value in given if value in seen or seen.add(value))
        raise ValueError(
            f"{what} {twice!r:.80} is there more than once, and what is repeated is no new "
            "evidence; keep one example per text, as `calibrate` does."
        )
    return given


def _hash(gains: Real[np.ndarray, "candidate example"], ids: tuple[ExampleId, ...]) -> str:
    """Return 16 hex digits that stand for these gains on these examples."""
    data = np.ascontiguousarray(gains, "<f8").tobytes() + json.dumps(ids).encode()
    return hashlib.sha256(data).hexdigest()[:16]
