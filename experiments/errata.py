"""What does each error of the published code cost, turned on alone?

The base is MERA with the regression probe as in this package (`none`). Each switch puts back one
error of the published code and is compared with the arm that lacks only it. Measured on untouched
test examples: SPI, whether a threshold was certified, and harm. Expected: without a test it steers
almost always and harms often; with scores and limits on different scales, a limit means nothing.

Not here are errors that crash or give NaN (an all-zero lasso, targets that round to infinity), that
change what is reported of a probe and not what is steered (choosing on the reported split, AUROC of
hard predictions), or that change the task itself (label tokens); and "no answer is no error", since
every prompt is answered unsteered.

Half a minute a task and seed on one core; add --model and its data for a Hugging Face folder.

    python -m experiments.errata
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

import mera_tl
from mera_tl import storage
from mera_tl.benchmark import scores
from mera_tl.certificate import PAPER_THRESHOLDS, calibrate, certify
from mera_tl.inference import ReadSettings
from mera_tl.probes import LinearProbe, fit_ranked_probe
from mera_tl.steering import Additive
from mera_tl.tasks import Splits

RESULTS = Path(__file__).parent / "results" / Path(__file__).stem
ORGANISM_TASKS = (
    "spam_cue", "spam_hint", "yesno_bias", "yesno_hint", "sentiment_fan", "sentiment_hint",
    "choice_hint", "sentiment_quick", "sentiment_noise", "choice_unknown",
)  # fmt: skip
QUIET = ReadSettings("exact", progress=False, batch_size=100)
"""As published: the reply is decoded, so that there is a generated token to read."""


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
    """One error of the published code, or an arm that errors are compared with."""

    against: str = "none"
    kind: str = "ridge"
    position: str = "last"
    """Where the probe reads."""
    hook: str = "hook_resid_post"
    """Where probes read and rules write, in each block."""
    change: Callable[[LinearProbe], LinearProbe] = lambda probe: probe
    layers: object = "best"
    test: bool = True
    """Deploy what is certified, not the best gain observed."""
    deployed: str = "last"
    """Positions that are steered on the test examples."""
    additive: bool = False
    """Move every token by a fixed length; nothing is calibrated."""


SWITCHES = {
    "none": Switch(),
    "hooks the normalised MLP input": Switch(hook="ln2.hook_normalized"),
    "probe reads the first generated token": Switch(position="exact"),
    "score and limit on two scales": Switch(change=squashed),
    "no test: best gain on calibration, ties count": Switch(test=False),
    "no intercept": Switch(change=no_intercept),
    "least squares, unregularised": Switch(kind="least_squares"),
    "best layer is layer 0": Switch(layers=(0,)),
    "scored on other tokens than steered": Switch(deployed="all"),
    "logistic": Switch(kind="logistic"),
    "logistic predicts correctness": Switch("logistic", kind="logistic", change=flipped),
    "contrastive": Switch(kind="contrastive"),
    "contrastive, toward correct": Switch("contrastive", kind="contrastive", change=flipped),
    "additive": Switch(additive=True),
    "additive methods share one probe": Switch("additive", kind="median", additive=True),
}


class Arms:
    """All switches on one split."""

    def __init__(self, model: mera_tl.Model, splits: Splits, seed: int) -> None:
        self.model, self.splits, self.seed = model, splits, seed
        self.activations = mera_tl.collect(model, splits.train, settings=QUIET)
        self.mlp_inputs = replace(
            self.activations, by_position={"last": mlp_inputs(model, splits.train)}
        )
        self.base = self.evaluate(splits.test, [])
        self.calibration_base = self.evaluate(splits.calibration, [])

    def evaluate(self, task: mera_tl.Task, hooks: list) -> mera_tl.Outcomes:
        return mera_tl.evaluate(self.model, task, hooks, settings=QUIET)

    def steering(self, switch: Switch) -> mera_tl.Steering:
        in_stream = switch.hook == "hook_resid_post"
        seen = self.activations if in_stream else self.mlp_inputs
        if switch.kind == "median":
            probe = fit_ranked_probe(seen, "median", seed=self.seed)
        else:
            where = {"position": switch.position, "seed": self.seed}
            probe = mera_tl.fit_error_probe(seen, kind=switch.kind, **where)
        probe = switch.change(probe)
        return mera_tl.Steering(probe, layers=switch.layers, positions="last")

    def decide(self, switch: Switch, steering: mera_tl.Steering) -> mera_tl.Calibration:
        task, thresholds = self.splits.calibration, PAPER_THRESHOLDS[:-1]
        steerings = [steering.at(threshold) for threshold in thresholds]
        if switch.hook == "hook_resid_post":
            return calibrate(self.model, task, steerings, settings=QUIET)
        runs = [self.evaluate(task, hooks_at(switch, steered)) for steered in steerings]
        gains = np.stack([run.gain(self.calibration_base, "correct").numpy() for run in runs])
        return certify(gains, candidates=thresholds)

    def record(self, switch: Switch) -> dict:
        steering = self.steering(switch)
        deployed = replace(steering, positions=switch.deployed)
        if switch.additive:
            rule = Additive(0.1)
            hooks, decided = replace(steering, rule=rule, positions="all").fwd_hooks(), {}
        else:
            decision = self.decide(switch, steering)
            threshold = decision.threshold
            decided = {"threshold": threshold, "certified": threshold is not None}
            if not switch.test:
                best = max(decision.evidence, key=lambda row: row.gain)
                decided["threshold"] = threshold = best.threshold if best.gain >= 0 else None
            hooks = [] if threshold is None else hooks_at(switch, deployed.at(threshold))
        steered = self.evaluate(self.splits.test, hooks) if hooks else self.base
        found = scores(steered, self.base)
        return decided | {k: found[k] for k in ("n", "accuracy", "spi", "transitions", "p_value")}


def hooks_at(switch: Switch, steering: mera_tl.Steering) -> list:
    """Return the steering's hooks, put where the switch wants them."""
    return [(name.replace("hook_resid_post", switch.hook), h) for name, h in steering.fwd_hooks()]


def mlp_inputs(model: mera_tl.Model, task: mera_tl.Task) -> torch.Tensor:
    """Return the normalised MLP inputs of every layer at the final prompt token."""
    kept, once = (
        torch.zeros(len(task), model.n_layers, model.d_model),
        replace(QUIET, readout="last"),
    )

    def keep(layer: int, i: int) -> Callable:
        def hook_function(normalised: torch.Tensor, hook: object) -> None:  # noqa: ARG001
            kept[i, layer] = normalised[0, -1].float()

        return hook_function

    for i in range(len(task)):
        hooks = [(f"blocks.{k}.ln2.hook_normalized", keep(k, i)) for k in range(model.n_layers)]
        mera_tl.evaluate(model, task.subset([i]), hooks, settings=once)
    return kept


def run(config: Config, model: mera_tl.Model, task: str, seed: int) -> list[dict]:
    whole = mera_tl.load_task(task, data_dir=config.data_dir, template=config.template)
    sizes = {"train": config.train, "calibration": config.calibration, "test": config.test}
    arms, rows = Arms(model, whole.split(seed, **sizes), seed), []
    for name, switch in SWITCHES.items():
        place = {"model": model.name, "task": task, "seed": seed}
        rows.append(place | {"switch": name, "against": switch.against} | arms.record(switch))
    return rows


def main(config: Config) -> None:
    torch.set_num_threads(1)
    model = mera_tl.load_model(config.model)
    path, records = RESULTS / f"{model.name}.jsonl", []
    for task in config.tasks:
        for seed in config.seeds:
            records += run(config, model, task, seed)
            storage.write_records(path, records)
            print(task, seed, [round(r["spi"], 2) for r in records[-len(SWITCHES) :]], flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
