"""How fast are reading, steering and collecting, against plain Hugging Face generation?

The floor is batched greedy generation (batch 16, sorted by length, 8 new tokens) by Hugging Face on
the same prompts and the same core, in the same run. CPU seconds of this process; each figure is the
least of `repeats`. Peak memory is that of fresh processes, while they collect and nothing else.

    python -m experiments.speed_of_the_main_job --model M --data-dir D --template F

Expected: evaluating <= 1.3x the floor, hooks on all layers <= 1.05x of that; ten times the examples
take within 5 % the same memory. About 5 minutes.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import mera_tl
from mera_tl.inference import ReadSettings, tokenize_task


@dataclass(frozen=True)
class Config:
    model: str
    """A local Hugging Face folder."""
    task: str = "sms_spam"
    data_dir: str | None = None
    template: str | None = None
    n: int = 600
    """Examples, from row 0."""
    repeats: int = 3
    sizes: tuple[int, ...] = (300, 1000, 3000)
    """Numbers of examples that fresh processes collect."""
    collect_only: bool = False
    """Collect once and print the peak memory of collecting."""
    out: Path = Path("experiments/results/speed_of_the_main_job.jsonl")


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the least CPU time of a few repeats."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def hugging_face(path: str, prompts: list[list[int]]) -> Callable[[], None]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path).eval()
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))

    def generate() -> None:
        for start in range(0, len(order), 16):
            batch = [prompts[i] for i in order[start : start + 16]]
            width = max(map(len, batch))
            tokens = torch.tensor([[0] * (width - len(p)) + p for p in batch])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
            with torch.inference_mode():
                model.generate(
                    tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0
                )

    return generate


def status(field: str) -> float:
    """Return a line of this process's status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) / 1024


def collect_only(model: mera_tl.Model, task: mera_tl.Task, folder: Path) -> dict[str, float]:
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    quiet, start = ReadSettings(progress=False), time.process_time()
    mera_tl.collect(model, task, settings=quiet, out=folder)
    seconds, peak = time.process_time() - start, status("VmHWM")
    disk = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    found = {"cpu_s": seconds, "disk_mb": disk, "rss_mib_before": before, "rss_mib_peak": peak}
    return {"n": len(task), **{name: round(value, 2) for name, value in found.items()}}


def collect_in_fresh_process(config: Config, n: int) -> dict[str, float]:
    names = ("model", "task", "data_dir", "template")
    given = {name: getattr(config, name) for name in names}
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in given.items() if v is not None]
    command = [sys.executable, "-m", "experiments.speed_of_the_main_job", *arguments]
    done = subprocess.run(
        [*command, f"--n={n}", "--collect-only"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(config: Config) -> None:
    torch.set_num_threads(1)
    model = mera_tl.load_model(config.model, device="cpu")
    whole = mera_tl.load_task(config.task, data_dir=config.data_dir, template=config.template)
    task, quiet = whole.subset(range(config.n)), ReadSettings(progress=False)
    if config.collect_only:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(collect_only(model, task, Path(folder))))
        return
    activations = mera_tl.collect(model, task, settings=quiet)
    steering = mera_tl.Steering(mera_tl.fit_error_probe(activations))
    hooks = steering.at(0.3).fwd_hooks()
    floor = hugging_face(config.model, tokenize_task(model, task, quiet))
    work = {
        "hugging_face": floor,
        "unsteered": lambda: mera_tl.evaluate(model, task, settings=quiet),
        "hooks_that_move_nothing": lambda: mera_tl.evaluate(
            model, task, steering.fwd_hooks(), settings=quiet
        ),
        "steered_all_layers": lambda: mera_tl.evaluate(model, task, hooks, settings=quiet),
        "collect": lambda: mera_tl.collect(model, task, settings=quiet),
    }
    rows = []
    for name, function in work.items():
        seconds = cpu_seconds(function, config.repeats)
        base = rows[0]["cpu_s"] if rows else seconds
        rows.append(
            {
                "what": name,
                "n": config.n,
                "cpu_s": round(seconds, 3),
                "ms_per_example": round(1e3 * seconds / config.n, 2),
                "of_hugging_face": round(seconds / base, 3),
            }
        )
        print(rows[-1], flush=True)
    for n in config.sizes:
        rows.append({"what": "collect in a fresh process", **collect_in_fresh_process(config, n)})
        print(rows[-1], flush=True)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(tyro.cli(Config))
