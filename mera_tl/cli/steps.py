"""`mera run`, its steps one by one, and what runs them more than once: options that run themselves.

Each is a frozen dataclass, read by people and by `--help`; calling it does what was asked. Torch is
imported inside the calls, so `mera --help` answers at once.
"""

import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from mera_tl.benchmark.config import (
    DEFAULT_METHODS,
    DEMO_METHODS,
    DEMO_TASKS,
    GridConfig,
    RunConfig,
    narrow,
)
from mera_tl.cli import terminal
from mera_tl.cli.terminal import console
from mera_tl.sae.options import TrainOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Step(RunConfig):
    """What a run and each of its steps take."""

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
    verbose: bool = False
    """Print the certificates in words, and a line per stage."""
    quiet: bool = False
    """Print warnings only."""

    def each_task(self) -> list[tuple[RunConfig, Path]]:
        """Return the configuration and the folder of every task that was named, as --task a,b."""
        if "," in self.model and not Path(self.model).exists():
            raise ValueError(
                f"--model {self.model} names several, and this takes one; `mera benchmark -m "
                f"{self.model}` compares models."
            )
        names, model = self.task.split(","), Path(self.model).name
        folders = [self.out or Path("runs") / f"{model}-{Path(self.task).stem}"]
        if len(names) > 1:
            folders = [(self.out or Path("runs") / model) / Path(name).stem for name in names]
        configs = [replace(self._run_config(), task=name) for name in names]
        return list(zip(configs, folders, strict=True))

    def _run_config(self) -> RunConfig:
        """Return the options of a run; --limit is shared out 3 : 1 : 1."""
        config = narrow(self, RunConfig)
        if self.limit is None:
            return config
        if self.limit < 10 or any((self.train, self.calibration, self.test)):
            raise ValueError(
                f"--limit {self.limit} says how many examples there are in all, 10 or more; pass "
                "it without --train, --calibration and --test, or these without it."
            )
        part = self.limit // 5
        train = str(self.limit - 2 * part)
        return replace(config, train=train, calibration=str(part), test=str(part))

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """Open the run whose single step this is."""
        from mera_tl.benchmark.run import open_run
        from mera_tl.methods.methods import find_methods

        terminal.start_logging(verbose=self.verbose, quiet=self.quiet)
        if len(each := self.each_task()) > 1:
            raise ValueError(f"--task {self.task} names several; a single step takes one task.")
        find_methods(self.methods, self.space)
        with open_run(*each[0], cache=self.cache) as opened:
            yield opened


@dataclass(frozen=True, kw_only=True)
class Run(Step):
    """Collect, fit, calibrate or abstain, evaluate; end in one line per task and a report.

    For example:

      $ mera run -m organism -t spam_cue,sentiment_fan
      $ mera run -m google/gemma-2-2b-it -t sms_spam --chat --limit 1000 -o runs/sms
      $ mera run --config run.toml --min-gain 0.02 --dry-run
    """

    strict: bool = False
    """Exit with code 2 where the baseline is degenerate, before anything is spent."""
    overwrite: bool = False
    """Delete what an earlier run left in the folder."""
    dry_run: bool = False
    """Check names, data and options, estimate memory and disk; load no weights, write nothing."""
    json: bool = False
    """Print the records as JSON, or what --dry-run found, and nothing else on stdout."""

    def __call__(self) -> None:
        from mera_tl.benchmark.grid import LatestModel
        from mera_tl.benchmark.run import open_run
        from mera_tl.methods.methods import find_methods

        terminal.start_logging(verbose=self.verbose, quiet=self.quiet)
        out, started = console(quiet=self.quiet, stderr=self.json), time.perf_counter()
        each = self.each_task()
        find_methods(self.methods, self.space)
        if self.dry_run:
            return _dry_run(out, each, self.methods, as_json=self.json)
        load = LatestModel()
        if len(each) > 1:
            _check_all(each, load, self.methods)
        for _, folder in each if self.overwrite else ():
            _clear(folder)
        opening: dict[str, Any] = {"cache": self.cache, "load": load, "methods": self.methods}
        for config, folder in each:
            with open_run(config, folder, **opening) as opened:
                _say_splits(out, opened)
                _say_preflight(out, opened, self.methods, strict=self.strict)
        for config, folder in each:
            with open_run(config, folder, **opening) as opened:
                _say_reconstruction(out, opened)
                _measure(opened, self.methods)
        folders = [folder for _, folder in each]
        whole = folders[0] if len(folders) == 1 else folders[0].parent
        records = _summarise(out, folders, whole, verbose=self.verbose, started=started)
        if self.json:
            terminal.print_json(records)
        return None


@dataclass(frozen=True, kw_only=True)
class Preflight(Step):
    """Step 0: answer 50 prompts, show replies, and warn where the baseline is degenerate."""

    strict: bool = False
    """Exit with code 2 if there is anything to warn of."""

    def __call__(self) -> None:
        with self.opened() as opened:
            _say_preflight(console(quiet=self.quiet), opened, self.methods, strict=self.strict)


@dataclass(frozen=True, kw_only=True)
class Collect(Step):
    """Step 1: answer the training split unsteered, keeping activations and errors.

    Takes every option of `mera run`: they are the folder's configuration.
    """

    shards: int = 1
    """Parts to collect it in, one after another or, on Ray, side by side."""
    ray: str | None = None
    """Collect on Ray: "local" (this machine's cores), "auto", or a cluster's address."""
    gpus: float = 0.0
    """GPUs that each shard asks Ray for."""

    def __call__(self) -> None:
        from mera_tl.benchmark.shards import collect_shards

        with self.opened() as opened:
            if self.shards > 1 or self.ray is not None:
                collect_shards(opened, self.shards, ray=self.ray, gpus=self.gpus)
            outcomes = opened.activations.outcomes
            console(quiet=self.quiet).print(
                f"{len(outcomes)} training examples: accuracy {outcomes.accuracy:.3f}, mean error "
                f"{outcomes.mean_error:.3f}; activations in {opened.folder / 'activations'}"
            )


@dataclass(frozen=True, kw_only=True)
class Fit(Step):
    """Step 2: fit error probes on the collected activations; show their held-out scores."""

    kinds: tuple[
        Literal["ridge", "least_squares", "lasso", "logistic", "logistic_l2", "contrastive"], ...
    ] = ("ridge",)
    """Probes to fit."""

    def __call__(self) -> None:
        out = console(quiet=self.quiet)
        shown = ["layer", "rmse", "rmse_sd", "rmse_dummy", "auroc", "auroc_sd"]
        with self.opened() as opened:
            for kind in self.kinds:
                probe = opened.probe(kind)
                out.print(f"\n{kind} (penalty {probe.penalty:g}), best layer {probe.best_layer}")
                rows = probe.table.reindex(columns=shown).to_dict("records")
                out.print(terminal.rich_table(rows))
            out.print(f"\nprobes in {opened.folder / 'probes'}")


@dataclass(frozen=True, kw_only=True)
class Calibrate(Step):
    """Step 3: decide on the calibration split whether each method may steer, and where."""

    def __call__(self) -> None:
        from mera_tl.methods.methods import find_methods

        out = console(quiet=self.quiet)
        with self.opened() as opened:
            methods = opened.suited(self.methods)
            opened.announce(methods)
            for method in find_methods(methods, self.space):
                treatment = method.treat(opened)
                decision = treatment.calibration or treatment.withholding or "needs no certificate"
                out.print(f"[bold]{method.name}[/bold]: {decision}")
            out.print(f"\ncertificates in {opened.folder / 'certificates'}")


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
    config: Path | None = None
    """TOML, YAML or JSON file of these options; the command line overrides it."""

    def __call__(self) -> None:
        from mera_tl.benchmark.grid import run_grid

        terminal.start_logging()
        where = {"ray": self.ray, "gpus": self.gpus, "cache": self.cache}
        records = run_grid(narrow(self, GridConfig), self.out, **where)
        done = [record for record in records if "failure" not in record]
        if done:
            console().print(terminal.shared_words(done))
            console().print(terminal.records_table(done))
            terminal.print_warnings(console(), done)
        for record in records:
            if "failure" in record:
                job = ", ".join(str(record[name]) for name in ("model", "task", "method", "seed"))
                print(f"failed: {job}: {record['failure']}", file=sys.stderr)
        print(f"\n{len(done)} of {len(records)} jobs done; records in {self.out / 'records.jsonl'}")
        print(f"Try next:\n  mera report {self.out} --open" * bool(done))
        if len(done) < len(records):
            sys.exit(1)


@dataclass(frozen=True, kw_only=True)
class Sae(RunConfig, TrainOptions):
    """Train SAEs on a task's activations, or report what SAEs explain of them.

    The last tenth of the training split is kept for the report; other splits are not looked at.

      $ mera sae train -m organism -t spam_cue --layers 1 -o saes/organism
    """

    action: Positional[Literal["train", "report"]]
    """train: train and save, then report; report: SAEs that are there (--sae)."""
    out: Path | None = None
    """Where to save layer_0, layer_1, ... Default: saes/<model>, where --space sae looks."""

    def __call__(self) -> None:
        from mera_tl.benchmark import run as benchmark
        from mera_tl.benchmark.config import parse_layers
        from mera_tl.sae.loading import default_source, load_saes
        from mera_tl.sae.probes import reconstruction
        from mera_tl.sae.training import hold_out, train_saes

        terminal.start_logging()
        opened = benchmark.Run(narrow(self, RunConfig), Path())
        layers, source = parse_layers(self.layers), self.sae or default_source(self.model)
        fit, judge = hold_out(opened.splits.train)
        if self.action == "train":
            source = str(self.out or Path("saes") / Path(self.model).name)
            chosen = narrow(self, TrainOptions)
            train_saes(opened.model, fit, layers, source, options=chosen, settings=opened.read)
        space = load_saes(source, layers, opened.model, sibling=self.sae_sibling)
        table = reconstruction(opened.model, judge, space, settings=opened.read)
        print(f"\n{len(judge)} prompts of {judge.name}, SAEs in {source}")
        console().print(terminal.rich_table(table.to_dict("records")))


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

    def __call__(self) -> None:
        from mera_tl.benchmark.run import open_run

        terminal.start_logging(verbose=self.verbose, quiet=self.quiet)
        out, started, folders = console(quiet=self.quiet), time.perf_counter(), []
        out.print("The embedded organism, three tasks: what can be corrected, what cannot.\n")
        for task in DEMO_TASKS:
            config = RunConfig(
                model="organism",
                task=task,
                train="900",
                calibration="400",
                test="500",
                seed=self.seed,
                layers="1",
                positions="last",
                batch_size=250,
            )
            folders.append(self.out / f"{task}-seed{self.seed}")
            with open_run(config, folders[-1]) as opened:
                _say_splits(out, opened)
                _say_warnings(out, opened.preflight)
                _measure(opened, DEMO_METHODS)
        _summarise(out, folders, self.out, verbose=self.verbose, started=started)


def _measure(opened: Any, methods: Sequence[str]) -> None:
    from mera_tl.benchmark.recommendation import decided

    for record in opened.records(methods):
        method, decision = record["method"], record["decision"]
        logger.info("%s: %s", method, decided(method, decision) or "measured")


def _clear(folder: Path) -> None:
    """Delete a run's folder; anything else is not ours to delete."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a run; delete it yourself, or change -o.")
    shutil.rmtree(folder, ignore_errors=True)


def _dry_run(
    out: Any, each: Sequence[tuple[RunConfig, Path]], methods: Sequence[str], *, as_json: bool
) -> None:
    """Check names, data and options; say what the runs would take, and exit 1 if it is too much."""
    from mera_tl.benchmark.memory import estimate, planned

    rows = []
    for config, folder in each:
        opened = planned(config, folder)
        opened.check(methods)
        _say_splits(out, opened)
        names, found = opened.suited(methods), estimate(opened)
        out.print(f"  methods: {', '.join(names)}\n  folder: {folder}\n", markup=False)
        out.print(str(found), markup=False)
        row = {"model": config.model, "task": config.task, "methods": names, "folder": folder}
        row |= {f"n_{split.role}": len(split) for split in opened.splits}
        rows.append(row | {"estimate": found.to_json()})
    if as_json:
        terminal.print_json(rows)
    if not all(row["estimate"]["fits"] for row in rows):
        sys.exit(1)


def _summarise(
    out: Any, folders: Sequence[Path], whole: Path, *, verbose: bool, started: float
) -> list[dict[str, Any]]:
    """Print verdicts, the report's path and what to try next; return all records."""
    from mera_tl.benchmark.records import promise
    from mera_tl.report.report import write_report
    from mera_tl.report.run_folder import RunFolder

    runs = [RunFolder.open(folder) for folder in folders]
    page = write_report(folders, whole / "report.html")
    if verbose:
        for found in runs:
            for method, certificate in found.certificates.items():
                out.print(f"\n[bold]{found.records[0]['task']}, {method}[/bold]\n{certificate}")
    out.print()
    out.print(terminal.verdict_table(runs))
    records = [record for found in runs for record in found.records]
    for found in runs:
        if found.trust:
            out.print(f"{found.records[0]['task']}: {found.trust}", markup=False)
    out.print(promise(records), style="dim", markup=False)
    terminal.print_warnings(out, records)
    lines = (
        f"\nReport: {page} ({time.perf_counter() - started:.0f} s)",
        "Try next:",
        f"  mera report {whole} --open",
        f"  mera recommend {folders[0]}",
        f"  mera explain {folders[0]}",
        f"  mera table {whole}",
    )
    for line in lines:
        # Never broken, so that it can be copied.
        out.print(line, soft_wrap=True, style="bold" if "Report" in line else "dim")
    return records


def _say_splits(out: Any, opened: Any) -> None:
    sizes = ", ".join(f"{len(split)} {split.role}" for split in opened.splits)
    dropped = sum(opened.splits.train.source.get("split", {}).get("dropped", {}).values())
    note = f"; {dropped} rows that recur in a later split are left out" if dropped else ""
    reasons = dict(opened.splits.train.source.get("left_out", {}))
    reasons.pop("not of this task", None)  # of a filter, nobody expects them
    note += "".join(f"; {count} rows {reason} are left out" for reason, count in reasons.items())
    out.print(f"{opened.model.name} on {opened.splits.test.name}: {sizes}{note}", markup=False)


def _check_all(each: Sequence[tuple[RunConfig, Path]], load: Any, methods: Sequence[str]) -> None:
    """Check names, data and layers of every task before the first one runs or leaves anything."""
    from mera_tl.benchmark import run as benchmark

    folders = [folder for _, folder in each]
    if len(set(folders)) < len(folders):
        raise ValueError(f"Two tasks would share the folder {folders[0]}; name each task once.")
    for config, folder in each:
        benchmark.Run(config, folder, progress=False, load=load).check(methods)


def _say_preflight(out: Any, opened: Any, methods: Sequence[str], *, strict: bool) -> None:
    """Print what a few prompts told, and the time that what follows will take.

    Raises:
        ValueError: if `strict` and there is anything to warn of.
    """
    found = opened.preflight
    out.print(str(found), markup=False)
    seconds = opened.seconds(methods)
    said = ", ".join(f"{name} {terminal.duration(n)}" for name, n in seconds.items() if n)
    whole = f"about {terminal.duration(sum(seconds.values()))} in all"
    out.print(f"estimate: {whole}: {said}", markup=False)
    if strict and found.degenerate:
        raise ValueError(
            f"--strict, and the baseline of {found.model} on {found.task} is degenerate: "
            f"{' '.join(found.warnings)}"
        )
    if out.quiet:
        _say_warnings(out, found)


def _say_warnings(out: Any, found: Any) -> None:
    """Print what a pre-flight warns of, also where only warnings are wanted."""
    shown = console(stderr=True) if out.quiet else out
    terminal.print_warnings(shown, [{"task": found.task, "warnings": found.warnings}])


def _say_reconstruction(out: Any, opened: Any, n: int = 100) -> None:
    """Print what SAEs that were trained on a sibling explain of this model."""
    if opened.config.space != "sae" or not opened.config.sae_sibling:
        return
    from mera_tl.sae.probes import reconstruction

    train = opened.splits.train
    some = train.subset(range(min(n, len(train))))
    table = reconstruction(opened.model, some, opened.space, settings=opened.read)
    out.print(f"SAEs of a sibling of {opened.model.name}, on {len(some)} training prompts")
    out.print(terminal.rich_table(table.to_dict("records")))
