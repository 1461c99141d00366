"""How fast is the work that people wait for, on three models, beside named floors?

CPU seconds of this process on one thread. Floors are run in the same process:

- evaluate, collect: plain Hugging Face on the same prompts, one forward pass (readout `options`) or
  greedy decoding of up to 8 tokens (`exact`), sorted by length, as many tokens to a batch;
- ten thresholds on whole prompts (`positions="all"`): evaluating once, unsteered;
- probes: one ridge fit of all layers; the paper's grid against a loop over scikit-learn;
- a search: itself. One `mera_tl.search` on collected activations; `foresight` is the rank
  correlation of first-order gains with real ones;
- memory: the weights. The peak of a fresh process that collects, beyond what it held before;
- methods: eight as in the paper, one run, on sms-llama: itself;
- estimates: what a run says beforehand of its time, memory and files, beside what it came to.

    python -m experiments.speed --sms-llama M --smollm2 M2 --data-dir D --template F

Expected: searches <= 6 s (organism), 60 s (sms-llama), 8 minutes (SmolLM2); evaluate and collect
<= 1.10; ten thresholds <= 4 evaluations; the lasso path <= 10 ridge fits; weights + 1 GB. Rows are
kept as they come, and rows of parts that are not run stay. About 25 minutes of processor time.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression

import mera_tl
from experiments.scaling import drawn
from mera_tl import storage
from mera_tl.benchmark import RunConfig, open_run
from mera_tl.certificate import BOUNDS, DEFAULT_THRESHOLDS, Terms, certify
from mera_tl.inference import ReadSettings, tokenize_task
from mera_tl.methods import search
from mera_tl.probes import cross_validation, probe_path
from mera_tl.steering import evaluate_many

Row = dict[str, Any]
ORGANISM, SMS, SMOL = "organism", "sms-llama", "SmolLM2"
PARTS = ("search", "floor", "thresholds", "probes", "methods", "certificate", "memory", "estimates")


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
    parts: tuple[str, ...] = PARTS
    models: tuple[str, ...] = (ORGANISM, SMS, SMOL)
    n_floor: int = 100
    """Prompts that are evaluated, collected and steered beside their floors."""
    n_memory: int = 3000
    """Prompts that a fresh process collects."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """In which the larger model collects them."""
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


def folder_of(config: Config, name: str) -> str | None:
    return {ORGANISM: "organism", SMS: config.sms_llama, SMOL: config.smollm2}[name]


def task_of(config: Config, name: str) -> Any:
    if name == ORGANISM:
        return mera_tl.load_task("spam_cue")
    template = config.template if name == SMS else None
    whole = mera_tl.load_task("sms_spam", data_dir=config.data_dir, template=template)
    # sms-llama was trained on later rows.
    return whole.subset([i for i, e in enumerate(whole.examples) if e.row < 3500])


def searching(config: Config, name: str, model: Any) -> Iterator[Row]:
    n = {ORGANISM: 1500, SMS: 1312, SMOL: 300}[name]
    train = task_of(config, name).split(0, train=n, calibration=100, test=100).train
    for readout in ("options", "exact") if name == SMS else ("options",):
        read: Any = ReadSettings(readout=readout, progress=False)  # pyright: ignore[reportArgumentType]
        activations = mera_tl.collect(model, train, settings=read)
        found: list[Any] = []
        seconds = cpu_seconds(
            lambda read=read, found=found, activations=activations: found.append(
                search(model, train, activations, settings=read)
            )
        )
        details = found[0].details
        yield {
            "what": f"search, {name}, {readout}",
            "n": f"{details['n_fit']} + {details['n_search']}",
            "candidates": details["n_candidates"],
            "cpu_s": round(seconds, 1),
            "foresight": details["foresight"],
        }


def hugging_face(folder: str, prompts: list[list[int]], n_new: int, tokens: int) -> Any:
    """Return plain Hugging Face on these prompts: one pass, or greedy generation."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
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


def beside_hugging_face(config: Config, name: str, model: Any) -> Iterator[Row]:
    if name == ORGANISM:
        return  # it is no Hugging Face folder
    task = task_of(config, name).subset(range(config.n_floor * (3 if name == SMS else 1)))
    for readout, n_new in (("options", 0), ("exact", 8)):
        read: Any = ReadSettings(readout=readout, progress=False)  # pyright: ignore[reportArgumentType]
        prompts = tokenize_task(model, task, read)
        steering = mera_tl.Steering(
            mera_tl.fit_error_probe(mera_tl.collect(model, task, settings=read))
        )
        hooks = steering.at(0.3).fwd_hooks()
        work: dict[str, Callable[[], object]] = {
            "hugging face": hugging_face(
                str(folder_of(config, name)), prompts, n_new, read.batch_tokens
            ),
            "evaluate": lambda read=read: mera_tl.evaluate(model, task, settings=read),
            "collect": lambda read=read: mera_tl.collect(model, task, settings=read),
            "evaluate, steered everywhere": lambda read=read, hooks=hooks: mera_tl.evaluate(
                model, task, hooks, settings=read
            ),
        }
        yield from beside(work, f"{name}, {readout}", len(task), config.repeats)


def beside(
    work: dict[str, Callable[[], object]], about: str, n: int, repeats: int = 1
) -> list[Row]:
    """Time some work; the first is the floor of the others."""
    seconds = {name: cpu_seconds(function, repeats) for name, function in work.items()}
    base = next(iter(seconds.values()))
    return [
        {"what": f"{name}, {about}", "n": n, "cpu_s": round(s, 2), "of_floor": round(s / base, 3)}
        for name, s in seconds.items()
    ]


def ten_thresholds(config: Config, name: str, model: Any) -> Iterator[Row]:
    n, read = config.n_floor // (2 if name == SMOL else 1), ReadSettings(progress=False)
    splits = task_of(config, name).split(0, train=2 * n, calibration=n, test=50)
    probe = mera_tl.fit_error_probe(mera_tl.collect(model, splits.train, settings=read))
    steering, held_out = mera_tl.Steering(probe), splits.calibration
    grid = [steering.at(threshold) for threshold in DEFAULT_THRESHOLDS]
    moved = [
        (run.n_steered > 0).double().mean().item()
        for run in evaluate_many(model, held_out, grid, settings=read)
    ]
    work = {
        "evaluate once": lambda: mera_tl.evaluate(model, held_out, settings=read),
        "ten thresholds, whole prompts": lambda: evaluate_many(
            model, held_out, grid, settings=read
        ),
    }
    for row in beside(work, name, len(held_out)):
        yield row | {"share_moved": round(float(np.mean(moved)), 3)}


def probes(config: Config, name: str, model: Any) -> Iterator[Row]:
    grid = cross_validation.PUBLISHED
    if name == ORGANISM:
        large, about = drawn((3000, 1, 2304), ("last",), 2.0), "drawn, a layer of width 2,304"
        yield from beside(
            {"the paper's grid of probes": lambda: probe_path(large, grid=grid)}, about, 3000
        )
        return
    n = 600 if name == SMS else 300
    task, read = task_of(config, name).subset(range(n)), ReadSettings(progress=False)
    activations = mera_tl.collect(model, task, settings=read)
    work: dict[str, Callable[[], object]] = {
        "ridge of all layers": lambda: mera_tl.fit_error_probe(activations),
        "the lasso's path": lambda: probe_path(activations, grid={"lasso": grid["lasso"]}),
        "the paper's grid of probes": lambda: probe_path(activations, grid=grid),
    }
    if name == SMS:
        work["the same grid in a loop over scikit-learn"] = lambda: loop(activations)
    yield from beside(work, f"{name}, {model.n_layers} layers", n)


def loop(activations: Any) -> None:
    """Fit the same grid one model at a time."""
    resid, target = activations.resid().double(), torch.logit(activations.error, eps=0.01)
    incorrect = ~activations.correct
    for x in (resid - resid.mean(1, keepdim=True)) / resid.std(1, keepdim=True):
        for rows in cross_validation.folds(incorrect, 0):
            features, errors = x[rows].numpy(), target[rows].numpy()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                LinearRegression().fit(features, errors)
                for penalty in cross_validation.LASSO:
                    Lasso(alpha=penalty).fit(features, errors)
                logistic = LogisticRegression(l1_ratio=1.0, solver="liblinear")
                logistic.fit(features, incorrect[rows].numpy())


def certificates() -> Iterator[Row]:
    rng, n = np.random.default_rng(0), 3000
    u = rng.random((10, n))
    gains = (u < 0.11).astype(float) - (u > 1 - 0.08 * np.arange(1, 11)[:, None] / 6)
    for bound in BOUNDS:
        seconds = cpu_seconds(
            lambda bound=bound: certify(
                gains, terms=Terms(bound=bound), candidates=DEFAULT_THRESHOLDS
            ),
            3,
        )
        yield {"what": f"certify ten thresholds, {bound}", "n": n, "cpu_s": round(seconds, 4)}


COLLECT = """
import json, sys, tempfile, torch, mera_tl
from pathlib import Path
from experiments.speed import Config, status, task_of
name, folder, n, dtype, *given = sys.argv[1:]
config, n = Config(*given), int(n)
torch.set_num_threads(1)
model = mera_tl.load_model(folder, device="cpu", dtype=dtype)
task = task_of(config, name).subset(range(n))
weights = sum(w.nbytes for w in {w.data_ptr(): w for w in model.hooked.parameters()}.values())
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
with tempfile.TemporaryDirectory() as out:
    mera_tl.collect(model, task, settings=mera_tl.ReadSettings(progress=False), out=out)
found = {"weights_mib": weights / 2**20, "before_mib": before, "peak_mib": status("VmHWM")}
print(json.dumps({key: round(value) for key, value in found.items()}))
"""


EIGHT = ("no_steering", "prompt_steering", "additive_probe", "vanilla_contrastive")
EIGHT += ("optimal_probe", "optimal_logistic_probe", "optimal_contrastive", "sub_optimal_probe")


def eight_methods(config: Config, name: str, model: Any) -> Iterator[Row]:
    """Run a benchmark of the size that the published code was measured at."""
    if name != SMS:
        return
    sizes = {"train": "600", "calibration": "150", "test": "150"}
    about = {"data_dir": config.data_dir, "template": config.template, **sizes}
    asked = RunConfig(model=str(config.sms_llama), task="sms_spam", device="cpu", **about)

    def run() -> None:
        with (
            tempfile.TemporaryDirectory() as out,
            open_run(asked, Path(out) / "run", progress=False, load=lambda _: model) as opened,
        ):
            list(opened.records(EIGHT))

    seconds = round(cpu_seconds(run), 1)
    yield {"what": f"eight methods, {name}", "n": "600/150/150", "cpu_s": seconds}


RUN = """
import json, sys, tempfile, time, torch
from pathlib import Path
from experiments.speed import Config, ORGANISM, SMOL, status
from mera_tl.benchmark import DEFAULT_METHODS, RunConfig, estimate, open_run, planned
name, folder, train, calibration, test, *given = sys.argv[1:]
known = Config(*given)
about = {} if name == ORGANISM else {"data_dir": known.data_dir}
about |= {"template": known.template} if known.template else {}
about |= {"positions": "last"} if name == SMOL else {}
sizes = {"train": train, "calibration": calibration, "test": test}
task = "spam_cue" if name == ORGANISM else "sms_spam"
config = RunConfig(model=folder, task=task, device="cpu", **sizes, **about)
foreseen = estimate(planned(config))
with tempfile.TemporaryDirectory() as out, open_run(config, Path(out) / "r", progress=False) as run:
    torch.set_num_threads(1)
    began, cpu = time.perf_counter(), time.process_time()
    run.preflight
    # A busy machine stretches the clock by which the rate is measured.
    quiet = (time.process_time() - cpu) / (time.perf_counter() - began)
    seconds = {each: s * quiet for each, s in run.seconds(DEFAULT_METHODS).items()}
    run.announce(DEFAULT_METHODS)
    real, start = {}, time.process_time()
    run.activations, run.base
    for each in ("unsteered", *DEFAULT_METHODS):
        if each != "unsteered":
            run.record(each)
        real[each], start = time.process_time() - start, time.process_time()
    disk = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
found = {"foreseen_s": sum(seconds.values()), "cpu_s": sum(real.values())}
found |= {"foreseen_mib": foreseen.device / 2**20, "peak_mib": status("VmHWM")}
found |= {"foreseen_disk_mib": foreseen.disk / 2**20, "disk_mib": disk / 2**20}
by_method = {each: [round(seconds[each], 1), round(real[each], 1)] for each in real}
print(json.dumps({k: round(v, 1) for k, v in found.items()} | {"by_method": by_method}))
"""


def estimates(config: Config, name: str) -> Iterator[Row]:
    """Compare what is said before a run of the default methods with what it came to."""
    sizes = ("100", "60", "80") if name == SMOL else ("300", "150", "200")
    given = [config.sms_llama or "", config.smollm2 or "", config.data_dir or ""]
    given += [config.template or ""] if config.template and name == SMS else []
    arguments = [name, str(folder_of(config, name)), *sizes, *given]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=True
    )
    about = f"a run of the default methods, {name}"
    yield {"what": about, "n": "/".join(sizes), **json.loads(done.stdout.splitlines()[-1])}


def status(field: str) -> float:
    """Return a line of this process's status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) / 1024


def memory(config: Config, name: str) -> Iterator[Row]:
    if name == ORGANISM:
        return
    given = [config.sms_llama or "", config.smollm2 or "", config.data_dir or ""]
    given += [config.template or ""] if config.template else []
    n = min(config.n_memory, 3000)
    for dtype in config.dtypes if name == SMOL else ("float32",):
        arguments = [name, str(folder_of(config, name)), str(n), dtype, *given]
        done = subprocess.run(
            [sys.executable, "-c", COLLECT, *arguments], capture_output=True, text=True, check=True
        )
        about = f"collect in a fresh process, {name}, {dtype}"
        yield {"what": about, "n": n, **json.loads(done.stdout.splitlines()[-1])}


def rows(config: Config) -> Iterator[Row]:
    if "certificate" in config.parts:
        yield from certificates()
    work = {
        "search": searching,
        "floor": beside_hugging_face,
        "thresholds": ten_thresholds,
        "probes": probes,
        "methods": eight_methods,
    }
    for name in config.models:
        if (folder := folder_of(config, name)) is None:
            continue
        if "memory" in config.parts:
            yield from memory(config, name)
        if "estimates" in config.parts:
            yield from estimates(config, name)
        wanted = [part for part in work if part in config.parts]
        model = mera_tl.load_model(folder, device="cpu") if wanted else None
        for part in wanted:
            yield from work[part](config, name, model)


def processor() -> str:
    """Return what the operating system calls the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(config: Config) -> None:
    torch.set_num_threads(1)
    known = storage.read_records(config.out) if config.out.exists() else []
    found = {row["what"]: row for row in known}
    for row in rows(config):
        found[row["what"]] = row | {"machine": processor(), "threads": 1}
        print(row, flush=True)
        storage.write_records(config.out, list(found.values()))


if __name__ == "__main__":
    main(tyro.cli(Config))
