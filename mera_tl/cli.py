"""The command `mera`: each subcommand a frozen dataclass, run by the function of its name.

Heavy imports happen inside the functions, so `mera --help` answers at once. A caller's mistake is
one sentence on stderr and exit code 2.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mera_tl.config import DEFAULT_METHODS, GridConfig, RunConfig

DESCRIPTION = (
    "Steer a language model away from its own errors, only when that can be shown to help."
)
Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Run(RunConfig):
    """Collect, fit, calibrate or abstain, evaluate: one model, one task, a table at the end."""

    methods: tuple[str, ...] = DEFAULT_METHODS
    """Methods to compare (`mera methods` lists them)."""
    out: Path | None = None
    """Folder of the run; started again, it goes on. Default: runs/<model>-<task>."""


@dataclass(frozen=True, kw_only=True)
class Collect(Run):
    """Step 1: answer the training split unsteered, keeping activations and errors."""


@dataclass(frozen=True, kw_only=True)
class Fit(Run):
    """Step 2: fit error probes on the collected activations; show their held-out scores."""

    kinds: tuple[
        Literal["ridge", "least_squares", "lasso", "logistic", "logistic_l2", "contrastive"], ...
    ] = ("ridge",)
    """Probes to fit."""


@dataclass(frozen=True, kw_only=True)
class Calibrate(Run):
    """Step 3: decide on the calibration split whether each method may steer, and where."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Run):
    """Step 4: evaluate on the test split what the certificates allow."""


@dataclass(frozen=True, kw_only=True)
class Benchmark(GridConfig):
    """Compare methods over models, tasks and seeds; killed and started again, it goes on."""

    out: Path = Path("runs/benchmark")
    """Folder of the grid."""


@dataclass(frozen=True)
class Demo:
    """Run the whole product on the embedded organism, offline, in about a minute."""

    out: Path = Path("runs/demo")
    """Folder of the demo's runs."""
    seed: int = 0
    """Of the split."""


@dataclass(frozen=True)
class Tasks:
    """List the tasks."""


@dataclass(frozen=True)
class Methods:
    """List the methods."""


@dataclass(frozen=True)
class Models:
    """List the models that load by name."""

    search: str = ""
    """Only names that contain this."""


@dataclass(frozen=True)
class Table:
    """Print the records of one or more runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    format: Literal["text", "csv", "markdown", "latex"] = "text"
    """How to print them."""


# --- run and its steps --------------------------------------------------------------------------


def _config_of(command: Run) -> RunConfig:
    return RunConfig(**{f.name: getattr(command, f.name) for f in fields(RunConfig)})


def _folder_of(command: Run) -> Path:
    name = f"{Path(command.model).name}-{Path(command.task).stem}"
    return command.out or Path("runs") / name


def run(command: Run) -> None:
    """Do everything; print the table, the certificates and where the files are."""
    from mera_tl.benchmark import open_run

    folder, started = _folder_of(command), time.perf_counter()
    with open_run(_config_of(command), folder) as opened:
        _say_splits(opened)
        records = list(opened.records(command.methods))
    _print_records(records)
    print(f"\n{time.perf_counter() - started:.0f} s; records in {folder / 'records.jsonl'}")


def collect(command: Collect) -> None:
    """Collect activations of the training split."""
    from mera_tl.benchmark import open_run

    with open_run(_config_of(command), _folder_of(command)) as opened:
        outcomes = opened.activations.outcomes
        print(
            f"{len(outcomes)} training examples: accuracy {outcomes.accuracy:.3f}, mean error "
            f"{outcomes.mean_error:.3f}; activations in {opened.folder / 'activations'}"
        )


def fit(command: Fit) -> None:
    """Fit probes and print their held-out scores by layer."""
    from mera_tl.benchmark import open_run

    with open_run(_config_of(command), _folder_of(command)) as opened:
        for kind in command.kinds:
            probe = opened.setting.probe(kind)
            print(f"\n{kind} (penalty {probe.penalty:g}), best layer {probe.best_layer}")
            print(probe.table.round(3).to_string(index=False))
        print(f"\nprobes in {opened.folder / 'probes'}")


def calibrate(command: Calibrate) -> None:
    """Certify or abstain, method by method."""
    from mera_tl.benchmark import open_run
    from mera_tl.methods import find_method

    with open_run(_config_of(command), _folder_of(command)) as opened:
        for method in [find_method(name) for name in command.methods]:
            treatment = method(opened.setting)
            print(f"{method.__name__}: {treatment.calibration or 'needs no certificate'}")
        print(f"\ncertificates in {opened.folder / 'certificates'}")


def evaluate(command: Evaluate) -> None:
    """Evaluate on the test split; the earlier steps are found in the folder, or done."""
    run(command)


def benchmark(command: Benchmark) -> None:
    """Run the grid; exit code 1 if a job failed."""
    from mera_tl.grid import run_grid

    config = GridConfig(**{f.name: getattr(command, f.name) for f in fields(GridConfig)})
    records = run_grid(config, command.out)
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


def _say_splits(opened: Any) -> None:
    sizes = ", ".join(f"{len(split)} {split.role}" for split in opened.splits)
    dropped = sum(opened.splits.train.source.get("split", {}).get("dropped", {}).values())
    note = f"; {dropped} rows that recur in a later split are left out" if dropped else ""
    print(f"{opened.model.name} on {opened.splits.test.name}: {sizes}{note}", flush=True)


def _print_records(records: Rows) -> None:
    from mera_tl.benchmark import table

    frame = table(records)
    print("\n" + frame.to_string(index=False, float_format="%.3f", na_rep=""))
    for record in records:
        if record["certificate"]:
            print(f"\n{record['task']}, {record['method']}: {record['certificate']}")


# --- the rest -----------------------------------------------------------------------------------

DEMO_TASKS = ("spam_cue", "yesno_bias", "sentiment_noise")
DEMO_METHODS = (
    "no_steering",
    "prompt_steering",
    "additive_probe",
    "vanilla_contrastive",
    "optimal_probe",
    "optimal_logistic_probe",
)


def demo(command: Demo) -> None:
    """Run the demo's methods on three of the organism's tasks."""
    from mera_tl.benchmark import open_run

    started, records = time.perf_counter(), []
    print("The embedded organism, three of its tasks: what can be corrected, what cannot.\n")
    for task in DEMO_TASKS:
        config = RunConfig(
            model="organism",
            task=task,
            train="1000",
            calibration="400",
            test="500",
            seed=command.seed,
            layers="1",
            positions="last",
            batch_size=100,
        )
        with open_run(config, command.out / f"{task}-seed{command.seed}") as opened:
            _say_splits(opened)
            records += list(opened.records(DEMO_METHODS))
    _print_records(records)
    print(f"\n{time.perf_counter() - started:.0f} s; records and certificates in {command.out}")


def tasks(command: Tasks) -> None:  # noqa: ARG001
    """Print the tasks."""
    from mera_tl.tasks import describe_tasks

    _print_rows(describe_tasks())


def methods(command: Methods) -> None:  # noqa: ARG001
    """Print the methods."""
    from mera_tl.methods import METHODS

    rows = [
        {"method": name, "is": (function.__doc__ or "").strip().splitlines()[0]}
        for name, function in METHODS.items()
    ]
    _print_rows(rows)


def models(command: Models) -> None:
    """Print the models that load by name."""
    from mera_tl.models import model_names

    print("\n".join(name for name in model_names() if command.search.lower() in name.lower()))
    print("\nand any local Hugging Face folder of the Llama, Qwen2, Gemma2 or GPT-2 family")


def show_table(command: Table) -> None:
    """Print records of runs."""
    from mera_tl import store
    from mera_tl.benchmark import table

    records = []
    for folder in command.runs:
        found = store.read_records(folder / "records.jsonl")
        if not found:
            raise ValueError(f"{folder} holds no records.jsonl; pass the folder of a `mera run`.")
        records += found
    frame = table(records)
    writers: dict[str, Callable[[], str]] = {
        "text": lambda: frame.to_string(index=False, float_format="%.3f", na_rep=""),
        "csv": lambda: frame.to_csv(index=False),
        "markdown": lambda: _markdown(frame),
        "latex": lambda: frame.to_latex(index=False, float_format="%.3f", na_rep=""),
    }
    print(writers[command.format]())


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


def _named(command: type, name: str) -> Any:
    return Annotated[command, tyro.conf.subcommand(name)]


COMMANDS: dict[type, Callable[[Any], None]] = {
    Run: run,
    Collect: collect,
    Fit: fit,
    Calibrate: calibrate,
    Evaluate: evaluate,
    Benchmark: benchmark,
    Demo: demo,
    Table: show_table,
    Tasks: tasks,
    Methods: methods,
    Models: models,
}


def main() -> None:
    """Parse the command line and run the command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    union: Any = None
    for command in COMMANDS:
        named = _named(command, command.__name__.lower())
        union = named if union is None else union | named
    command = tyro.cli(union, prog="mera", description=DESCRIPTION)
    try:
        COMMANDS[type(command)](command)
    except ValueError as error:
        print(f"mera: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("mera: stopped; start it again to go on.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
