"""What the subcommands of `mera` do, one function each, named as the subcommand.

Each prints what a person wants to see; a caller's mistake is a ValueError, which `cli.main` turns
into one sentence and exit code 2.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

from mera_tl.benchmark.config import DEMO_METHODS, DEMO_TASKS, GridConfig, RunConfig
from mera_tl.cli import options as ask

Rows = Sequence[dict[str, Any]]

# --- run and its steps --------------------------------------------------------------------------


def _config_of(command: RunConfig) -> RunConfig:
    return RunConfig(**{f.name: getattr(command, f.name) for f in fields(RunConfig)})


def _folder_of(command: ask.Run) -> Path:
    name = f"{Path(command.model).name}-{Path(command.task).stem}"
    return command.out or Path("runs") / name


def run(command: ask.Run) -> None:
    """Do everything; print the table, the certificates and where the files are."""
    from mera_tl.benchmark.run import open_run

    folder, started = _folder_of(command), time.perf_counter()
    with open_run(_config_of(command), folder, cache=command.cache) as opened:
        _say_splits(opened)
        _say_reconstruction(opened)
        records = list(opened.records(command.methods))
    _print_records(records)
    print(f"\n{time.perf_counter() - started:.0f} s; records in {folder / 'records.jsonl'}")


def collect(command: ask.Collect) -> None:
    """Collect activations of the training split."""
    from mera_tl.benchmark.run import open_run
    from mera_tl.benchmark.shards import collect_shards

    with open_run(_config_of(command), _folder_of(command), cache=command.cache) as opened:
        if command.shards > 1 or command.ray is not None:
            collect_shards(opened, command.shards, ray=command.ray, gpus=command.gpus)
        outcomes = opened.activations.outcomes
        print(
            f"{len(outcomes)} training examples: accuracy {outcomes.accuracy:.3f}, mean error "
            f"{outcomes.mean_error:.3f}; activations in {opened.folder / 'activations'}"
        )


def fit(command: ask.Fit) -> None:
    """Fit probes and print their held-out scores by layer."""
    from mera_tl.benchmark.run import open_run

    with open_run(_config_of(command), _folder_of(command), cache=command.cache) as opened:
        for kind in command.kinds:
            probe = opened.setting.probe(kind)
            print(f"\n{kind} (penalty {probe.penalty:g}), best layer {probe.best_layer}")
            print(probe.table.round(3).to_string(index=False))
        print(f"\nprobes in {opened.folder / 'probes'}")


def calibrate(command: ask.Calibrate) -> None:
    """Certify or abstain, method by method."""
    from mera_tl.benchmark.run import open_run
    from mera_tl.methods.methods import find_method

    with open_run(_config_of(command), _folder_of(command), cache=command.cache) as opened:
        for method in [find_method(name) for name in command.methods]:
            treatment = method(opened.setting)
            print(f"{method.__name__}: {treatment.calibration or 'needs no certificate'}")
        print(f"\ncertificates in {opened.folder / 'certificates'}")


def evaluate(command: ask.Evaluate) -> None:
    """Evaluate on the test split; the earlier steps are found in the folder, or done."""
    run(command)


def benchmark(command: ask.Benchmark) -> None:
    """Run the grid; exit code 1 if a job failed."""
    from mera_tl.benchmark.grid import run_grid
    from mera_tl.benchmark.tracking import log_grid, require_wandb

    wandb = require_wandb() if command.wandb else None
    config = GridConfig(**{f.name: getattr(command, f.name) for f in fields(GridConfig)})
    where = {"ray": command.ray, "gpus": command.gpus, "cache": command.cache}
    records = run_grid(config, command.out, **where)
    if wandb is not None:
        print(f"wandb run in {log_grid(wandb, asdict(config), records, command.out)}")
    done = [record for record in records if "failure" not in record]
    if done:
        _print_records(done)
    for record in records:
        if "failure" in record:
            job = ", ".join(str(record[name]) for name in ("model", "task", "method", "seed"))
            print(f"failed: {job}: {record['failure']}", file=sys.stderr)
    print(f"\n{len(done)} of {len(records)} jobs done; records in {command.out / 'records.jsonl'}")
    if len(done) < len(records):
        sys.exit(1)


def sae(command: ask.Sae) -> None:
    """Train SAEs, and print what they explain of prompts that they have not seen."""
    from mera_tl.benchmark.config import parse_layers
    from mera_tl.benchmark.run import Run
    from mera_tl.sae.loading import default_source, load_saes
    from mera_tl.sae.probes import reconstruction
    from mera_tl.sae.training import TrainOptions, hold_out, train_saes

    opened = Run(_config_of(command), Path())
    layers, source = parse_layers(command.layers), command.sae or default_source(command.model)
    fit, judge = hold_out(opened.splits.train)
    if command.action == "train":
        source = str(command.out or Path("saes") / Path(command.model).name)
        options = TrainOptions(**{f.name: getattr(command, f.name) for f in fields(TrainOptions)})
        train_saes(opened.model, fit, layers, source, options=options, settings=opened.read)
    space = load_saes(source, layers, opened.model, sibling=command.sae_sibling)
    table = reconstruction(opened.model, judge, space, settings=opened.read)
    print(f"\n{len(judge)} prompts of {judge.name}, SAEs in {source}:\n")
    print(table.to_string(index=False, float_format="%.3f"))


def _say_splits(opened: Any) -> None:
    sizes = ", ".join(f"{len(split)} {split.role}" for split in opened.splits)
    dropped = sum(opened.splits.train.source.get("split", {}).get("dropped", {}).values())
    note = f"; {dropped} rows that recur in a later split are left out" if dropped else ""
    print(f"{opened.model.name} on {opened.splits.test.name}: {sizes}{note}", flush=True)


def _say_reconstruction(opened: Any, n: int = 100) -> None:
    """Print what SAEs that were trained on a sibling explain of this model."""
    if opened.config.space != "sae" or not opened.config.sae_sibling:
        return
    from mera_tl.sae.probes import reconstruction

    train = opened.splits.train
    some = train.subset(range(min(n, len(train))))
    table = reconstruction(opened.model, some, opened.space, settings=opened.read)
    print(f"\nSAEs of a sibling of {opened.model.name}, on {len(some)} training prompts:\n")
    print(table.to_string(index=False, float_format="%.3f"), flush=True)


def _print_records(records: Rows) -> None:
    from mera_tl.benchmark import run as runs

    frame = runs.table(records)
    print("\n" + frame.to_string(index=False, float_format="%.3f", na_rep=""))
    for record in records:
        if record["certificate"]:
            print(f"\n{record['task']}, {record['method']}: {record['certificate']}")


# --- the rest -----------------------------------------------------------------------------------


def demo(command: ask.Demo) -> None:
    """Run the demo's methods on three of the organism's tasks; write the report."""
    from mera_tl.benchmark.run import open_run
    from mera_tl.report.report import write_report

    started, records = time.perf_counter(), []
    print("The embedded organism, three of its tasks: what can be corrected, what cannot.\n")
    for task in DEMO_TASKS:
        config = RunConfig(
            model="organism",
            task=task,
            train="900",
            calibration="400",
            test="500",
            seed=command.seed,
            layers="1",
            positions="last",
            batch_size=250,
        )
        with open_run(config, command.out / f"{task}-seed{command.seed}") as opened:
            _say_splits(opened)
            records += list(opened.records(DEMO_METHODS))
    _print_records(records)
    page = write_report(command.out)
    print(f"\n{time.perf_counter() - started:.0f} s; records and certificates in {command.out}")
    print(f"the report to look at: {page}")


def plan(command: ask.Plan) -> None:
    """Print the examples that effects need; needs neither torch nor a model."""
    from mera_tl.certificate.sample_sizes import (
        Effect,
        format_rows,
        likely_effects,
        sample_size_table,
    )

    if command.pilot is not None:
        effects = [Effect.of_pilot(*command.pilot)]
    elif command.gain is not None:
        effects = [Effect.of_gain(command.gain, churn=command.churn, base=command.base)]
    else:
        effects = likely_effects(base=command.base)
    rows = sample_size_table(
        effects,
        min_gain=command.min_gain,
        delta=command.delta,
        n_thresholds=command.n_thresholds,
        target=command.power,
    )
    print(f"calibration examples (n) for a certificate with probability {command.power:g}:\n")
    print(format_rows(rows))
    if command.figure is not None:
        if command.pilot is not None or command.gain is not None:
            raise ValueError("--figure draws a table of gains; leave out --gain and --pilot.")
        import pandas as pd

        from mera_tl.plots import sample_size_curves

        sample_size_curves(pd.DataFrame(rows)).write_html(command.figure)
        print(f"\nfigure in {command.figure}")


def monitor(command: ask.Monitor) -> None:
    """Take in audited pairs and say whether the guarantee stands."""
    from mera_tl.certificate.monitor import Monitor, read_gains

    known = command.state.exists()
    watch = Monitor.load(command.state) if known else Monitor(floor=command.floor)
    if not command.pairs.is_file():
        raise ValueError(f"There is no file {command.pairs}; pass the JSONL of audited pairs.")
    with open(command.pairs, encoding="utf-8") as lines:
        watch = watch.update_all(islice(read_gains(lines), watch.n, None))
    watch.save(command.state)
    print(watch)
    if watch.withdraw:
        sys.exit(1)


def tasks(command: ask.Tasks) -> None:  # noqa: ARG001
    """Print the tasks."""
    from mera_tl.tasks.task import describe_tasks

    _print_rows(describe_tasks())


def methods(command: ask.Methods) -> None:  # noqa: ARG001
    """Print the methods."""
    from mera_tl.methods.controlled import METHODS

    rows = [
        {"method": name, "is": (function.__doc__ or "").strip().splitlines()[0]}
        for name, function in METHODS.items()
    ]
    _print_rows(rows)


def models(command: ask.Models) -> None:
    """Print the models that load by name."""
    from mera_tl.models.model import model_names

    print("\n".join(name for name in model_names() if command.search.lower() in name.lower()))
    print("\nand any local Hugging Face folder of the Llama, Qwen2, Gemma2 or GPT-2 family")


def table(command: ask.Table) -> None:
    """Print records of runs."""
    from mera_tl import storage
    from mera_tl.benchmark import run as runs

    records = []
    for folder in command.runs:
        found = storage.read_records(folder / "records.jsonl")
        if not found:
            raise ValueError(f"{folder} holds no records.jsonl; pass the folder of a `mera run`.")
        records += found
    frame = runs.table(records, full=command.format != "text")
    writers: dict[str, Callable[[], str]] = {
        "text": lambda: frame.to_string(index=False, float_format="%.3f", na_rep=""),
        "csv": lambda: frame.to_csv(index=False),
        "markdown": lambda: _markdown(frame),
        "latex": lambda: frame.to_latex(index=False, float_format="%.3f", na_rep=""),
    }
    print(writers[command.format]().rstrip("\n"))


def report(command: ask.Report) -> None:
    """Write a page about runs."""
    from mera_tl.report.report import write_report

    if not command.runs:
        raise ValueError("There is no run to report on; pass the folder of a `mera run`.")
    page = write_report(command.runs, command.out, images=command.images)
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB), figures in {page.with_suffix('')}")


def explain(command: ask.Explain) -> None:
    """Show what a method does to one prompt, on a page and as JSON."""
    from mera_tl import storage
    from mera_tl.benchmark.run import Run
    from mera_tl.methods.methods import find_method
    from mera_tl.report import html as page
    from mera_tl.report.run_folder import RunFolder
    from mera_tl.steering import trace as ledger

    method = find_method(command.method)
    opened = Run(RunFolder.open(command.run).config, command.run, progress=False)
    examples = {e.row: e for split in opened.splits for e in split.examples}
    if command.row not in examples:
        rows = ", ".join(str(row) for row in list(examples)[-5:])
        raise ValueError(f"Row {command.row} is in no split of this run; {rows} are.")
    treatment = method(opened.setting)
    hooks, probe, example = treatment.fwd_hooks, treatment.probe, examples[command.row]
    if probe is None:
        raise ValueError(f"{command.method} reads no probe; choose a method that does.")
    told = ledger.explain(opened.model, example, hooks, probe=probe, settings=opened.read)
    if not hooks:
        print(f"{command.method} abstained: this prompt is answered as it is.")
    out = command.out or command.run / "explain" / f"{command.method}-{command.row}.html"
    figure = told.figure()
    body = page.figure_block("ledger", figure) + page.prompt_html(example.prompt)
    storage.write_text(out, page.write_page(str(told), body, {"ledger": figure}))
    storage.write_json(out.with_suffix(".json"), told.to_json())
    print(f"{told}\n{out}; as JSON: {out.with_suffix('.json').name}")


def doctor(command: ask.Doctor) -> None:
    """Examine this machine, or estimate a run; exit code 1 if it does not work, or not fit."""
    from mera_tl.benchmark.doctor import examine

    if command.model is None and command.task is None:
        checks = examine()
        print("\n".join(map(str, checks)))
        if any(check.works is False for check in checks):
            sys.exit(1)
        return
    if command.model is None or command.task is None:
        raise ValueError("An estimate needs both, --model and --task; without both, all is tried.")
    from mera_tl.benchmark.memory import estimate

    found = estimate(RunConfig(**vars(command)))
    print(found)
    if not found.fits:
        sys.exit(1)


def _markdown(frame: Any) -> str:
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in frame.values]
    lines = [list(frame.columns), ["---"] * len(frame.columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _print_rows(rows: Rows) -> None:
    """Print rows as aligned columns."""
    names = list(rows[0])
    text = [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(r[i]) for r in text)) for i, name in enumerate(names)]
    for line in [names, *text]:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def _cell(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
