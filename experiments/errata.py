"""What does each error of the published code cost, turned on alone?

The base is MERA with the regression probe as in this package (`none`). Each switch puts back one
error of the published code; the errors are listed in `SWITCHES`. Measured on untouched test
examples: SPI, whether a threshold was certified, and harm. Expected: without a test it steers
almost always and harms often; with the scores and limits on different scales, a limit means
nothing. Ten minutes on one core; add --model and its data for a Hugging Face folder.

    python -m experiments.errata
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

import mera_tl
from mera_tl import store
from mera_tl.benchmark import scores
from mera_tl.gains import calibrate
from mera_tl.probes import LinearProbe
from mera_tl.protocol import PAPER_THRESHOLDS, Protocol
from mera_tl.readout import ReadSettings

RESULTS = Path(__file__).parent / "results" / Path(__file__).stem
ORGANISM_TASKS = (
    "spam_cue", "spam_hint", "yesno_bias", "yesno_hint", "sentiment_fan", "sentiment_hint",
    "choice_hint", "sentiment_quick", "sentiment_noise", "choice_unknown",
)  # fmt: skip
QUIET = ReadSettings(progress=False, batch_size=100)


@dataclass(frozen=True)
class Config:
    model: str = "organism"
    tasks: tuple[str, ...] = ORGANISM_TASKS
    seeds: tuple[int, ...] = (0,)
    train: str = "600"
    calibration: str = "250"
    test: str = "250"
    data_dir: str | None = None
    template: str | None = None


def squashed(probe: LinearProbe) -> LinearProbe:
    """Put sigmoid(w.h), to first order, where log-odds belong: it was compared with a logit."""
    return replace(probe, weights=probe.weights / 4, bias=probe.bias / 4 + 0.5)


def flipped(probe: LinearProbe) -> LinearProbe:
    return replace(probe, weights=-probe.weights, bias=-probe.bias)


def no_intercept(probe: LinearProbe) -> LinearProbe:
    return replace(probe, bias=torch.zeros_like(probe.bias))


@dataclass(frozen=True)
class Switch:
    """One error of the published code."""

    kind: str = "ridge"
    change: Callable[[LinearProbe], LinearProbe] = lambda probe: probe
    layers: object = "best"
    test: bool = True


SWITCHES = {
    "none": Switch(),
    "no test: best gain on calibration, ties count (8)": Switch(test=False),
    "score and limit on two scales (4)": Switch(change=squashed),
    "no intercept (9)": Switch(change=no_intercept),
    "contrastive": Switch(kind="contrastive"),
    "contrastive, toward correct (6)": Switch(kind="contrastive", change=flipped),
    "logistic": Switch(kind="logistic"),
    "logistic, predicts correctness (5)": Switch(kind="logistic", change=flipped),
    "best layer is layer 0 (11)": Switch(layers=(0,)),
    "least squares, unregularised (9)": Switch(kind="least_squares"),
}


def run(config: Config, model: mera_tl.Model, task: str, seed: int) -> list[dict]:
    whole = mera_tl.load_task(task, data_dir=config.data_dir, template=config.template)
    sizes = {"train": config.train, "calibration": config.calibration, "test": config.test}
    splits = whole.split(seed, **sizes)
    activations = mera_tl.collect(model, splits.train, settings=QUIET)
    base = mera_tl.evaluate(model, splits.test, settings=QUIET)
    protocol, rows = Protocol(thresholds=PAPER_THRESHOLDS[:-1]), []
    for name, switch in SWITCHES.items():
        probe = switch.change(mera_tl.fit_error_probe(activations, kind=switch.kind, seed=seed))
        steering = mera_tl.Steering(probe, layers=switch.layers, positions="last")
        decision = calibrate(model, splits.calibration, steering, protocol=protocol, settings=QUIET)
        threshold = decision.threshold
        if not switch.test:
            best = max(decision.evidence, key=lambda row: row.gain)
            threshold = best.threshold if best.gain >= 0 else None
        hooks = [] if threshold is None else steering.at(threshold).fwd_hooks()
        steered = mera_tl.evaluate(model, splits.test, hooks, settings=QUIET) if hooks else base
        found = scores(steered, base)
        rows.append(
            {"model": model.name, "task": task, "seed": seed, "switch": name}
            | {"threshold": threshold, "certified": decision.threshold is not None}
            | {k: found[k] for k in ("n", "accuracy", "spi", "transitions", "p_value")}
        )
    return rows


def main(config: Config) -> None:
    torch.set_num_threads(1)
    model = mera_tl.load_model(config.model)
    path, records = RESULTS / f"{model.name}.jsonl", []
    for task in config.tasks:
        for seed in config.seeds:
            records += run(config, model, task, seed)
            store.write_records(path, records)
            print(task, seed, [round(r["spi"], 2) for r in records[-len(SWITCHES) :]], flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
