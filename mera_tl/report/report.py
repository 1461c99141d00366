"""A run as one page to show around: question, data, decision, figures, examples, how to repeat it.

Everything is read back from run folders; no model is loaded. Beside the page lie the figures as
JSON and the numbers in them as CSV.
"""

import html
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mera_tl import plots, storage
from mera_tl.benchmark.records import table
from mera_tl.report.html import figure_block, prompt_html, table_html, write_page
from mera_tl.report.run_folder import RunFolder, find_runs, records_frame

N_EXAMPLES = 10


def write_report(
    folders: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    images: bool = False,
) -> Path:
    """Write a self-contained page about one run or several, and its figures beside it.

    `folders` are run folders, or folders of them. The page is `out`, or report.html in the first
    folder; figures go to a folder of the same name, with `images` as SVG and PNG too, where kaleido
    finds a browser. Works offline and stays below 6 MB.

    Raises:
        ValueError: if a folder holds no run, or records of another format.
    """
    runs = find_runs(folders)
    first = Path(folders if isinstance(folders, str | Path) else folders[0])
    out = Path(out) if out is not None else first / "report.html"
    gathered = _Figures(out.with_suffix(""), images=images)
    if len(runs) == 1:
        title = f"Steering {runs[0].title}"
        body = "".join(_run(runs[0], gathered))
    else:
        title = f"Steering, {len(runs)} runs compared"
        body = "".join(_overview(runs, gathered))
    page = write_page(title, f"<h1>{html.escape(title)}</h1>\n{body}", gathered.figures)
    storage.write_text(out, page)
    return out


class _Figures:
    """The figures of a page, each written as JSON and CSV when it is placed."""

    def __init__(self, folder: Path, *, images: bool = False) -> None:
        self.folder, self.images = folder, images
        self.figures: dict[str, go.Figure] = {}

    def place(self, name: str, figure: go.Figure, frame: pd.DataFrame) -> str:
        """Keep a figure and return its block in the page."""
        self.figures[name] = figure
        storage.write_text(self.folder / f"{name}.json", str(figure.to_json(pretty=True)))
        storage.write_text(self.folder / f"{name}.csv", frame.to_csv(index=False))
        where = f"{self.folder.name}/{name}"
        links = f' (<a href="{where}.json">JSON</a>, <a href="{where}.csv">CSV</a>)'
        return figure_block(name, figure, links=links)

    def write_images(self) -> str:
        """Write SVG and PNG files, if asked to; say in a sentence what came of it."""
        if not self.images:
            return (
                "For SVG and PNG files of the figures make the report again with --images; "
                "every figure's own menu saves a PNG."
            )
        if find_spec("kaleido") is None:
            return (
                "SVG and PNG files were not written: kaleido is not installed; run "
                "`pip install mera-tl[images]`."
            )
        figures = [str(self.folder / f"{name}.json") for name in self.figures]
        try:
            # In a process of its own: a browser that hangs must not hold up the page.
            subprocess.run(
                [sys.executable, "-c", _WRITE_IMAGES, *figures],
                check=True,
                capture_output=True,
                text=True,
                timeout=60 + 20 * len(figures),
            )
        except subprocess.TimeoutExpired:
            return "SVG and PNG files were not written: the browser did not answer in time."
        except subprocess.CalledProcessError as error:
            why = (str(error.stderr).strip().splitlines() or ["kaleido failed"])[-1]
            return f"SVG and PNG files were not written: {why}"
        return f"The figures also lie in {self.folder.name}/ as SVG and PNG."


_WRITE_IMAGES = """
import sys, plotly.io
figures = [plotly.io.from_json(open(path, encoding="utf-8").read()) for path in sys.argv[1:]]
for kind in ("svg", "png"):
    paths = [path.removesuffix("json") + kind for path in sys.argv[1:]]
    plotly.io.write_images(figures, paths, width=900)
"""


# --- one run ------------------------------------------------------------------------------------


def _run(run: RunFolder, figures: _Figures, *, prefix: str = "") -> Iterator[str]:
    """Yield the page of a run from top to bottom."""
    yield _question(run)
    yield "<h2>The decision</h2>\n"
    yield from _decisions(run)
    yield from _certificates(run, figures, prefix)
    yield "<h2>Where the model's errors can be read</h2>\n"
    yield from _probes(run, figures, prefix)
    yield "<h2>What steering did to the test examples</h2>\n"
    yield from _effects(run, figures, prefix)
    yield f"<h2>Examples that changed</h2>\n{_examples(run)}"
    yield f"<h2>Side effects</h2>\n{_side_effects(run)}"
    yield f"<h2>How to repeat this</h2>\n{_provenance(run, figures)}"


def _question(run: RunFolder) -> str:
    first = run.records[0]
    base = first["accuracy"] - first["accuracy_change"]
    name, task = html.escape(first["model"]), html.escape(first["task"])
    return (
        f"<p>Can <b>{name}</b> be steered away from its own errors on <b>{task}</b>, and is that "
        f"certain enough to do it? Unsteered, it answers {base:.1%} of {first['n']:,} test "
        f"examples correctly{_constant(run)}. {first['n_train']:,} training examples fitted the "
        f"probes, {first['n_calibration']:,} calibration examples decided, the test examples were "
        "answered only at the end; the three sets are disjoint.</p>\n"
    )


def _constant(run: RunFolder) -> str:
    """Say what the best constant answer would get: a steering that only finds it is no insight."""
    answers = run.changes("no_steering")
    if answers.empty:
        return ""
    share = answers["label"].value_counts(normalize=True)
    return f' (always "{html.escape(str(share.index[0]))}" would get {share.iloc[0]:.1%})'


def _decisions(run: RunFolder) -> Iterator[str]:
    for method, certificate in run.certificates.items():
        record = run.record(method)
        base = record["accuracy"] - record["accuracy_change"]
        moved = record["transitions"]
        result = "On the test examples the model is left alone, bit for bit."
        if not certificate.abstained:
            result = (
                f"On the test examples: accuracy from {base:.3f} to {record['accuracy']:.3f} "
                f"(SPI {record['spi']:+.2f}), {moved['0->1']} recovered, {moved['1->0']} regressed."
            )
        kind = "abstain" if certificate.abstained else "steer"
        yield (
            f'<div class="card {kind}"><p><b>{html.escape(method)}</b></p>'
            f"<p>{html.escape(str(certificate))}</p><p>{result}</p></div>\n"
        )
    if not run.certificates:
        yield "<p>No method of this run asks for a certificate; all are measured below.</p>\n"


def _decision_rows(run: RunFolder) -> Iterator[dict[str, Any]]:
    """Yield the certificates of a run in a line each."""
    for method, certificate in run.certificates.items():
        yield {
            "run": run.title,
            "method": method,
            "decision": certificate.decision.value,
            "threshold": certificate.threshold,
            "gain at least": None if certificate.abstained else certificate.best.lower,
            "gain on test": run.record(method)["accuracy_change"],
        }


def _certificates(run: RunFolder, figures: _Figures, prefix: str) -> Iterator[str]:
    """Yield the curves: those of the main method in sight, the others folded away.

    A search certifies a single choice, which has no curve; its numbers stand in words above.
    """
    grids = [name for name, kept in run.certificates.items() if len(kept.evidence) > 1]
    order = sorted(grids, key=lambda method: method != run.main_method)
    for i, method in enumerate(order):
        frame = run.evidence(method)
        curve = figures.place(f"{prefix}curve_{method}", plots.steering_curve(frame), frame)
        bars = figures.place(f"{prefix}evidence_{method}", plots.calibration_evidence(frame), frame)
        summary = f"<summary>{html.escape(method)}: curve and evidence</summary>"
        yield curve + bars if i == 0 else f"<details>{summary}{curve}{bars}</details>\n"


def _probes(run: RunFolder, figures: _Figures, prefix: str) -> Iterator[str]:
    frame = run.probe_errors()
    if frame.empty:
        yield "<p>This run has fitted no probe.</p>\n"
        return
    n = run.records[0]["n_train"]
    for metric in ("rmse", "auroc"):
        figure = plots.probe_error(frame, metric=metric, n=n)
        yield figures.place(f"{prefix}probe_{metric}", figure, frame)


def _effects(run: RunFolder, figures: _Figures, prefix: str) -> Iterator[str]:
    frame = records_frame(run.records)
    yield figures.place(f"{prefix}spi", plots.spi_dots(frame), frame)
    yield figures.place(f"{prefix}transitions", plots.transitions(frame), frame)
    yield table_html(table(run.records).drop(columns=["model", "task"]))
    method = run.main_method
    changes = pd.DataFrame() if method is None else run.changes(method)
    if not changes.empty:
        names = {"row": "row", "error_before": "before", "error_after": "after", "change": "change"}
        errors = pd.DataFrame({new: changes[old] for old, new in names.items()})
        figure = plots.error_before_after(errors, method=str(method))
        yield figures.place(f"{prefix}errors", figure, errors)
    shown = method
    if method is None or run.reach(method) is None:
        # Where all abstain there are still the examples that a certificate was sought for.
        shown = next(iter(run.certificates), None)
    if shown is not None:
        yield from _reach(run, figures, prefix, shown)


def _reach(run: RunFolder, figures: _Figures, prefix: str, method: str) -> Iterator[str]:
    """Yield whom a steering reaches: by predicted error, by layer and token, in the plane."""
    certificate, reach, cloud = run.certificates.get(method), run.reach(method), run.cloud(method)
    if reach is not None:
        threshold = certificate.threshold if certificate else None
        layers = reach.layers.tolist()
        layer = cloud.layer if cloud is not None else layers[0]
        predicted = run.predicted(method, layer)
        figure = plots.predicted_error(predicted, method=method, layer=layer, threshold=threshold)
        yield figures.place(f"{prefix}predicted", figure, predicted)
        share, n = reach.positions(), len(reach.before)
        figure = plots.steered_share(share, method=method, n=n)
        yield figures.place(f"{prefix}share", figure, share)
    if cloud is not None:
        plane = cloud.plane(seed=run.config.seed)
        figure = plots.geometry(plane, method=method, layer=cloud.layer, limit=cloud.limit)
        yield figures.place(f"{prefix}geometry", figure, plane)


# --- examples, side effects, provenance ---------------------------------------------------------


def _examples(run: RunFolder) -> str:
    method = run.main_method
    changes = pd.DataFrame() if method is None else run.changes(method)
    if changes.empty:
        return "<p>No method changed whether an answer is correct.</p>\n"
    try:
        prompts = {example.row: example.prompt for example in run.test_task().examples}
    except (ValueError, OSError) as error:
        return f"<p>The prompts cannot be shown: {html.escape(str(error))}</p>\n"
    blocks = []
    for row in _draw(changes.to_dict("records"), run.config.seed):
        better = row["change"] == "0->1"
        verdict = "recovered" if better else "regressed"
        blocks.append(
            f'<div class="card {"steer" if better else "abstain"}"><p><b>{verdict}</b>, row '
            f"{row['row']}: true {_word(row['label'])}; answered {_word(row['prediction_before'])} "
            f"(error {row['error_before']:.2f}), steered {_word(row['prediction_after'])} "
            f"(error {row['error_after']:.2f})</p>"
            f"{prompt_html(prompts[row['row']])}</div>\n"
        )
    counts = run.record(str(method))["transitions"]
    intro = (
        f"<p>Of {counts['0->1']} recovered and {counts['1->0']} regressed test examples of "
        f"<b>{method}</b>, these were drawn by seed {run.config.seed}, not chosen.</p>\n"
    )
    return intro + "".join(blocks)


def _draw(changes: Sequence[dict[Any, Any]], seed: int) -> list[dict[Any, Any]]:
    """Draw ten changed examples, half of each kind where there are enough."""
    rng, half = random.Random(seed), N_EXAMPLES // 2
    better, worse = ([c for c in changes if c["change"] == kind] for kind in ("0->1", "1->0"))
    n_better = min(len(better), max(half, N_EXAMPLES - len(worse)))
    n_worse = min(len(worse), N_EXAMPLES - n_better)
    return rng.sample(better, n_better) + rng.sample(worse, n_worse)


def _word(answer: Any) -> str:
    return "nothing" if answer is None else f"<b>{html.escape(str(answer))}</b>"


def _side_effects(run: RunFolder) -> str:
    """Tabulate what else changed: probabilities, balance of answers, unanswered prompts."""
    rows = []
    for record in run.records:
        answers = run.changes(record["method"])
        said = {} if answers.empty else answers["prediction_after"].value_counts().to_dict()
        rows.append(
            {
                "method": record["method"],
                "regressed": record["transitions"]["1->0"],
                "error change": record["error_change"],
                "weighted F1": record["f1"],
                "unanswered": record["unanswered"],
                "tokens steered": record["steered_share"],
                **_free_text(record),
                **{f'answers "{option}"': int(count) for option, count in sorted(said.items())},
            }
        )
    frame = pd.DataFrame(rows).fillna(0)
    counts = [name for name in frame if name.startswith("answers ")]
    return (
        "<p>Accuracy is not all: a method may also shift the balance of answers, leave prompts "
        "unanswered, or make right answers less sure.</p>\n"
    ) + table_html(frame.astype(dict.fromkeys(counts, int)))


def _free_text(record: dict[str, Any]) -> dict[str, float]:
    told = record.get("free_text")
    if not told:
        return {}
    return {"perplexity": told["perplexity"], "distinct word pairs": told["distinct_2"]}


def _provenance(run: RunFolder, figures: _Figures) -> str:
    first = run.records[0]
    hashes = first["hashes"]
    rows = [{"what": "configuration", "value": hashes["config"]}]
    rows += [{"what": "model", "value": hashes["model"]}]
    rows += [{"what": f"{role} data", "value": value} for role, value in hashes["data"].items()]
    rows += [{"what": name, "value": value} for name, value in first["versions"].items()]
    return (
        f"<pre>{html.escape(run.command)}\nmera report {html.escape(run.path.name)}</pre>\n"
        f"<p>Hashes and versions:</p>\n{table_html(pd.DataFrame(rows))}"
        f'<p class="soft">{html.escape(figures.write_images())}</p>\n'
    )


# --- several runs -------------------------------------------------------------------------------


def _overview(runs: Sequence[RunFolder], figures: _Figures) -> Iterator[str]:
    """Yield the comparison of all runs, then each run folded away."""
    records = [record for run in runs for record in run.records]
    models = sorted({record["model"] for record in records})
    tasks = list(dict.fromkeys(record["task"] for record in records))
    yield (
        f"<p>Can {html.escape(' and '.join(models))} be steered away from its own errors on "
        f"{html.escape(', '.join(tasks))}, and where is that certain enough to do it?</p>\n"
    )
    yield "<h2>The decisions</h2>\n"
    yield "<p>The certificates in words stand with each run below.</p>\n"
    yield table_html(pd.DataFrame([row for run in runs for row in _decision_rows(run)]))
    yield "<h2>Methods by task</h2>\n"
    frame = records_frame(records)
    yield figures.place("spi_heatmap", plots.spi_heatmap(frame), frame)
    yield figures.place("spi_dots", plots.spi_dots(frame), frame)
    yield figures.place("transitions", plots.transitions(frame), frame)
    if {"raw", "sae"} <= set(frame["space"]):
        yield figures.place("raw_against_sae", plots.raw_against_sae(frame), frame)
    yield table_html(table(records))
    yield "<h2>The runs one by one</h2>\n"
    for i, run in enumerate(runs):
        inside = "".join(_run(run, figures, prefix=f"run{i}_"))
        yield f"<details><summary>{html.escape(run.title)}</summary>{inside}</details>\n"
