"""Raw or SAE directions on a real model, under one search and one certificate.

SAEs of a few layers are trained offline on the task's own texts, none of them of the calibration or
the test split, and judged on those of the test split (explained variance, latents on per token,
share of dead ones). Then four ways to steer those
layers, each with a search on the same training examples, a certificate, and a test: *raw* and
*latents* by the default search in either space; *latents by effect*, a direction put together from
the latents whose decoder rows move log P(true option) most times how far errors move them; and
*latents by reading*, from those that go most with errors. Killed, it goes on with the next way.

    python -m experiments.sae_on_a_real_model
    python -m experiments.sae_on_a_real_model --model smollm2 --data-dir data/sms_spam \
        --task sms_spam --layers 8 17 26 --texts 1200 --train 200 --calibration 150 --test 200 \\
        --options.n-steps 600 --options.max-tokens 120000
"""

import time
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mera_tl import (
    Additive,
    SAESpace,
    Steering,
    calibrate,
    collect,
    evaluate,
    evaluate_many,
    fit_error_probe,
    load_model,
    load_saes,
    load_task,
    search,
    storage,
)
from mera_tl.inference import Activations, ReadSettings, spi
from mera_tl.methods import Choices, divide, log_odds_gradients
from mera_tl.models import Model, cache_folder
from mera_tl.sae import TrainOptions, reconstruction, train_saes
from mera_tl.tasks import Splits, Task

RESULTS = Path(__file__).parent / "results" / Path(__file__).stem
READ = ReadSettings(progress=False)


@dataclass(frozen=True)
class Config:
    model: str = "organism"
    """A name or a folder."""
    task: str = "spam_cue"
    data_dir: Path | None = None
    layers: tuple[int, ...] = (1, 2)
    options: TrainOptions = TrainOptions(
        architecture="topk", k=32, n_steps=400, max_tokens=40_000, expansion=4
    )
    texts: int | None = None
    """Rows outside calibration and test that the SAEs learn from; by default the training split."""
    few: int = 16
    """Latents in a direction that is put together from some."""
    strengths: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    """Lengths of its shift, in units of the layer's median residual norm."""
    train: int = 300
    calibration: int = 200
    test: int = 300
    longest: int = 4000
    """Use the first rows of the data only."""
    seed: int = 0


def main(config: Config) -> None:
    torch.set_num_threads(1)
    model = load_model(config.model, engine="transformer_lens")
    task = load_task(config.task, data_dir=config.data_dir)
    task = task.subset(range(min(len(task), config.longest)))
    sizes = {"train": config.train, "calibration": config.calibration, "test": config.test}
    splits = task.split(config.seed, **sizes)
    path = RESULTS / f"{model.name}-{config.task}-{config.seed}.jsonl"
    rows = storage.read_records(path)
    space = load_saes(str(trained(config, model, task, splits)), config.layers, model)
    for row in cell(config, model, splits, space, [row.get("way") for row in rows]):
        rows.append({"model": model.name, "task": config.task, "seed": config.seed, **row})
        print(rows[-1], flush=True)
        storage.write_records(path, rows)


def trained(config: Config, model: Model, task: Task[Any], splits: Splits) -> Path:
    """Train the SAEs, or find them, of other texts than those that certify and test."""
    learned_from = splits.train
    if config.texts is not None:
        others = {e.row for part in (splits.calibration, splits.test) for e in part.examples}
        free = [i for i, each in enumerate(task.examples) if each.row not in others]
        learned_from = task.subset(free[: config.texts])
    told = storage.fingerprint([asdict(config.options), learned_from.data_hash, config.layers])
    folder = cache_folder() / "sae_on_a_real_model" / f"{model.fingerprint}-{told}"
    if not (folder / f"layer_{config.layers[-1]}").exists():
        train_saes(model, learned_from, config.layers, folder, options=config.options)
    return folder


def cell(
    config: Config, model: Model, splits: Splits, space: SAESpace, known: Container[str | None]
) -> Iterator[dict[str, Any]]:
    """Judge the SAEs, then search, certify and test every way that is not known."""
    if None not in known:
        measured = reconstruction(model, splits.test, space, settings=READ).to_dict("records")
        yield from ({"what": "sae", "d_sae": space.d_sae, **row} for row in measured)
    train = collect(model, splits.train, settings=READ)
    base = evaluate(model, splits.test, settings=READ)
    for way, found in ways(config, model, splits, train, space):
        if way in known:
            continue
        started = time.process_time()
        steering = found()
        decision = calibrate(model, splits.calibration, steering, settings=READ)
        after = base
        if decision.steering is not None:
            after = evaluate(model, splits.test, decision.fwd_hooks(), settings=READ)
        yield {
            "what": "steering",
            "way": way,
            "decision": decision.decision.value,
            "certified_gain": None if decision.abstained else decision.promised,
            "calibration_gain": decision.best.gain,
            "base": base.accuracy,
            "accuracy": after.accuracy,
            "spi": spi(after.accuracy, base.accuracy),
            "n_test": len(base),
            "cpu_seconds": round(time.process_time() - started),
        }


def ways(
    config: Config, model: Model, splits: Splits, train: Activations, space: SAESpace
) -> Iterator[tuple[str, Any]]:
    """Return the ways to steer, each as a function that searches on training examples."""
    choices = Choices(layers=tuple((layer,) for layer in config.layers), seed=config.seed)
    for way, where in (("raw", {}), ("latents", {"space": space})):
        yield (
            way,
            lambda where=where: (
                search(model, splits.train, train, choices=choices, settings=READ, **where).steering
            ),
        )
    for way in ("effect", "reading"):
        yield f"latents by {way}", lambda way=way: _few(config, model, splits, train, space, way)


def _few(
    config: Config, model: Model, splits: Splits, train: Activations, space: SAESpace, way: str
) -> Steering:
    """Put a direction together from a few latents, and choose its layer and length."""
    fit, judge = divide(splits.train, 1 / 3, config.seed)
    fitted = train.subset(torch.tensor(fit))
    probe = fit_error_probe(fitted, kind="logistic", seed=config.seed)
    gradients = log_odds_gradients(model, splits.train.subset(fit), fitted.resid(), READ).gradients
    vectors = torch.zeros_like(probe.weights)
    for layer in config.layers:
        wanted = _latents(space, layer, fitted, gradients[layer].mean(0), way, config.few)
        vectors[layer] = space.decode(wanted, layer)
    steering = Steering(probe, vectors, Additive(0.0), positions="final")
    trials = [
        replace(steering, rule=Additive(strength), layers=(layer,))
        for layer in config.layers
        for strength in config.strengths
    ]
    held_out = train.subset(torch.tensor(judge)).outcomes
    runs = evaluate_many(model, splits.train.subset(judge), trials, settings=READ)
    gains = [float(run.gain(held_out, "correct").mean()) for run in runs]
    return trials[gains.index(max(gains))]


def _latents(
    space: SAESpace,
    layer: int,
    fitted: Activations,
    gradient: Float[Tensor, " d_model"],
    way: str,
    few: int,
) -> Float[Tensor, " d_sae"]:
    """Return a direction in latents that is not zero in `few` of them; it points to error."""
    latents = space.read(fitted.resid()[layer], layer)
    wrong = (~fitted.correct).float()
    # How far errors go together with a latent, in units of its spread.
    spread = latents.std(0).clamp(min=1e-6)
    score = (latents - latents.mean(0)).T @ (wrong - wrong.mean()) / len(wrong) / spread
    if way == "effect":
        # What a latent's decoder row does to log P(true option), to first order: the sign is that
        # of harm, since a direction points to error.
        rows = torch.eye(space.d_sae)
        decoded = torch.cat([space.decode(part, layer) for part in rows.split(256)])
        score = -einsum(decoded, gradient, "latent d, d -> latent") * spread
    kept = score.abs().topk(few).indices
    return torch.zeros_like(score).scatter(0, kept, score[kept])


if __name__ == "__main__":
    main(tyro.cli(Config))
