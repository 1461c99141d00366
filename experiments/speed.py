"""How fast is the work that people wait for: a search, evaluating, collecting, on three models?

CPU seconds of this process on one thread, and for evaluating and collecting the ratio to the floor
of the same run: plain Hugging Face, the prompts once (readout `options`) or greedy decoding of up
to 8 tokens (`exact`), sorted by length, in batches of the same number of tokens. A search is one
`mera_tl.search` on collected activations; its record says how well gains were foreseen.

    python -m experiments.speed --sms-llama M --smollm2 M2 --data-dir D --template F

Expected: organism <= 6 s, sms-llama <= 60 s, SmolLM2 <= 8 minutes; evaluate and collect <= 1.10.
Without a folder a model's rows are left out. About 10 minutes.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

import mera_tl
from mera_tl import storage
from mera_tl.inference import ReadSettings, tokenize_task
from mera_tl.methods import search

Readout = Any


@dataclass(frozen=True)
class Config:
    sms_llama: str | None = None
    """Local Hugging Face folder."""
    smollm2: str | None = None
    """Local Hugging Face folder of a chat model."""
    data_dir: str | None = None
    """Where the SMS collection lies."""
    template: str | None = None
    """The prompt that sms-llama was trained on."""
    n_floor: int = 300
    """Prompts that are evaluated and collected beside Hugging Face."""
    repeats: int = 2
    out: Path = Path("experiments/results/speed.jsonl")


def cpu_seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Return the least CPU time of a few repeats."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def searching(name: str, model: Any, train: Any, read: ReadSettings) -> Iterator[dict[str, Any]]:
    activations = mera_tl.collect(model, train, settings=read)
    found: list[Any] = []
    seconds = cpu_seconds(lambda: found.append(search(model, train, activations, settings=read)))
    details = found[0].details
    yield {
        "what": f"search, {name}, {read.readout}",
        "n": f"{details['n_fit']} + {details['n_search']}",
        "candidates": details["n_candidates"],
        "cpu_s": round(seconds, 1),
        "foresight": details["foresight"],
    }


def floor(folder: str, prompts: list[list[int]], n_new: int, tokens: int) -> Callable[[], None]:
    """Return plain Hugging Face on these prompts: one pass, or greedy generation."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    order, start, batches = sorted(prompts, key=lambda p: -len(p)), 0, []
    while start < len(order):
        size = max(1, tokens // len(order[start]))
        batches.append(order[start : start + size])
        start += size

    def run() -> None:
        for batch in batches:
            width = len(batch[0])
            ids = torch.tensor([[0] * (width - len(p)) + p for p in batch])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
            with torch.inference_mode():
                if n_new:
                    options = {"max_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}
                    model.generate(ids, attention_mask=mask, **options)
                else:
                    model(ids, attention_mask=mask, logits_to_keep=1)

    return run


def beside_hugging_face(config: Config, model: Any, task: Any) -> Iterator[dict[str, Any]]:
    for readout, n_new in (("options", 0), ("exact", 8)):
        read = ReadSettings(readout=readout, progress=False)  # pyright: ignore[reportArgumentType]
        prompts = tokenize_task(model, task, read)
        work: dict[str, Callable[[], object]] = {
            "hugging face": floor(str(config.sms_llama), prompts, n_new, read.batch_tokens),
            "evaluate": lambda read=read: mera_tl.evaluate(model, task, settings=read),
            "collect": lambda read=read: mera_tl.collect(model, task, settings=read),
        }
        base = 0.0
        for name, function in work.items():
            seconds = cpu_seconds(function, config.repeats)
            base = base or seconds
            about = {"what": f"{name}, sms-llama, {readout}", "n": len(task)}
            yield about | {"cpu_s": round(seconds, 2), "of_floor": round(seconds / base, 3)}


def rows(config: Config) -> Iterator[dict[str, Any]]:
    quiet = ReadSettings(progress=False)
    exact = ReadSettings(readout="exact", progress=False)
    train = mera_tl.load_task("spam_cue").split(0, train=1500, calibration=100, test=100).train
    yield from searching("organism", mera_tl.load_model("organism", device="cpu"), train, quiet)
    if config.sms_llama is not None:
        model = mera_tl.load_model(config.sms_llama, device="cpu")
        whole = mera_tl.load_task("sms_spam", data_dir=config.data_dir, template=config.template)
        # The model was trained on later rows.
        unseen = whole.subset([i for i, e in enumerate(whole.examples) if e.row < 3500])
        train = unseen.split(0, train=1312, calibration=100, test=100).train
        for read in (quiet, exact):
            yield from searching("sms-llama", model, train, read)
        yield from beside_hugging_face(config, model, unseen.subset(range(config.n_floor)))
    if config.smollm2 is not None:
        model = mera_tl.load_model(config.smollm2, device="cpu")
        whole = mera_tl.load_task("sms_spam", data_dir=config.data_dir)
        train = whole.split(0, train=300, calibration=100, test=100).train
        yield from searching("SmolLM2", model, train, quiet)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    found = []
    for row in rows(config):
        found.append(row)
        print(row, flush=True)
        storage.write_records(config.out, found)


if __name__ == "__main__":
    main(tyro.cli(Config))
