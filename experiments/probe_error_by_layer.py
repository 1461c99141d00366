"""In which layer, at which token and by which probe can a model's errors be read?

All kinds and penalties on every layer, at the final prompt token and at the answer token, on the
stream and on SAE latents where there are SAEs: chosen on shared folds of the training examples,
reported on test examples that no fold has seen, beside a control task of shuffled targets. Then
one ridge probe per layer and token position, the predicted error beside the observed one, and
probes of one task measured on the others. Expected: errors are read well above the dummy from the
early layers on, latents read them about as well as the stream; hardly anything transfers. Half a
minute of processor time for the organism, two minutes for sms-llama.

Found: so it is on four planted tasks (AUROC .7 to 1), where reading at the answer token is better
on two of them and worse on one; between tasks most probes are near chance, some far below it.

    python -m experiments.probe_error_by_layer --tasks yesno_hint spam_cue
    python -m experiments.probe_error_by_layer --model .../sms-llama --tasks sms_spam --rows 3500 \
        --data-dir ... --template .../prompt_template.txt
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from einops import rearrange

import mera_tl
from mera_tl.inference import Activations, ReadSettings, left_pad
from mera_tl.models import resid_post
from mera_tl.probes import (
    Examples,
    LinearProbe,
    fit_error_probe,
    fit_grid,
    held_out_table,
    metrics,
    probe_path,
    read_examples,
)
from mera_tl.sae import MIN_FIRING, load_saes
from mera_tl.storage import fingerprint, write_records

RESULTS = Path(__file__).parent / "results" / "probe_error_by_layer"
RIDGE = (0.01, 0.1, 1.0, 3.0, 10.0)
READ = ReadSettings("exact", progress=False)
"""Only a readout that decodes has an answer token to read at."""
LATENTS = {"ridge": RIDGE, "logistic": (1.0,)}


@dataclass(frozen=True)
class Config:
    model: str = "organism"
    tasks: tuple[str, ...] = ("yesno_hint", "spam_cue", "sentiment_fan", "choice_hint")
    others: tuple[str, ...] = ("yesno_bias", "spam_hint", "sentiment_hint", "sentiment_noise")
    """Tasks that probes are also transferred to and from."""
    data_dir: str | None = None
    template: str | None = None
    rows: int | None = None
    """Use the first rows only: a model may have been trained on the others."""
    n: int = 600
    """Examples to fit and choose on."""
    n_test: int = 400
    """Examples to report on."""
    positions: tuple[str, ...] = ("last", "exact")
    n_back: int = 12
    """Prompt tokens to read at, counted back from the final one."""
    saes: str | None = "organism"
    seed: int = 0


@dataclass(frozen=True)
class Read:
    """A task, and what was collected of its two splits."""

    splits: Any
    train: Activations
    test: Activations


def read(config: Config, model: mera_tl.Model, name: str) -> Read:
    task = mera_tl.load_task(name, data_dir=config.data_dir, template=config.template)
    if config.rows is not None:
        task = task.subset([i for i, e in enumerate(task.examples) if e.row < config.rows])
    splits = task.split(
        train=config.n, calibration=min(100, config.n), test=config.n_test, seed=config.seed
    )
    parts = (splits.train, splits.test)
    return Read(splits, *(mera_tl.collect(model, part, settings=READ) for part in parts))


def by_layer(config: Config, model: mera_tl.Model, each: Read) -> pd.DataFrame:
    """Score every kind and penalty in every layer, on the stream and on latents."""
    where = {"positions": config.positions, "seed": config.seed}
    rows = probe_path(each.train, untouched=each.test, **where).assign(features="raw")
    control = selectivity(each.train, seed=config.seed)
    names = ["layer", "kind", "penalty"]
    rows = rows.merge(control[[*names, "auroc_control", "r2_control"]], on=names, how="left")
    if config.saes is None:
        return rows
    space = load_saes(config.saes, "all", model)
    train, test = latents(space, each.train, each.test)
    found = probe_path(train, untouched=test, grid=LATENTS, **where).assign(features="sae")
    found["layer"] = [space.layers[i] for i in found["layer"]]
    return pd.concat([rows, found])


def selectivity(activations: Activations, *, seed: int) -> pd.DataFrame:
    """Compare each probe with one fitted to a control task, the same targets shuffled.

    What a probe reads beyond its control is in the activations and not in the probe's capacity
    (Hewitt and Liang, 2019).
    """
    examples = read_examples(activations, "last")
    tables = []
    for each in (examples, examples.shuffled(seed)):
        fits = fit_grid(each, {"ridge": (3.0,)}, clip=0.01, seed=seed, refit=False)
        tables.append(held_out_table(each, fits, clip=0.01, seed=seed))
    table, control = tables
    return table.assign(auroc_control=control["auroc"], r2_control=control["r2"])


def transfer(probes: Mapping[str, LinearProbe], tasks: Mapping[str, Activations]) -> pd.DataFrame:
    """Measure every probe on every task, at the probe's best layer."""
    rows = []
    for fitted_on, probe in probes.items():
        for measured_on, activations in tasks.items():
            row = probe.measure(activations).loc[probe.best_layer].to_dict()
            rows.append({"fitted_on": fitted_on, "measured_on": measured_on, **row})
    return pd.DataFrame(rows)


def latents(space: Any, train: Activations, test: Activations) -> list[Activations]:
    """Put the latents that fire often enough in training in place of the activations."""

    def encode(kept: Activations, position: Any) -> torch.Tensor:
        resid = kept.resid(position)
        return torch.stack([space.read(resid[layer], layer) for layer in space.layers], dim=1)

    often = {p: (encode(train, p) > 0).sum(0) >= MIN_FIRING for p in train.by_position}
    return [
        replace(part, by_position={p: encode(part, p) * often[p] for p in part.by_position})
        for part in (train, test)
    ]


def by_token(config: Config, model: mera_tl.Model, each: Read) -> pd.DataFrame:
    """Fit one ridge probe per layer and token position; report it on the test examples."""
    train, test = (tokens(config, model, part) for part in each.splits[::2])
    parts = []
    for resid, kept in ((train, each.train), (test, each.test)):
        flat = rearrange(resid, "layer example pos d -> (layer pos) example d")
        parts.append(Examples(flat, kept.error, ~kept.correct))
    fits = fit_grid(parts[0], {"ridge": (1.0,)}, clip=0.01, seed=config.seed)
    score = fits.score(parts[1].resid.double(), -1)[:, 0]
    auroc = metrics.auroc(score, parts[1].incorrect).view(len(train), -1)
    places = [(i, pos) for i in range(len(auroc)) for pos in range(auroc.shape[1])]
    rows = [{"layer": i, "position": p + 1 - auroc.shape[1], "auroc": auroc[i, p].item()}
            for i, p in places]  # fmt: skip
    return pd.DataFrame(rows)


@torch.no_grad()
def tokens(config: Config, model: mera_tl.Model, task: Any) -> torch.Tensor:
    """Return "layer example pos d_model" at the final prompt tokens."""
    prompts = model.tokenize([example.prompt for example in task.examples])
    n_back, batches = min(config.n_back, *map(len, prompts)), []
    for start in range(0, len(prompts), 100):
        ids, mask = left_pad(prompts[start : start + 100], model.device)
        kept: dict[int, torch.Tensor] = {}

        def keep(resid: Any, hook: Any, kept: Any = kept) -> None:
            kept[hook.layer()] = resid[:, -n_back:].float()

        hooks = [(resid_post(layer), keep) for layer in range(model.n_layers)]
        model.hooked.run_with_hooks(ids, attention_mask=mask, fwd_hooks=hooks)
        batches.append(torch.stack([kept[layer] for layer in sorted(kept)]))
    return torch.cat(batches, dim=1)


def observed(config: Config, each: Read, n_bins: int = 10) -> pd.DataFrame:
    """Put predicted beside observed error on test examples, in tenths of equal size."""
    probe = fit_error_probe(each.train, penalty=RIDGE, seed=config.seed)
    layer = probe.best_layer
    frame = pd.DataFrame(
        {
            "predicted": probe.predicted_error(each.test.resid("last"))[layer].tolist(),
            "observed": each.test.error.tolist(),
            "incorrect": (~each.test.correct).double().tolist(),
        }
    )
    bins = frame.groupby(frame["predicted"].rank(method="first") * n_bins // (len(frame) + 1))
    return bins.mean().assign(n_bin=bins.size(), spread=bins["observed"].std(), layer=layer)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    model = mera_tl.load_model(config.model)
    name, reads = Path(config.model).name, {}
    tables: dict[str, list[pd.DataFrame]] = {k: [] for k in ("layers", "tokens", "observed")}
    for task in config.tasks:
        reads[task] = each = read(config, model, task)
        of = {"model": name, "task": task, "n": config.n, "n_test": config.n_test}
        accuracy = {"accuracy_test": each.test.outcomes.accuracy}
        tables["layers"].append(by_layer(config, model, each).assign(**of, **accuracy))
        tables["tokens"].append(by_token(config, model, each).assign(**of))
        tables["observed"].append(observed(config, each).assign(**of))
        print(task, flush=True)
    if len(config.tasks) > 1:
        reads |= {task: read(config, model, task) for task in config.others}
        tables["transfer"] = [moved(config, reads).assign(model=name, n_test=config.n_test)]
    for kind, frames in tables.items():
        write(config, kind, pd.concat(frames))


def moved(config: Config, reads: Mapping[str, Read]) -> pd.DataFrame:
    """Measure every task's ridge probe on every task, at its own best layer."""
    fitted = {
        t: fit_error_probe(r.train, penalty=RIDGE, seed=config.seed) for t, r in reads.items()
    }
    return transfer(fitted, {task: each.test for task, each in reads.items()})


def write(config: Config, kind: str, frame: pd.DataFrame) -> None:
    paths = {"model": Path(config.model).name, "data_dir": None, "template": None}
    path = RESULTS / f"{kind}-{fingerprint(asdict(config) | paths)}.jsonl"
    frame = frame[[column for column in frame if "mse" not in column or "rmse" in column]]
    rows = frame.round(4).astype(object).where(frame.notna(), None)
    write_records(path, rows.to_dict("records"))
    print(path.name)


if __name__ == "__main__":
    main(tyro.cli(Config))
