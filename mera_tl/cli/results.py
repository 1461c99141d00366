"""What is made of runs, and what needs none: options that run themselves, as in `steps`."""

import sys
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from mera_tl.benchmark.config import RunConfig, RunOptions
from mera_tl.cli import terminal
from mera_tl.cli.terminal import console


@dataclass(frozen=True)
class Table:
    """Print the records of one or more runs."""

    runs: Positional[tuple[Path, ...]]
    """Folders of runs, or folders of such folders."""
    format: Literal["text", "csv", "markdown", "latex"] = "text"
    """How to print them; all but text with everything that a record measures."""
    json: bool = False
    """Print the records as JSON."""

    def __call__(self) -> None:
        from mera_tl.benchmark.records import promise
        from mera_tl.benchmark.records import table as table_of
        from mera_tl.report.run_folder import find_runs

        if not self.runs:
            raise ValueError("There is no run to print; pass the folder of a `mera run`.")
        if self.json and self.format != "text":
            raise ValueError(f"--json and --format {self.format} contradict; pass one of them.")
        records = [record for found in find_runs(self.runs) for record in found.records]
        if self.json:
            return terminal.print_json(records)
        if self.format == "text":
            console().print(terminal.shared_words(records), style="dim")
            console().print(promise(records), style="dim")
            console().print(terminal.records_table(records))
            return terminal.print_warnings(console(), records)
        frame = table_of(records, full=True)
        writers: dict[str, Callable[[], str]] = {
            "csv": lambda: frame.to_csv(index=False),
            "markdown": lambda: terminal.markdown(frame),
            "latex": lambda: frame.to_latex(
                index=False, float_format="%.3f", na_rep="", escape=True
            ),
        }
        print(writers[self.format]().rstrip("\n"))
        return None


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

    def __call__(self) -> None:
        from mera_tl.report.report import write_report

        if not self.runs:
            raise ValueError("There is no run to report on; pass the folder of a `mera run`.")
        terminal.require_page(self.out)
        page = write_report(self.runs, self.out, images=self.images)
        print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")
        if self.open:
            webbrowser.open(page.resolve().as_uri())


@dataclass(frozen=True)
class Recommend:
    """Say what a run comes to: steer, flip, classify, withhold, or leave alone.

    For example:

      $ mera recommend runs/demo/spam_cue-seed0
    """

    run: Positional[Path]
    """Folder of the run."""
    json: bool = False
    """Print JSON."""

    def __call__(self) -> None:
        from mera_tl.certificate.certificate import promised_points
        from mera_tl.report.run_folder import RunFolder

        found = RunFolder.open(self.run).recommendation
        if self.json:
            return terminal.print_json(found.to_json())
        rows = []
        for way in found.ways:
            sure = "" if way.what == "leave alone" else "yes" if way.certified else "no"
            if way.at_least is not None:
                sure = f">= {promised_points(way.at_least)}"
            rows.append(
                {
                    "do": way.what,
                    "method": way.method,
                    "gain": None if way.gain is None else f"{100 * way.gain:+.1f}",
                    "certified": sure,
                    "+/-": None if way.gain is None else f"{way.recoveries}/{way.regressions}",
                    "passes": way.passes,
                    "needs": ", ".join(way.needs),
                }
            )
        sure = f"\nAll certificates hold at once with probability {found.confidence:.4g}."
        sure *= any(way.certified and way.what != "leave alone" for way in found.ways)
        out = console()
        out.print(f"{found}{sure}\n", markup=False, highlight=False)
        out.print(terminal.rich_table(rows))
        return None


@dataclass(frozen=True)
class Explain:
    """Show, token by token and layer by layer, what a method of a run does to one prompt.

    For example:

      $ mera explain runs/demo/spam_cue-seed0
      $ mera explain runs/demo/spam_cue-seed0 --prompt "You won a prize"
    """

    run: Positional[Path]
    """Folder of the run."""
    row: int | None = None
    """Row of the task (the report's examples name theirs). Default: one that the method changed."""
    prompt: str | None = None
    """A text of your own, put where the task's text stands in the prompt; else the whole prompt."""
    method: str | None = None
    """A method with a probe. Default: the one that the run's verdict is about."""
    out: Path | None = None
    """The page. Default: explain/<method>-<row>.html in the run's folder, with a .json beside."""
    json: bool = False
    """Print JSON."""

    def __call__(self) -> None:
        from mera_tl import storage
        from mera_tl.benchmark.run import Run
        from mera_tl.methods.methods import find_method
        from mera_tl.report.run_folder import RunFolder
        from mera_tl.steering import trace as ledger
        from mera_tl.steering.steering import Steering

        terminal.require_page(self.out)
        if self.row is not None and self.prompt is not None:
            raise ValueError("--row and --prompt are two prompts; pass one of them.")
        folder = RunFolder.open(self.run)
        some = next(iter(folder.certificates), "optimal_probe")  # where all abstain, the first
        name = find_method(self.method or folder.main_method or some).name  # names the nearest
        if name not in (measured := [record["method"] for record in folder.records]):
            raise ValueError(
                f"{name} is no method of this run, which has {', '.join(measured)}; choose among "
                "them, or give `mera run` the same options with that method."
            )
        opened = Run(folder.config, self.run, progress=False)
        example = _example(self, folder, opened, name)
        treatment = find_method(name).treat(opened)
        hooks, probe = treatment.fwd_hooks, treatment.probe
        if probe is None:
            others = " or ".join(folder.certificates)
            advice = f"pass --method {others}" if others else "run one that does"
            raise ValueError(f"{name} reads no probe; {advice}.")
        read = hooks
        if not hooks and folder.config.space != "raw":  # where a probe reads, hooks alone tell
            read = Steering(probe, space=opened.space).reading_hooks()
        told = ledger.explain(opened.model, example, read, probe=probe, settings=opened.read)
        if treatment.answer is not None:
            told = _answered_otherwise(told, treatment, opened, example)
        if not hooks and treatment.reply is None:
            print(f"{name} abstained: this prompt is answered as it is.", file=sys.stderr)
        if self.prompt is not None:  # whose true answer nobody has said
            told = replace(told, row=-1, label="")
        where = "prompt" if self.prompt is not None else example.row
        out = self.out or self.run / "explain" / f"{name}-{where}.html"
        how = _how(name, treatment)
        storage.write_text(out, _page_of(told, folder.records[0], how, example.prompt))
        storage.write_json(out.with_suffix(".json"), told.to_json())
        if self.json:
            return terminal.print_json(told.to_json())
        console().print(str(told), markup=False)
        console().print(f"{out}; as JSON: {out.with_suffix('.json').name}", soft_wrap=True)
        return None


@dataclass(frozen=True)
class Plan:
    """Say how many calibration examples a gain needs to be certified: a table, and a figure.

    For example:

      $ mera plan --gain 0.06 --churn low
      $ mera plan --pilot 18 2 288
      $ mera plan --max-risk 0.05 --base-risk 0.2
    """

    gain: float | None = None
    """Expected gain in accuracy, such as 0.06. Default: a table of gains."""
    churn: Literal["low", "mid", "high"] = "mid"
    """How many other examples change their answer."""
    base: float | None = None
    """Unsteered accuracy; gains that it leaves no room for are dropped."""
    pilot: tuple[int, ...] = ()
    """Recoveries, regressions and n of a pilot run, instead of an expected gain."""
    min_gain: float = 0.0
    """Gain to certify (the paper's epsilon)."""
    delta: float = 0.05
    """Greatest probability of steering with a gain below `min_gain`."""
    n_thresholds: int = 10
    """Candidates to be tested: 10 for a grid of thresholds, 1 after a search."""
    power: float = 0.8
    """Probability of being certified, if the expectation is right."""
    max_risk: float | None = None
    """Plan for `withhold` instead: the greatest share of wrong answers among those given."""
    base_risk: float | None = None
    """Share of wrong answers where nothing is withheld; with --max-risk."""
    figure: Path | None = None
    """Where to write the sample-size curves (HTML); without --gain and --pilot only."""
    json: bool = False
    """Print JSON."""

    def __call__(self) -> None:
        from mera_tl.certificate.sample_sizes import Effect, likely_effects, sample_size_table

        terminal.require_page(self.figure)
        if self.max_risk is not None or self.base_risk is not None:
            return self._withholding()
        asked = self.gain is not None or bool(self.pilot)
        if asked and self.figure is not None:
            raise ValueError("--figure draws a table of gains; leave out --gain and --pilot.")
        if self.pilot and len(self.pilot) != 3:
            raise ValueError(
                f"--pilot takes three numbers (recoveries, regressions, n), not {len(self.pilot)}: "
                "--pilot 18 2 288."
            )
        if self.pilot and (self.gain, self.base) != (None, None):
            raise ValueError("--pilot is what is expected; leave out --gain and --base.")
        if self.pilot:
            effects = [Effect.of_pilot(*self.pilot)]
        elif self.gain is not None:
            effects = [Effect.of_gain(self.gain, churn=self.churn, base=self.base)]
        else:
            effects = likely_effects(base=self.base)
        rows = sample_size_table(
            effects,
            min_gain=self.min_gain,
            delta=self.delta,
            n_thresholds=self.n_thresholds,
            target=self.power,
        )
        if self.json:
            return terminal.print_json(rows)
        print(
            f"calibration examples (n) to certify a gain of at least {self.min_gain:g} with "
            f"probability {self.power:g}\n(delta {self.delta:g}, candidates {self.n_thresholds}); "
            "churn: share of answers that change;\nn hoeffding: by a looser bound\n"
        )
        same = ("min_gain", "delta", "n_thresholds")
        shown = [{name: row[name] for name in row if name not in same} for row in rows]
        console().print(terminal.rich_table(shown))
        if any(row["n"] is None for row in rows):
            print("\nWithout n: no number of examples that is practical certifies such a gain.")
        if self.figure is not None:
            import pandas as pd

            from mera_tl.plots import sample_size_curves

            sample_size_curves(pd.DataFrame(rows)).write_html(self.figure)
            print(f"\nfigure in {self.figure}")
        return None

    def _withholding(self) -> None:
        """Say what share must be withheld at least, and how many examples show that it is enough.

        Raises:
            ValueError: if one of the two risks is missing, or a gain is planned for as well.
        """
        from mera_tl.certificate.withholding import (
            least_answered,
            least_withheld,
            withholding_table,
        )

        alpha, base = self.max_risk, self.base_risk
        others = ("gain", "churn", "pilot", "base", "min_gain", "n_thresholds", "figure")
        own = [name for name in others if getattr(self, name) != getattr(Plan, name)]
        if alpha is None or base is None or own:
            without = "".join(f", without --{name.replace('_', '-')}" for name in own)
            raise ValueError(
                f"Withholding is planned for by --max-risk and --base-risk together{without}; "
                "for example --max-risk 0.05 --base-risk 0.2."
            )
        if base <= alpha:
            raise ValueError(
                f"Nothing need be withheld: {base:.3g} of the answers are wrong as it is, and "
                f"{alpha:.3g} may be; pass a --max-risk below --base-risk."
            )
        least = least_withheld(base, alpha)
        rows = withholding_table(base, alpha, delta=self.delta, target=self.power)
        if self.json:
            return terminal.print_json([{"least_withheld": least, **row} for row in rows])
        print(
            f"To have at most {alpha:.3g} of the answers wrong, at least {100 * least:.1f} % of "
            "all must be\nwithheld, by a probe that knows every error; a real one withholds more.\n"
            f"At least {least_answered(alpha, self.delta):,} answers must be tested, if none of "
            "them is wrong.\n\n"
            f"calibration examples (n) for a certificate with probability {self.power:g}, by "
            "the risk\nleft:\n"
        )
        return console().print(terminal.rich_table(rows))


@dataclass(frozen=True)
class Monitor:
    """Watch audited traffic: should a certificate be withdrawn? Exit code 1 if so.

    For example:

      $ mera monitor pairs.jsonl
      $ mera monitor outcomes.jsonl --log audit.jsonl
    """

    pairs: Positional[Path]
    """JSONL, a line per audited pair, oldest first: {"steered": 1, "unsteered": 0}."""
    log: Path | None = None
    """What steering.attach(model, log=...) wrote of all traffic. Each pair then also names its
    "prompt", by mera_tl.steering.hash_of_prompt, and where nothing was moved it needs no
    "unsteered"."""
    state: Path = Path("monitor.json")
    """Where the state is kept; started again, only new lines of `pairs` are read."""
    floor: float | None = None
    """Least mean gain that is still acceptable. Default: 0, or that of the state."""

    def __call__(self) -> None:
        from mera_tl.certificate.monitor import go_on, read_gains, resume

        watch = resume(self.state, floor=self.floor)
        if not self.pairs.is_file():
            raise ValueError(f"There is no file {self.pairs}; pass the JSONL of audited pairs.")
        log = None if self.log is None else terminal.read_lines(self.log)
        pairs = terminal.read_lines(self.pairs)
        watch = go_on(watch, read_gains(pairs, log))
        watch.save(self.state)
        print(watch)
        if watch.withdraw:
            sys.exit(1)


@dataclass(frozen=True)
class Tasks:
    """List the tasks."""

    json: bool = False
    """Print JSON, with all that is known of each."""

    def __call__(self) -> None:
        from mera_tl.tasks.loading import describe_tasks

        if self.json:
            return terminal.print_json(describe_tasks())
        rows = [
            {
                "task": r["name"],
                "answers": "scored replies" if r["scored"] else r["options"],
                "from": r["hub"] or r["plain"],
            }
            for r in describe_tasks()
        ]
        return console().print(terminal.rich_table(rows))


@dataclass(frozen=True)
class Methods:
    """List the methods."""

    json: bool = False
    """Print JSON, with what each works on."""

    def __call__(self) -> None:
        from mera_tl.methods.methods import METHODS

        if self.json:
            names = ("name", "about", "certifies", "in_latents", "on")
            rows = [{name: getattr(each, name) for name in names} for each in METHODS.values()]
            return terminal.print_json(rows)
        rows = [
            {"method": each.name, "for": {"both": "any"}.get(each.on, each.on), "is": each.about}
            for each in METHODS.values()
        ]
        return console().print(terminal.rich_table(rows))


@dataclass(frozen=True)
class Models:
    """List the models that load by name."""

    search: str = ""
    """Only those whose name or architecture contains this."""
    json: bool = False
    """Print JSON, of all that are found."""

    def __call__(self) -> None:
        from mera_tl.models.listing import describe_models

        found = describe_models(self.search)
        if self.json:
            return terminal.print_json(found)
        if not found:
            print(f"No model of the list has {self.search!r} in its name or architecture.")
        shown = found if self.search else found[:12]
        # Without the family, names of usual length stay whole in 80 columns.
        rows = [{name: row[name] for name in row if name != "family"} for row in shown]
        console().print(terminal.rich_table(rows))
        if len(shown) < len(found):
            print(f"and {len(found) - len(shown):,} more: mera models --search llama")
        print("\nand any decoder-only model of the hub, Hugging Face folder or .gguf file")
        return None


@dataclass(frozen=True, kw_only=True)
class Doctor(RunOptions):
    """Check the installation; with --model and --task, estimate what `mera run` needs."""

    model: str | None = None
    """A model, as `mera run` takes it."""
    task: str | None = None
    """A task, likewise."""

    def __call__(self) -> None:
        from mera_tl.benchmark.doctor import examine

        if self.model is None and self.task is None:
            checks = examine()
            for check in checks:
                console().print(str(check), markup=False)
            if any(check.works is False for check in checks):
                sys.exit(1)
            return
        if self.model is None or self.task is None:
            raise ValueError(
                "An estimate needs both --model and --task; pass neither to check the machine."
            )
        from mera_tl.benchmark.memory import estimate, planned

        found = estimate(planned(RunConfig(**vars(self))))
        print(found)
        if not found.fits:
            sys.exit(1)


def _how(method: str, treatment: Any) -> str:
    if treatment.answer is not None:
        return f"answered by {method}"
    return f"{'' if treatment.fwd_hooks else 'not '}steered by {method}"


def _page_of(told: Any, record: dict[str, Any], how: str, prompt: str) -> str:
    """Return a page: the prompt, what is answered, what was read and moved."""
    from mera_tl.plots import option_bars
    from mera_tl.report.html import render

    figures = {"ledger": told.figure()}
    if told.replies == (None, None):
        figures = {"answer": option_bars(told.options, *told.probs), **figures}
    title = f"One prompt, {record['model']} on {record['task']}, {how}"
    return render(title, figures, prompt=prompt)


def _answered_otherwise(told: Any, treatment: Any, opened: Any, example: Any) -> Any:
    """Return a ledger with the answer that a method gives without moving anything, and why."""
    import torch

    from mera_tl.tasks.task import Task

    outcomes = treatment.apply(opened, Task("one", (example,), "all"))
    said, probs = int(outcomes.predictions[0]), outcomes.probs[0].tolist()
    predicted = float(torch.sigmoid(outcomes.max_score[0]))
    return replace(
        told,
        answers=(told.answers[0], example.options[said] if said >= 0 else None),
        probs=(told.probs[0], tuple(round(p, 6) for p in probs)),
        instead=f"predicted error {predicted:.3g}, and {treatment.instead}",
    )


def _example(command: Explain, folder: Any, opened: Any, method: str) -> Any:
    """Return the example that was asked for; by default one that the method recovered."""
    examples = {e.row: e for split in opened.splits for e in split.examples}
    if command.prompt is not None:
        some = next(iter(examples.values()))
        return some.with_text(command.prompt) if some.text else replace(some, prompt=command.prompt)
    row = command.row
    if row is None:
        changes = folder.changes(method)
        better = changes[changes["change"] == "0->1"] if len(changes) else changes
        row = int(better["row"].iloc[0]) if len(better) else next(iter(examples))
    if row not in examples:
        rows = ", ".join(str(row) for row in list(examples)[-5:])
        raise ValueError(f"Row {row} is in no split of this run; {rows} are.")
    return examples[row]
