"""Does a direction that reads errors also control them? Layer by layer, on a real model.

For every layer: how well a logistic probe reads errors there (AUROC on examples it has not seen),
and what is gained, on other examples again, by moving the final prompt token along each of four
directions of one length. *Reading*: the probe's weights. *Contrast*: the mean of wrong examples
minus the mean of right ones. *Control*: the mean gradient of log P(true option), the way that acts
most per unit of length to first order. *Random*: a draw, as a floor. They move every example, or
those where the probe predicts most error (as many as are wrong). Strengths are chosen on judging
examples, gains are those on test examples. Last: does the cosine of reading and control say in
which layers steering along the probe works?

Published on other models: errors decodable, and linear interventions without effect (arXiv
2605.05715); detection AUC 1.000 at a cosine of .12 to control, where the cosine does not predict
steerability (2606.24952); steerable and not decodable (2604.02608).

A gain of a shift that moves every example may only change how often each option is answered; the
accuracy of always giving the commonest answer stands beside it (`majority`). Killed, it goes on
with the direction that it was at.

    python -m experiments.reading_against_control --model smollm2 --data-dir data
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from mera_tl import (
    Additive,
    Gated,
    Steering,
    collect,
    evaluate_many,
    fit_direction,
    fit_error_probe,
    load_model,
    load_task,
    storage,
)
from mera_tl.inference import Outcomes, ReadSettings
from mera_tl.methods import log_odds_gradients
from mera_tl.models import Model
from mera_tl.tasks import Task

RESULTS = Path(__file__).parent / "results" / Path(__file__).stem
READ = ReadSettings(progress=False)
SETTINGS = ("seed", "fit", "judge", "test", "longest", "strengths")
DIRECTIONS = ("reading", "contrast", "control", "random")
RULES = ("every example", "where error is predicted")
FOLDERS = {"sms_spam": "sms_spam", "sentiment_analysis": "financial_phrasebank"}
FOLDERS |= {"yes_no_question": "boolq", "mmlu_high_school": "mmlu"}


@dataclass(frozen=True)
class Config:
    model: str = "organism"
    """A name or a folder."""
    tasks: tuple[str, ...] = ("spam_cue", "yesno_bias", "choice_hint", "sentiment_noise")
    data_dir: Path | None = None
    """With a folder for each data set: sms_spam, financial_phrasebank, boolq, mmlu."""
    every: int = 1
    """Every how many layers, the last always being one of them."""
    strengths: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Lengths of the shift, in units of the layer's median residual norm."""
    fit: int = 300
    judge: int = 150
    test: int = 300
    longest: int = 4000
    """Use the first rows of a data set only."""
    seed: int = 0


def main(config: Config) -> None:
    torch.set_num_threads(1)
    model = load_model(config.model)
    for task in config.tasks:
        path = RESULTS / f"{model.name}-{task}-{config.seed}.jsonl"
        rows = storage.read_records(path)
        lacking = [which for which in DIRECTIONS if which not in {r["direction"] for r in rows}]
        started = time.process_time()
        for some in cell(config, model, task, lacking):
            seconds = round(time.process_time() - started)
            rows += [row | {"cpu_seconds": seconds} for row in some]
            storage.write_records(path, rows)
            print(model.name, task, some[0]["direction"], f"{seconds} s so far", flush=True)


def cell(
    config: Config, model: Model, name: str, wanted: Sequence[str]
) -> Iterator[list[dict[str, Any]]]:
    """Return, direction by direction, one row per layer and rule."""
    if not wanted:
        return
    folder = None if config.data_dir is None else config.data_dir / FOLDERS[name]
    task = load_task(name, data_dir=folder)
    task = task.subset(range(min(len(task), config.longest)))
    sizes = {"train": config.fit, "calibration": config.judge, "test": config.test}
    splits = task.split(config.seed, **sizes)
    fit = collect(model, splits.train, settings=READ)
    judge = collect(model, splits.calibration, settings=READ)
    test = collect(model, splits.test, settings=READ)
    probe = fit_error_probe(fit, kind="logistic", seed=config.seed)
    gradients = log_odds_gradients(model, splits.train, fit.resid(), READ).gradients.mean(1)
    directions = {
        "reading": probe.weights,
        "contrast": fit_direction(fit, probe, "contrastive").vectors,
        "control": -gradients,
        "random": torch.randn(probe.weights.shape, generator=torch.Generator().manual_seed(0)),
    }
    cosine = torch.cosine_similarity(directions["reading"], directions["control"], dim=-1)
    limits = _limits(probe.score(judge.resid()), judge.outcomes)
    auroc = probe.measure(test)["auroc"].tolist()
    shares = np.bincount(test.labels.numpy(), minlength=len(task.options)) / len(splits.test)
    for which in wanted:
        trials = {
            (layer, rule, strength): _steering(
                probe, directions[which], rule, strength, layer, limits
            )
            for layer in range(model.n_layers - 1, -1, -config.every)
            for rule in RULES
            for strength in config.strengths
        }
        judged = _gains(model, splits.calibration, trials, judge.outcomes)
        # The strength is chosen where nothing is reported; ties go to the mildest.
        ranked = sorted(trials, key=lambda key: (-float(judged[key].mean()), key[2]))
        best = {key[:2]: trials[key] for key in reversed(ranked)}
        strength = {key[:2]: key[2] for key in reversed(ranked)}
        tested = _gains(model, splits.test, best, test.outcomes)
        yield [
            {
                "model": model.name,
                **{key: value for key, value in asdict(config).items() if key in SETTINGS},
                "task": name,
                "n_layers": model.n_layers,
                "layer": layer,
                "direction": which,
                "rule": rule,
                "strength": strength[layer, rule],
                "auroc": auroc[layer],
                "cosine": float(cosine[layer]),
                "base": test.outcomes.accuracy,
                "majority": float(shares.max()),
                "gain": float(gain.mean()),
                "standard_error": float(gain.std() / len(gain) ** 0.5),
                "n": len(gain),
            }
            for (layer, rule), gain in tested.items()
        ]


def _gains(
    model: Model, task: Task[Any], steerings: Mapping[Any, Steering], base: Outcomes
) -> dict[Any, Tensor]:
    runs = evaluate_many(model, task, list(steerings.values()), settings=READ, decide=True)
    gains = (run.gain(base, "correct").double() for run in runs)
    return dict(zip(steerings, gains, strict=True))


def _limits(score: Float[Tensor, "layer example"], outcomes: Outcomes) -> list[float]:
    """Return per layer the score that as many examples exceed as are wrong."""
    share = 1 - outcomes.accuracy
    return torch.quantile(score.float(), 1 - share, dim=1).tolist()


def _steering(
    probe: Any, vectors: Tensor, rule: str, strength: float, layer: int, limits: list[float]
) -> Steering:
    """Return a steering of the final prompt token in one layer, of one length whatever the rule."""
    unit = vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    scaled = unit * probe.resid_norm[:, None]
    how = Additive(strength) if rule == "every example" else Gated(limits[layer], strength)
    return Steering(probe, scaled, how, layers=(layer,), positions="final")


if __name__ == "__main__":
    main(tyro.cli(Config))
