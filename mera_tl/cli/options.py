"""The subcommands of `mera` and their options: frozen dataclasses, read by people and `--help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from mera_tl.benchmark.config import DEFAULT_METHODS, GridConfig, RunConfig, RunOptions


@dataclass(frozen=True, kw_only=True)
class Run(RunConfig):
    """Collect, fit, calibrate or abstain, evaluate; end in one line per task and a report.

    For example:

      $ mera run -m organism -t spam_cue,sentiment_fan
      $ mera run -m google/gemma-2-2b-it -t sms_spam --chat --limit 1000 -o runs/sms
      $ mera run --config run.toml --min-gain 0.02 --dry-run
    """

    methods: tuple[str, ...] = DEFAULT_METHODS
    """Methods to compare (`mera methods` lists them), and methods of your own, as FILE.py:NAME."""
    out: Path | None = None
    """Folder of the run; started again, it resumes. Default: runs/<model>-<task>."""
    cache: Path | None = None
    """Folder through which runs share activations, probes and unsteered outcomes."""
    limit: int | None = None
    """Examples to use in all: 60 % to fit, 20 % to certify, 20 % to test. Default: every one."""
    config: Path | None = None
    """TOML, YAML or JSON file of these options; the command line overrides it."""
    overwrite: bool = False
    """Delete what an earlier run left in the folder."""
    dry_run: bool = False
    """Check everything, estimate memory and disk, run nothing."""
    json: bool = False
    """Print the records as JSON, and nothing else on stdout."""
    verbose: bool = False
    """Print the certificates in words, and a line per stage."""
    quiet: bool = False
    """Print warnings only."""


@dataclass(frozen=True, kw_only=True)
class Collect(Run):
    """Step 1: answer the training split unsteered, keeping activations and errors.

    Takes every option of `mera run`: they are the folder's configuration.
    """

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
    """Compare methods over models, tasks and seeds; killed and started again, it resumes.

    For example:

      $ mera benchmark -m organism -t spam_cue,yesno_bias --seeds 0 1 2 -o runs/grid
    """

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
    config: Path | None = None
    """TOML, YAML or JSON file of these options; the command line overrides it."""


@dataclass(frozen=True, kw_only=True)
class Sae(RunConfig):
    """Train SAEs on a task's activations, or report what SAEs explain of them.

    The last tenth of the training split is kept for the report; other splits are not looked at.

      $ mera sae train -m organism -t spam_cue --layers 1 -o saes/organism
    """

    action: Positional[Literal["train", "report"]]
    """train: train and save, then report; report: SAEs that are there (--sae)."""
    out: Path | None = None
    """Where to save layer_0, layer_1, ... Default: saes/<model>, where --space sae looks."""
    architecture: Literal["standard", "jumprelu", "topk", "batchtopk"] = "standard"
    """SAE architecture to train."""
    expansion: int = 4
    """Latents per dimension of the residual stream."""
    sparsity: float = 2.0
    """Weight of the sparsity penalty (standard, jumprelu)."""
    k: int = 16
    """Latents active per token (topk, batchtopk)."""
    n_steps: int = 1500
    """Training steps."""
    step_tokens: int = 1024
    """Tokens per training step."""
    max_tokens: int = 200_000
    """Most tokens to learn from."""


@dataclass(frozen=True)
class Demo:
    """Run the whole product on the embedded organism, offline, in about a minute."""

    out: Path = Path("runs/demo")
    """Folder of the demo's runs."""
    seed: int = 0
    """Random seed of the data split, the cross-validation folds and the example order."""
    verbose: bool = False
    """Print the certificates in words, and a line per stage."""
    quiet: bool = False
    """Print warnings only."""


@dataclass(frozen=True)
class Plan:
    """Say how many calibration examples a gain needs to be certified: a table, and a figure.

    For example:

      $ mera plan --gain 0.06 --churn low
      $ mera plan --pilot 18 2 288
    """

    gain: float | None = None
    """Expected gain in accuracy, such as 0.06. Default: a table of gains."""
    churn: Literal["low", "mid", "high"] = "mid"
    """How many other examples change their answer."""
    base: float | None = None
    """Unsteered accuracy; gains that it leaves no room for are dropped."""
    pilot: tuple[int, int, int] | None = None
    """Recoveries, regressions and n of a pilot run, instead of an expected gain."""
    min_gain: float = 0.0
    """Gain to certify (the paper's epsilon)."""
    delta: float = 0.05
    """Greatest probability of steering with a gain below `min_gain`."""
    n_thresholds: int = 10
    """Candidates to be tested: 10 for a grid of thresholds, 1 after a search."""
    power: float = 0.8
    """Probability of being certified, if the expectation is right."""
    figure: Path | None = None
    """Where to write the sample-size curves (HTML); without --gain and --pilot only."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Monitor:
    """Watch audited traffic: should a certificate be withdrawn? Exit code 1 if so."""

    pairs: Positional[Path]
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

    runs: Positional[tuple[Path, ...]]
    """Folders of runs, or folders of such folders."""
    format: Literal["text", "csv", "markdown", "latex"] = "text"
    """How to print them; all but text with everything that a record measures."""
    json: bool = False
    """Print the records as JSON."""


@dataclass(frozen=True)
class Report:
    """Write a page about one or more runs that opens anywhere, with its figures beside it.

    For example:

      $ mera report runs/demo --open
    """

    runs: Positional[tuple[Path, ...]]
    """Folders of runs, or folders of such folders."""
    out: Path | None = None
    """The page. Default: report.html in the first folder."""
    images: bool = False
    """Write every figure as SVG and PNG, too; needs kaleido (`mera-tl[images]`) and a browser."""
    open: bool = False
    """Open the page in a browser."""


@dataclass(frozen=True)
class Explain:
    """Show, token by token and layer by layer, what a method of a run does to one prompt.

    For example:

      $ mera explain runs/demo/spam_cue-seed0
      $ mera explain runs/demo/spam_cue-seed0 --prompt "You have won a prize, call now"
    """

    run: Positional[Path]
    """Folder of the run."""
    row: int | None = None
    """Row of the task (the report's examples name theirs). Default: one that the method changed."""
    prompt: str | None = None
    """A text of your own, put where the task's text stands in the prompt."""
    method: str | None = None
    """A method with a probe. Default: the one that the run's verdict is about."""
    out: Path | None = None
    """The page. Default: explain/<method>-<row>.html in the run's folder, with a .json beside."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True, kw_only=True)
class Doctor(RunOptions):
    """Check the installation; with --model and --task, estimate what `mera run` needs."""

    model: str | None = None
    """A model, as `mera run` takes it."""
    task: str | None = None
    """A task, likewise."""


COMMANDS = (
    Run,
    Demo,
    Report,
    Table,
    Explain,
    Benchmark,
    Collect,
    Fit,
    Calibrate,
    Evaluate,
    Sae,
    Plan,
    Monitor,
    Tasks,
    Methods,
    Models,
    Doctor,
)
