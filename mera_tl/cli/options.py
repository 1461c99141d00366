"""The subcommands of `mera` and their options: frozen dataclasses, read by people and `--help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mera_tl.benchmark.config import DEFAULT_METHODS, GridConfig, RunConfig, RunOptions


@dataclass(frozen=True, kw_only=True)
class Run(RunConfig):
    """Collect, fit, calibrate or abstain, evaluate: one model, one task, a table at the end."""

    methods: tuple[str, ...] = DEFAULT_METHODS
    """Methods to compare (`mera methods` lists them)."""
    out: Path | None = None
    """Folder of the run; started again, it goes on. Default: runs/<model>-<task>."""
    cache: Path | None = None
    """Folder through which runs share activations, probes and unsteered outcomes."""


@dataclass(frozen=True, kw_only=True)
class Collect(Run):
    """Step 1: answer the training split unsteered, keeping activations and errors."""

    shards: int = 1
    """Parts to collect it in, one after another or, on Ray, side by side."""
    ray: str | None = None
    """Collect on Ray: "local" (this machine's cores), "auto", or a cluster's address."""
    gpus: float = 0.0
    """GPUs that each shard asks Ray for."""


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
    """Folder of the grid; on a cluster, one that all nodes see."""
    cache: Path | None = None
    """Folder through which runs share what they can. Default: shared, in the grid's folder."""
    ray: str | None = None
    """Run on Ray: "local" (this machine's cores), "auto", or a cluster's address."""
    gpus: float = 0.0
    """GPUs that each run asks Ray for."""
    wandb: bool = False
    """Log the records to wandb, in the grid's folder: offline, unless WANDB_MODE says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Sae(RunConfig):
    """Train SAEs on a task's activations, or report what SAEs explain of them.

    The last tenth of the training split is kept for the report; other splits are not looked at.
    """

    action: tyro.conf.Positional[Literal["train", "report"]]
    """train: train and save, then report; report: SAEs that are there (--sae)."""
    out: Path | None = None
    """Where to save layer_0, layer_1, ... Default: saes/<model>, where --space sae looks."""
    architecture: Literal["standard", "jumprelu", "topk", "batchtopk"] = "standard"
    """Of the SAE."""
    expansion: int = 4
    """Latents per dimension of the residual stream."""
    sparsity: float = 2.0
    """Weight of the sparsity penalty (standard, jumprelu)."""
    k: int = 16
    """Latents that are on at a time (topk, batchtopk)."""
    n_steps: int = 1500
    """Training steps."""
    step_tokens: int = 1024
    """Tokens in a step."""
    max_tokens: int = 200_000
    """Tokens to learn from at most."""


@dataclass(frozen=True)
class Demo:
    """Run the whole product on the embedded organism, offline, in about a minute."""

    out: Path = Path("runs/demo")
    """Folder of the demo's runs."""
    seed: int = 0
    """Of the split."""


@dataclass(frozen=True)
class Plan:
    """How many calibration examples a gain needs to be certified: a table, and a figure."""

    gain: float | None = None
    """Expected gain in accuracy, such as 0.06. Default: a table of gains."""
    churn: Literal["low", "mid", "high"] = "mid"
    """How many other examples change their outcome."""
    base: float | None = None
    """Unsteered accuracy; leaves out what it gives no room for."""
    pilot: tuple[int, int, int] | None = None
    """Recoveries, regressions and n of a pilot run, instead of an expected gain."""
    min_gain: float = 0.0
    """Gain to certify (the paper's epsilon)."""
    delta: float = 0.05
    """Greatest probability of steering with a gain below `min_gain`."""
    n_thresholds: int = 10
    """Thresholds to be tried."""
    power: float = 0.8
    """Probability of being certified, if the expectation is right."""
    figure: Path | None = None
    """Where to write the sample-size curves (HTML); without --gain and --pilot only."""


@dataclass(frozen=True)
class Monitor:
    """Watch audited traffic: should a certificate be withdrawn? Exit code 1 if so."""

    pairs: tyro.conf.Positional[Path]
    """JSONL, a line per audited pair, oldest first: {"steered": 1, "unsteered": 0}."""
    state: Path = Path("monitor.json")
    """Where the state is kept; started again, only new lines of `pairs` are read."""
    floor: float = 0.0
    """Least mean gain that is still acceptable."""


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


@dataclass(frozen=True)
class Report:
    """Write a page about one or more runs that opens anywhere, with its figures beside it."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or folders of such folders."""
    out: Path | None = None
    """The page. Default: report.html in the first folder."""
    images: bool = False
    """Write every figure as SVG and PNG, too; needs kaleido (`mera-tl[images]`) and a browser."""


@dataclass(frozen=True)
class Explain:
    """Show, token by token and layer by layer, what a method of a run does to one prompt."""

    run: Path
    """Folder of the run."""
    row: int
    """Row of the task (the examples of a report name theirs)."""
    method: str = "optimal_probe"
    """A method with a probe."""
    out: Path | None = None
    """The page. Default: explain/<method>-<row>.html in the run's folder, with a .json beside."""


@dataclass(frozen=True, kw_only=True)
class Doctor(RunOptions):
    """Say what works here; with --model and --task, what `mera run` with these would take."""

    model: str | None = None
    """A model, as `mera run` takes it."""
    task: str | None = None
    """A task, likewise."""


COMMANDS = (
    Run,
    Collect,
    Fit,
    Calibrate,
    Evaluate,
    Benchmark,
    Sae,
    Demo,
    Table,
    Report,
    Explain,
    Plan,
    Monitor,
    Tasks,
    Methods,
    Models,
    Doctor,
)
