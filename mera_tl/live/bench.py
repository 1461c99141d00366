"""What a panel works with: a model, named ways to steer it, prompts to begin with.

A *way* is a steering whose threshold, strength, layers and tokens are still open: the certified one
of a run, and one per direction, fitted to the run's training activations, in the residual stream
and, where SAEs of the model are at hand, in their latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf, isfinite
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch

from mera_tl.benchmark.run import Run
from mera_tl.certificate.certificate import Calibration
from mera_tl.certificate.saving import load_steering
from mera_tl.inference.answers import ReadSettings
from mera_tl.inference.evaluation import check_model
from mera_tl.methods.candidates import ProbeSet
from mera_tl.models.loading import load_model
from mera_tl.models.model import Model
from mera_tl.report.run_folder import RunFolder
from mera_tl.sae.loading import default_source, load_saes
from mera_tl.steering.directions import KINDS
from mera_tl.steering.rules import Adaptive, Additive
from mera_tl.steering.spaces import ResidualSpace, SAESpace, Space
from mera_tl.steering.steering import Positions, Steering
from mera_tl.tasks.task import Example

CERTIFIED, GIVEN = "as certified", "as given, not certified"
"""Names of a way that is a whole steering, and not a direction alone."""
PENALTY = 3.0
"""Of the ridge probe that goes with the fitted directions; the default of `fit_error_probe`."""
LATENTS = ", SAE latents"
"""Ends the name of a way in SAE space."""
MOST_PROMPTS = 200
THRESHOLDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45),
    *(0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99),
)
"""What a slider stops at."""


@dataclass(frozen=True)
class Choices:
    """What is chosen in a panel."""

    way: str
    """Name of a way to steer; "" for none."""
    rule: Literal["threshold", "strength"] = "threshold"
    """MERA's rule, or a fixed length at every token."""
    threshold: float = 0.5
    """Predicted error up to which nothing is moved."""
    strength: float = 0.1
    """Length of the shift, in units of the layer's median residual norm."""
    layers: tuple[int, ...] = ()
    positions: Positions = "last"
    max_new_tokens: int = 24
    """Most tokens of a reply; 0 for none."""


@dataclass(frozen=True, eq=False)
class Bench:
    """A model and what it can be steered by."""

    model: Model
    ways: Mapping[str, Steering] = field(repr=False)
    options: tuple[str, ...] = ()
    prompts: tuple[str, ...] = field(default=(), repr=False)
    settings: ReadSettings = ReadSettings(progress=False)
    examples: Mapping[str, Example] = field(default_factory=dict, repr=False)
    """By prompt, where they are of a run: its scorers come with them."""
    lock: Any = field(default_factory=Lock, repr=False)
    """Hooks are put on the one model that all readers share, so one at a time runs it."""

    @property
    def scored(self) -> bool:
        """Whether whole replies are scored, instead of options answered."""
        return self.settings.readout == "reply"

    @property
    def start(self) -> Choices:
        """What a panel shows first: the certified or given steering where there is one.

        Its threshold is shown as the slider's nearest stop.
        """
        if not self.ways:
            return Choices("")
        name = next(iter(self.ways))
        way = self.ways[name]
        threshold = 0.5
        if name in (CERTIFIED, GIVEN) and isfinite(way.limit):
            limit = torch.tensor(way.limit, dtype=torch.float64)
            certified = float(torch.sigmoid(limit))  # in units of predicted error
            threshold = min(THRESHOLDS, key=lambda t: abs(t - certified))
        return Choices(name, threshold=threshold, layers=way.layer_numbers, positions=way.positions)

    def steering(self, choices: Choices) -> Steering | None:
        """Return the steering that choices describe; None for no way, or no layer.

        Until something is changed that is the certified or given one itself, whatever its rule and
        however its threshold lies between the slider's stops.

        Raises:
            ValueError: if the way has no SAE of a layer, or there is no such way.
        """
        if not choices.way or not choices.layers:
            return None
        if choices.way not in self.ways:
            raise ValueError(
                f"There is no way {choices.way!r}; choose among {', '.join(self.ways)}."
            )
        way = self.ways[choices.way]
        untouched = replace(self.start, max_new_tokens=choices.max_new_tokens)
        whole = choices.way in (CERTIFIED, GIVEN) and way.limit < inf
        if whole and choices == untouched:
            return way
        able = way.space.layers or range(way.probe.n_layers)
        layers = tuple(layer for layer in choices.layers if layer in able)
        if not layers:
            raise ValueError(
                f"{choices.way} acts in layers {', '.join(map(str, able))} only; choose one."
            )
        rule = Adaptive() if choices.rule == "threshold" else Additive(choices.strength)
        way = replace(way, rule=rule, layers=layers, positions=choices.positions)
        return way.at(choices.threshold) if choices.rule == "threshold" else way


def open_bench(
    model: Model | str | None = None,
    *,
    run: str | Path | None = None,
    steering: Steering | str | Path | None = None,
) -> Bench:
    """Gather a model and what it can be steered by.

    From a `run`'s folder: its certified steering, directions fitted to its training activations,
    prompts of its test split. From a `steering`: that one. From a model alone: replies only.

    Raises:
        ValueError: if nothing names a model, or run or steering belong to another one.
    """
    if run is not None:
        return _of_run(model, Path(run))
    if model is None:
        raise ValueError("There is no model; pass one, or the folder of a run.")
    model = load_model(model) if isinstance(model, str) else model
    check_model(model)
    if steering is None:
        return Bench(model, {})
    if not isinstance(steering, Steering):
        steering = load_steering(steering, model=model)
    steering.check(model)
    setup = getattr(steering.certificate, "setup", None) or {}
    settings = ReadSettings(progress=False, **(setup.get("readout") or {}))
    name = CERTIFIED if isinstance(steering.certificate, Calibration) else GIVEN
    return Bench(model, {name: steering}, tuple(setup.get("options", ())), (), settings)


def _of_run(model: Model | str | None, path: Path) -> Bench:
    folder = RunFolder.open(path)
    model = load_model(model) if isinstance(model, str) else model
    run = Run(folder.config, path, progress=False, load=None if model is None else lambda _: model)
    activations, ways = run.activations, {}
    steers = [w for w in folder.recommendation.ways if w.what == "steer" and w.certified]
    for best in steers[:1]:  # also where something else is recommended, such as to flip
        decision = Calibration.load(path / "certificates" / best.method, space=run.space)
        certified = decision.steering if decision.chosen in decision.steerings else None
        ways |= {} if certified is None else {CERTIFIED: certified}
    for space in (ResidualSpace(), _saes(run)):
        if space is not None:
            ways |= _fitted(activations, space)
    test = run.splits.test
    some = {example.prompt: example for example in test.examples[:MOST_PROMPTS]}
    return Bench(run.model, ways, test.options, tuple(some), run.read, some)


def _fitted(activations: Any, space: Space) -> dict[str, Steering]:
    """Fit a probe and every direction to training activations, as a space reads them."""
    fitted = ProbeSet.ridge(activations, PENALTY, KINDS, space=space)
    end = LATENTS if isinstance(space, SAESpace) else ""
    return {
        name + end: Steering(
            fitted.probe,
            direction=direction.vectors,
            space=space,
            layers=(fitted.probe.best_layer,),
            positions="last",
        )
        for name, direction in fitted.directions.items()
    }


def _saes(run: Run) -> SAESpace | None:
    """Return the SAEs of a run's model, where some are at hand."""
    source = run.config.sae or default_source(run.config.model)
    if source != "organism" and not Path(source).is_dir():
        return None
    return load_saes(source, "all", run.model, sibling=run.config.sae_sibling)
