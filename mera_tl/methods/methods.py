"""Every way of steering that is compared, one short function each.

A method gets a `Setting` (model, splits, activations, unsteered outcomes) and returns a
`Treatment`: what to do to the test prompts, and the certificate it rests on, if any. Adding a
method is adding one function here.
"""

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mera_tl import storage
from mera_tl.certificate.calibration import calibrate
from mera_tl.certificate.certificate import Calibration
from mera_tl.certificate.terms import Protocol
from mera_tl.inference.activations import Activations
from mera_tl.inference.answers import ReadSettings
from mera_tl.inference.evaluation import evaluate
from mera_tl.inference.outcomes import Outcomes
from mera_tl.models.model import FwdHooks, Model
from mera_tl.probes.probe import Kind, LinearProbe, Rank, fit_error_probe, fit_ranked_probe
from mera_tl.sae.probes import fit_latent_probe
from mera_tl.steering.rules import Additive
from mera_tl.steering.spaces import ResidualSpace, SAESpace, Space
from mera_tl.steering.steering import Positions, Steering
from mera_tl.tasks.task import Splits, Task

logger = logging.getLogger(__name__)

INSTRUCTION = "Think before you answer."
"""The sentence of `prompt_steering`, placed before "Answer:"."""
STRENGTHS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
"""From which `tuned_*` choose, in units of the layer's typical residual norm."""


@dataclass(frozen=True, eq=False)
class Setting:
    """One model, one task, one split: what every method may look at."""

    model: Model
    splits: Splits
    activations: Activations
    """Of the training split, unsteered."""
    protocol: Protocol = field(default_factory=Protocol)
    min_gain: float = 0.0
    layers: Any = "all"
    positions: Positions = "all"
    probe_position: Any = "last"
    """Where probes read: the final prompt token (last) or the answer token (exact)."""
    strength: float = 0.1
    """Of the fixed-strength methods, in units of the layer's typical residual norm."""
    pairs: int = 0
    """Of a contrastive probe: examples with most and with least error; 0, half of all each."""
    read: ReadSettings = field(default_factory=ReadSettings)
    space: Space = field(default_factory=ResidualSpace)
    seed: int = 0
    folder: Path | None = None
    """Where probes and certificates are kept and found again."""
    cache: Path | None = None
    """Where other runs may have left probes of the same activations."""
    cache_key: dict[str, Any] = field(default_factory=dict)
    """What the activations depend on."""

    def probe(self, kind: Kind) -> LinearProbe:
        """Fit a probe of this kind on the training split, once."""
        fit = partial(fit_error_probe, kind=kind)
        if isinstance(self.space, SAESpace):
            fit = partial(fit_latent_probe, space=self.space, kind=kind)
        if kind == "contrastive" and self.pairs:
            return self._kept_probe(f"{kind}_{self.pairs}", partial(fit, penalty=float(self.pairs)))
        return self._kept_probe(kind, fit)

    def ranked_probe(self, rank: Rank) -> LinearProbe:
        """Fit the paper's regressions and take the best, median or worst per layer, once."""
        return self._kept_probe(f"{rank}_regression", partial(fit_ranked_probe, rank=rank))

    def _kept_probe(self, name: str, fit: Callable[..., LinearProbe]) -> LinearProbe:
        if name in self._probes:
            return self._probes[name]
        where = {"position": self.probe_position, "seed": self.seed}

        def make(folder: Path | None = None) -> LinearProbe:
            self.splits.train.require_classes()
            probe = fit(self.activations, **where)
            if folder is not None:
                probe.save(folder)
            return probe

        if self.folder is None:
            self._probes[name] = make()
        else:
            kept, key = self.folder / "probes" / name, {**self.cache_key, **where, "probe": name}
            # Latents are read through SAEs that no key names: their probes stay in the run.
            cache = None if isinstance(self.space, SAESpace) else self.cache
            storage.shared(kept, cache, key, make, last="probe.json")
            self._probes[name] = LinearProbe.load(kept)
        return self._probes[name]

    def decide(
        self, name: str, steering: Steering, protocol: Protocol | None = None
    ) -> Calibration:
        """Calibrate a steering on the calibration split, once per name."""
        kept = None if self.folder is None else self.folder / "certificates" / f"{name}.json"
        if kept is not None and kept.exists():
            return Calibration.load(kept)
        decision = calibrate(
            self.model,
            self.splits.calibration,
            steering,
            min_gain=self.min_gain,
            protocol=protocol or self.protocol,
            settings=self.read,
        )
        if kept is not None:
            decision.save(kept)
        return decision

    def steering(self, probe: LinearProbe) -> Steering:
        """Return the probe's steering in this setting's scope."""
        return Steering(probe, space=self.space, layers=self.layers, positions=self.positions)

    @cached_property
    def _probes(self) -> dict[str, LinearProbe]:
        return {}


@dataclass(frozen=True, eq=False)
class Treatment:
    """What a method does to test prompts."""

    fwd_hooks: FwdHooks = ()
    instruction: str | None = None
    """A sentence placed before "Answer:"."""
    calibration: Calibration | None = None
    """The certificate, for methods that may abstain."""
    details: dict[str, Any] = field(default_factory=dict)
    """What a reader of the record should know: strength, layer, penalty."""
    probe: LinearProbe | None = None
    answer: Callable[[Outcomes], Outcomes] | None = None
    """What becomes of the answers, for a method that changes them and not the activations."""

    def apply(self, setting: Setting, task: Task[Any]) -> Outcomes:
        """Answer a task under this treatment."""
        if self.instruction is not None:
            task = task.with_instruction(self.instruction)
        hooks, read = self.fwd_hooks, setting.read
        outcomes = evaluate(setting.model, task, hooks, settings=read, title="test")
        return outcomes if self.answer is None else self.answer(outcomes)


Method = Callable[[Setting], Treatment]
METHODS: dict[str, Method] = {}


def method(function: Method) -> Method:
    """Register a method under its function's name."""
    METHODS[function.__name__] = function
    return function


def find_method(name: str) -> Method:
    """Return a method by its id.

    Raises:
        ValueError: if there is none, with the nearest names.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.4)
        raise ValueError(
            f"There is no method {name!r}; nearest: {', '.join(near) or 'none'} "
            "(`mera methods` lists all)."
        )
    return METHODS[name]


IN_LATENTS = (
    "no_steering",
    "prompt_steering",
    "additive_probe",
    "additive_logistic_probe",
    "vanilla_contrastive",
    "optimal_probe",
    "optimal_logistic_probe",
    "optimal_contrastive",
    "pattern_probe",
    "controlled_pattern",
    "controlled_contrastive",
    "answer_controlled",
    "searched",
    "flip",
)
"""What works in SAE space too; the first two read nothing, flip reads the residual stream."""


def require_space(name: str, space: str) -> None:
    """Refuse a method in a space it does not work in.

    Raises:
        ValueError: naming the methods that do.
    """
    if space != "raw" and name not in IN_LATENTS:
        raise ValueError(
            f"{name} works in the residual stream only; in SAE space there are "
            f"{', '.join(IN_LATENTS)}."
        )


# --- baselines ----------------------------------------------------------------------------------


@method
def no_steering(setting: Setting) -> Treatment:  # noqa: ARG001
    """Leave the model alone."""
    return Treatment()


@method
def prompt_steering(setting: Setting) -> Treatment:  # noqa: ARG001
    """Ask the model to think before it answers."""
    return Treatment(instruction=INSTRUCTION)


@method
def additive_probe(setting: Setting) -> Treatment:
    """Move every token by a fixed length against the regression probe."""
    return _additive(setting, setting.probe("ridge"))


@method
def additive_logistic_probe(setting: Setting) -> Treatment:
    """Move every token by a fixed length against the logistic probe."""
    return _additive(setting, setting.probe("logistic"))


@method
def vanilla_contrastive(setting: Setting) -> Treatment:
    """Move every token by a fixed length against the difference of means of high and low error."""
    return _additive(setting, setting.probe("contrastive"))


@method
def additive_sub_probe(setting: Setting) -> Treatment:
    """Move every token by a fixed length against the worst of the paper's regressions."""
    return _additive(setting, setting.ranked_probe("worst"))


@method
def additive_median_probe(setting: Setting) -> Treatment:
    """Move every token by a fixed length against the median of the paper's regressions."""
    return _additive(setting, setting.ranked_probe("median"))


@method
def tuned_additive_probe(setting: Setting) -> Treatment:
    """Choose the length on the calibration split, with the certificate MERA needs."""
    return _tuned("tuned_additive_probe", setting, setting.probe("ridge"))


@method
def tuned_contrastive(setting: Setting) -> Treatment:
    """Choose the length along the difference of means, with the certificate MERA needs."""
    return _tuned("tuned_contrastive", setting, setting.probe("contrastive"))


def _tuned(name: str, setting: Setting, probe: LinearProbe) -> Treatment:
    protocol = replace(setting.protocol, thresholds=STRENGTHS, knob="strength")
    steering = setting.steering(probe)
    decision = setting.decide(name, steering, protocol)
    strength = decision.threshold
    hooks = [] if strength is None else replace(steering, rule=Additive(strength)).fwd_hooks()
    details = {"strength": strength, **_of(probe)}
    return Treatment(hooks, calibration=decision, details=details, probe=probe)


def _additive(setting: Setting, probe: LinearProbe) -> Treatment:
    steering = replace(setting.steering(probe), rule=Additive(setting.strength))
    return Treatment(
        steering.fwd_hooks(), details={"strength": setting.strength, **_of(probe)}, probe=probe
    )


# --- MERA ---------------------------------------------------------------------------------------


@method
def optimal_probe(setting: Setting) -> Treatment:
    """MERA with the regression probe."""
    return _mera("optimal_probe", setting, setting.probe("ridge"))


@method
def optimal_logistic_probe(setting: Setting) -> Treatment:
    """MERA with the logistic probe."""
    return _mera("optimal_logistic_probe", setting, setting.probe("logistic"))


@method
def optimal_contrastive(setting: Setting) -> Treatment:
    """MERA with the contrastive direction, calibrated to the scale of the error."""
    return _mera("optimal_contrastive", setting, setting.probe("contrastive"))


@method
def sub_optimal_probe(setting: Setting) -> Treatment:
    """MERA with the worst of the paper's regressions."""
    return _mera("sub_optimal_probe", setting, setting.ranked_probe("worst"))


@method
def median_optimal_probe(setting: Setting) -> Treatment:
    """MERA with the median of the paper's regressions."""
    return _mera("median_optimal_probe", setting, setting.ranked_probe("median"))


def _mera(name: str, setting: Setting, probe: LinearProbe) -> Treatment:
    """Calibrate the probe's steering; steer at the certified threshold or not at all."""
    steering = setting.steering(probe)
    decision = setting.decide(name, steering)
    hooks = decision.fwd_hooks(steering)
    return Treatment(hooks, calibration=decision, details=_of(probe), probe=probe)


def _of(probe: LinearProbe) -> dict[str, Any]:
    return {"probe": probe.kind, "penalty": probe.penalty, "best_layer": probe.best_layer}
