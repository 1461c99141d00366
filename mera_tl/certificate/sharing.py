"""Several certificates on one calibration split: they share delta, or do not add up.

Each certificate of a run is wrong with probability at most its share; shares sum to the run's
delta, so that all hold at once with probability 1 - delta (Bonferroni over methods). Where a run
promises `min_gain` only, and no lower bounds, what certified candidates no longer need goes to the
other methods (Holm 1979; Bretz et al. 2009): `step_down`.
"""

import math
from collections.abc import Mapping, Sequence

from mera_tl.certificate.bounds import check_probability
from mera_tl.certificate.certificate import Calibration

FAVOURITE = "searched"
"""The method that gets half of delta where it is among others."""


def share_delta(
    methods: Sequence[str], delta: float = 0.05, *, primary: str | None = None
) -> dict[str, float]:
    """Divide delta among the methods of a run, before any outcome is seen.

    `primary`, named in advance, gets all of it and the others nothing; else `searched` gets half
    and the others equal parts of the rest; else all get equal parts.

    Raises:
        ValueError: if there is no method, the primary one is not among them, or delta is no
            probability.
    """
    check_probability("delta", delta)
    names = list(dict.fromkeys(methods))
    if not names or (primary is not None and primary not in names):
        raise ValueError(
            f"primary={primary!r} is none of the methods that ask for a certificate "
            f"({', '.join(names) or 'none'}); name one of them."
        )
    if primary is None and FAVOURITE in names and len(names) > 1:
        rest = delta / 2 / (len(names) - 1)
        return {name: delta / 2 if name == FAVOURITE else rest for name in names}
    if primary is None:
        return dict.fromkeys(names, delta / len(names))
    return {name: delta if name == primary else 0.0 for name in names}


def step_down(decisions: Mapping[str, Calibration]) -> dict[str, Calibration]:
    """Hand what certified candidates had to the other methods, until nothing more is certified.

    To be announced before outcomes are seen. With probability 1 - `run_delta` no certified method
    gains less than `min_gain`; lower bounds beyond it are no longer promised. The other candidates
    of a certified method keep what they have: one of them may be what that method deploys.

    Raises:
        ValueError: if the certificates do not share one `run_delta`.
    """
    totals = {decision.terms.run_delta for decision in decisions.values()}
    shares = {name: decision.terms.delta for name, decision in decisions.items()}
    total = totals.pop() if len(totals) == 1 else None
    if total is None or sum(shares.values()) > total * (1 + 1e-9):
        raise ValueError(
            f"Shares of delta that sum to {sum(shares.values()):g} are not those of one run; "
            "calibrate with Terms(delta=share, run_delta=...) for the shares of `share_delta`."
        )
    certified: dict[str, Calibration] = {}
    while True:
        waiting = [name for name in decisions if name not in certified]
        left = sum(shares[name] for name in waiting)
        free = total - sum(map(_kept_back, certified.values()))
        again = {
            name: decisions[name].with_delta(
                free * (shares[name] / left if left else 1 / len(waiting))
            )
            for name in waiting
        }
        found = {name: decision for name, decision in again.items() if not decision.abstained}
        if not found:
            return {name: certified.get(name) or again[name] for name in decisions}
        certified |= found


def _kept_back(decision: Calibration) -> float:
    """Return what the candidates that are not certified may spend."""
    return math.fsum(row.level for row in decision.evidence if not decision.certifies(row))
