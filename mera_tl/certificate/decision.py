"""From paired gains to a decision: steer at a certified threshold, or abstain and say why.

Each threshold of a fixed grid gets a lower bound of its mean gain, all of them holding at once with
probability 1 - delta. A threshold is certified if its bound reaches `min_gain`. The promise:
P(steering with a mean gain below `min_gain`) <= delta, over the draw of the calibration examples.
Calibration examples must have no part in fitting the probe or in choosing the grid.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Real

from mera_tl.certificate.bounds import BOUNDS, lower_bound
from mera_tl.certificate.certificate import Calibration, Decision, Evidence, check_min_gain, decide
from mera_tl.certificate.terms import Protocol

ExampleId = int | str


def certify(
    gains: Real[np.ndarray, "threshold example"],
    thresholds: Sequence[float],
    *,
    protocol: Protocol | None = None,
    min_gain: float = 0.0,
    examples: Sequence[ExampleId] | None = None,
    after: Calibration | None = None,
) -> Calibration:
    """Decide from paired gains, steered minus unsteered, whether to steer and at which threshold.

    `thresholds` are those the gains were recorded at, `examples` the identities of the examples.
    `after` is an earlier certificate that abstained: its share of delta is spent, and this look
    takes what its protocol leaves.

    Raises:
        ValueError: if the gains are not what the protocol announced, or delta is used up.
    """
    protocol = protocol or Protocol()
    check_min_gain(min_gain)
    _check_gains(gains, thresholds, protocol)
    ids = _identities(examples, gains.shape[1])
    delta = _delta_of_look(protocol, ids, gains.shape[1], after)
    blank = Calibration(
        decision=Decision.ABSTAIN,
        threshold=None,
        min_gain=min_gain,
        evidence=_evidence(gains, protocol, delta, min_gain),
        n=gains.shape[1],
        protocol=protocol,
        delta=delta,
        spent=delta + (after.spent if after else 0.0),
        data_hash=_hash(gains, ids),
        examples=ids,
        look=1 + (after.look if after else 0),
    )
    return decide(blank)


def certify_groups(
    gains: Real[np.ndarray, "threshold example"],
    thresholds: Sequence[float],
    groups: Sequence[str],
    *,
    protocol: Protocol | None = None,
    min_gain: float = 0.0,
    examples: Sequence[ExampleId] | None = None,
) -> dict[str, Calibration]:
    """Certify every group of examples by itself, with all promises holding at once.

    Each group gets delta / number of groups and decides alone: steering may be on in one and off in
    another. Groups must be told apart without looking at outcomes. A plain `certify` averages over
    groups and promises nothing for any one of them.
    """
    protocol = protocol or Protocol()
    if len(groups) != gains.shape[-1]:
        raise ValueError(
            f"{len(groups)} group names came with {gains.shape[-1]} examples; pass one for each."
        )
    ids = _identities(examples, len(groups))
    names = sorted(set(groups))
    part = replace(protocol, delta=protocol.delta / len(names))
    certificates = {}
    for name in names:
        members = [i for i, group in enumerate(groups) if group == name]
        own = [ids[i] for i in members] if ids else None
        alone = certify(
            gains[:, members], thresholds, protocol=part, min_gain=min_gain, examples=own
        )
        certificates[name] = replace(
            alone, protocol=protocol, spent=protocol.delta, group=name, n_groups=len(names)
        )
    return certificates


def _evidence(
    gains: Real[np.ndarray, "threshold example"], protocol: Protocol, delta: float, min_gain: float
) -> tuple[Evidence, ...]:
    order = np.random.default_rng(protocol.seed).permutation(gains.shape[1])
    bound = BOUNDS[protocol.test]
    rows = []
    for threshold, row, share in zip(protocol.thresholds, gains, protocol.shares, strict=True):
        level, lower, p = delta * share, -1.0, 1.0
        if level > 0:
            curve = bound(row[order], level)
            lower, p = lower_bound(curve, level), curve(min_gain)
        rows.append(
            Evidence(
                threshold=float(threshold),
                recoveries=int((row > 0).sum()),
                regressions=int((row < 0).sum()),
                gain=float(row.mean()),
                spread=float(row.std()),
                lower=lower,
                p=p,
                level=level,
            )
        )
    return tuple(rows)


def _delta_of_look(
    protocol: Protocol, ids: tuple[ExampleId, ...], n: int, after: Calibration | None
) -> float:
    """Return what this look may spend of delta; refuse one that would cost more than is left."""
    if after is not None:
        _check_second_look(protocol, ids, after)
    look, spent = (after.look + 1, after.spent) if after else (1, 0.0)
    planned = protocol.sizes
    if planned and (look > len(planned) or planned[look - 1] != n):
        raise ValueError(
            f"Look {look} has {n} examples but the protocol announced looks at {planned}; "
            "look at these numbers, no more often."
        )
    if after is None:
        return protocol.delta / max(1, len(planned))
    delta = protocol.delta / len(planned) if planned else protocol.delta - spent
    if delta <= 0 or spent + delta > protocol.delta * (1 + 1e-9):
        raise ValueError(
            f"Of delta={protocol.delta:g}, {spent:g} was spent on the looks before, so nothing is "
            f"left for look {look}; state the risk of both, as Protocol(delta={2 * spent:g}), or "
            "announce the looks beforehand, as Protocol(sizes=(250, 600))."
        )
    return delta


def _check_second_look(protocol: Protocol, ids: tuple[ExampleId, ...], after: Calibration) -> None:
    if not after.abstained:
        raise ValueError(
            "The earlier certificate did not abstain, so there is nothing to look for again; use "
            "it, or ask it for another gain with `.at(min_gain=...)`."
        )
    if not ids or not after.examples:
        raise ValueError(
            "A second look must tell new examples from old ones; pass `examples` at every look."
        )
    shared = len(set(ids) & set(after.examples))
    announced = bool(protocol.sizes) and protocol == after.protocol
    # Adding examples because the first look was close, or until it succeeds, is not covered by any
    # split of delta: the number must be announced, or the examples new.
    if shared and not announced:
        raise ValueError(
            f"{shared} of these examples were already looked at; pass only new examples, or "
            "announce the numbers before the first look, as Protocol(sizes=(250, 600))."
        )


def _check_gains(
    gains: Real[np.ndarray, "threshold example"], thresholds: Sequence[float], protocol: Protocol
) -> None:
    if tuple(float(t) for t in thresholds) != tuple(float(t) for t in protocol.thresholds):
        raise ValueError(
            f"The gains were recorded at thresholds {_short(thresholds)} but the protocol fixed "
            f"{_short(protocol.thresholds)}; record them again, or use the protocol they came from."
        )
    if gains.ndim != 2 or gains.shape[0] != len(thresholds):
        raise ValueError(
            f"Gains of shape {gains.shape} do not fit {len(thresholds)} thresholds; pass an array "
            "of shape (threshold, example)."
        )
    if gains.shape[1] == 0:
        raise ValueError("There are no calibration examples (n=0); pass gains of at least one.")
    if not np.isfinite(gains).all():
        raise ValueError(
            f"{int((~np.isfinite(gains)).sum())} of the gains are not finite numbers; find out why "
            "those examples were not graded before certifying."
        )
    if np.abs(gains).max() > 1:
        raise ValueError(
            f"Gains reach from {gains.min():g} to {gains.max():g}; pass gains in [-1, 1]."
        )
    if protocol.metric == "correct" and not np.isin(gains, (-1, 0, 1)).all():
        raise ValueError(
            "The metric is 'correct' but some gains are not -1, 0 or 1; pass Protocol(metric="
            "'error') for changes of a continuous error."
        )


def _identities(examples: Sequence[ExampleId] | None, n: int) -> tuple[ExampleId, ...]:
    if examples is None:
        return ()
    if len(examples) != n:
        raise ValueError(f"{len(examples)} identities came with {n} examples; pass one for each.")
    if len(set(examples)) != n:
        seen: set[ExampleId] = set()
        twice = next(e for e in examples if e in seen or seen.add(e))
        raise ValueError(
            f"Example {twice!r} is there more than once, and a repeated example is no new "
            "evidence; leave the repetitions out."
        )
    return tuple(examples)


def _hash(gains: Real[np.ndarray, "threshold example"], ids: tuple[ExampleId, ...]) -> str:
    """Return 16 hex digits that stand for these gains on these examples."""
    data = np.ascontiguousarray(gains, "<f8").tobytes() + json.dumps(ids).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def _short(thresholds: Sequence[float]) -> str:
    return "(" + ", ".join(f"{t:.3g}" for t in thresholds) + ")"
