"""What does a steering do to tasks that it was not made for?

A steering is searched and certified for one task, and put on that task's test split and on four
other tasks, which lm-evaluation-harness reads as multiple choice, unsteered and steered, with
paired 95 % intervals. Where the certificate abstains, what was searched is put on anyway, and the
record says so. Expected: the gain on its own task; on others nothing where the probe stays silent,
and harm where it fires on prompts that it was not fitted on. Run time: a minute and a half of
processor time on the organism. A real model takes a folder and its tasks; none has been run yet:

    python -m experiments.side_effects
    python -m experiments.side_effects --model smollm2 --data-dir data --sources sms_spam
        --tasks sms_spam sentiment_analysis yes_no_question mmlu_high_school truthfulqa
        --train 120 --calibration 60 --test 30 --directions controlled_contrastive pattern
        --layers 7 14 21 28
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro

from mera_tl import calibrate, load_model, load_task, search, storage
from mera_tl.evals import compare_on_tasks
from mera_tl.inference import ReadSettings
from mera_tl.methods import Choices
from mera_tl.steering import KINDS

RESULTS = Path(__file__).parent / "results" / Path(__file__).stem
ORGANISM = ("spam_cue", "sentiment_fan", "yesno_bias", "choice_hint", "yesno_hint")


@dataclass(frozen=True)
class Config:
    model: str = "organism"
    tasks: tuple[str, ...] = ORGANISM
    sources: tuple[str, ...] = ORGANISM
    """Tasks that a steering is certified for."""
    data_dir: Path | None = None
    seed: int = 0
    train: int = 900
    calibration: int = 400
    test: int = 300
    directions: tuple[str, ...] = KINDS
    """What the search tries."""
    layers: tuple[int, ...] | None = None
    """One at a time. Default: single layers, ranges, and all."""


def main(config: Config) -> None:
    torch.set_num_threads(1)
    model = load_model(config.model, device="cpu")
    told = asdict(config) | {"model": model.name, "data_dir": None}
    path = RESULTS / f"{storage.fingerprint(json.loads(json.dumps(told)))}.jsonl"
    records = storage.read_records(path)
    for source in config.sources:
        done = {record["task"] for record in records if record["source"] == source}
        started = time.process_time()
        for record in across(config, model, source, [t for t in config.tasks if t not in done]):
            records.append(record)
            storage.write_records(path, records)
        print(model.name, source, f"{time.process_time() - started:.0f} s", flush=True)


def across(
    config: Config, model: Any, source: str, targets: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Certify a steering for one task, and compare others with and without it."""
    if not targets:
        return
    sizes = {"train": config.train, "calibration": config.calibration, "test": config.test}
    splits = {
        name: load_task(name, data_dir=config.data_dir).split(config.seed, **sizes)
        for name in config.tasks
    }
    read = ReadSettings(progress=False)
    train, calibration, _ = splits[source]
    layers = config.layers and tuple((layer,) for layer in config.layers)
    choices = Choices(directions=config.directions, layers=layers, seed=config.seed)
    found = search(model, train, choices=choices, settings=read)
    decision = calibrate(model, calibration, found.steering, settings=read)
    steering = decision.steering or found.steering
    for task in targets:
        with TemporaryDirectory() as folder:
            file = write_task(Path(folder), task, splits[task].test)
            (effect,) = compare_on_tasks(model, steering, [str(file)], settings=read)
        place = {"model": model.name, "seed": config.seed, "source": source, "task": task}
        about = {"certified": not decision.abstained, "steering": repr(steering)}
        shown = asdict(effect) | {"difference": effect.difference, "task": task}
        yield place | about | shown


def write_task(folder: Path, name: str, task: Any) -> Path:
    """Write a split as a task of lm-evaluation-harness: prompts, options, the right one."""
    rows = [
        {"prompt": example.prompt, "choices": list(example.options), "label": example.label}
        for example in task.examples
    ]
    storage.write_records(folder / "rows.jsonl", rows)
    lines = [
        f"task: {name}",
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}",
        "test_split: test",
        "output_type: multiple_choice",
        'doc_to_text: "{{prompt}}"',
        'doc_to_choice: "{{choices}}"',
        "doc_to_target: label",
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]",
    ]
    storage.write_text(folder / f"{name}.yaml", "\n".join(lines) + "\n")
    return folder / f"{name}.yaml"


if __name__ == "__main__":
    main(tyro.cli(Config))
