"""The methods that go beyond the paper, one short function each, and the baseline beside them.

MERA's rule along directions that follow the data or hold the true class fixed (`directions`); the
search on training data with one certificate (`search`); and `flip`, which steers nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mera_tl.certificate.certificate import Calibration
from mera_tl.inference.outcomes import Outcomes
from mera_tl.methods.candidates import RAW, features
from mera_tl.methods.methods import METHODS, Setting, Treatment, method
from mera_tl.methods.race import Choices, Search, search
from mera_tl.methods.second_best import certify_flip, flipped, reading_hooks, search_flip
from mera_tl.steering.directions import fit_direction
from mera_tl.steering.spaces import Space

__all__ = ["METHODS"]


@method
def pattern_probe(setting: Setting) -> Treatment:
    """MERA along `S w`: the shortest shift in the metric of the data."""
    return _along("pattern", "pattern_probe", setting)


@method
def controlled_pattern(setting: Setting) -> Treatment:
    """MERA along `S w` with the covariance within true classes."""
    return _along("controlled_pattern", "controlled_pattern", setting)


@method
def controlled_contrastive(setting: Setting) -> Treatment:
    """MERA along the difference of wrong and right examples within true classes."""
    return _along("controlled_contrastive", "controlled_contrastive", setting)


@method
def answer_controlled(setting: Setting) -> Treatment:
    """MERA along one direction per unsteered answer, the true class held fixed."""
    return _along("answer_controlled", "answer_controlled", setting)


@method
def searched(setting: Setting) -> Treatment:
    """Choose direction, probe, layers, scope and threshold on training data; certify that one."""

    def look() -> Search:
        choices = Choices(metric=setting.protocol.metric, seed=setting.seed)
        return search(
            setting.model,
            setting.splits.train,
            setting.activations,
            choices=choices,
            settings=setting.read,
            space=setting.space,
        )

    found = _kept_search(setting, "searched", look, setting.space)
    once = replace(setting.protocol, thresholds=(found.chosen.threshold,), weights=None)
    decision = setting.decide("searched", found.steering, once)
    hooks = decision.fwd_hooks(found.steering)
    probe = found.steering.probe
    return Treatment(hooks, calibration=decision, details=_details(found), probe=probe)


@method
def flip(setting: Setting) -> Treatment:
    """Answer the second-best option where the predicted error is too high; steer nothing."""
    choices = Choices(metric=setting.protocol.metric, seed=setting.seed)
    look = partial(
        search_flip,
        setting.splits.train,
        setting.activations,
        choices=choices,
    )
    found = _kept_search(setting, "flip", look)
    kept = None if setting.folder is None else setting.folder / "certificates" / "flip.json"
    if kept is not None and kept.exists():
        decision = Calibration.load(kept)
    else:
        decision = certify_flip(
            setting.model,
            setting.splits.calibration,
            found,
            protocol=setting.protocol,
            min_gain=setting.min_gain,
            settings=setting.read,
        )
        if kept is not None:
            decision.save(kept)
    details, probe = _details(found), found.steering.probe
    if decision.threshold is None:
        return Treatment(calibration=decision, details=details, probe=probe)
    threshold = decision.threshold

    def answer(outcomes: Outcomes) -> Outcomes:
        return flipped(outcomes, outcomes.peak, threshold)

    hooks = reading_hooks(found.steering)
    return Treatment(hooks, calibration=decision, details=details, probe=probe, answer=answer)


def _along(kind: str, name: str, setting: Setting) -> Treatment:
    """Calibrate MERA's rule along a direction; steer at the certified threshold or not at all."""
    probe = setting.probe("ridge")
    direction = fit_direction(features(setting.activations, setting.space), probe, kind)
    steering = replace(setting.steering(probe), direction=direction.vectors)
    decision = setting.decide(name, steering)
    details = {
        "probe": probe.kind,
        "penalty": probe.penalty,
        "direction": kind,
        "notes": list(direction.notes),
    }
    return Treatment(
        decision.fwd_hooks(steering), calibration=decision, details=details, probe=probe
    )


def _kept_search(
    setting: Setting, name: str, look: Callable[[], Search], space: Space = RAW
) -> Search:
    """Search once per run folder."""
    folder: Path | None = None if setting.folder is None else setting.folder / "searches" / name
    if folder is not None and (folder / "search.json").exists():
        return Search.load(folder, space)
    setting.splits.train.require_classes()
    found = look()
    if folder is not None:
        found.save(folder)
    return found


def _details(found: Search) -> dict[str, Any]:
    chosen = found.chosen
    return {
        "direction": chosen.direction,
        "penalty": chosen.penalty,
        "layers": list(chosen.layers),
        "positions": chosen.positions,
        "strength": chosen.strength,
        "n_candidates": len(found.table),
        **found.details,
    }
