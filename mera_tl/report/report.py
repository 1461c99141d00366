"""A run as one page to show around: verdict, evidence, examples, methods, how to repeat it.

Everything is read back from run folders; no model is loaded. Beside the page lie the figures as
JSON and the numbers in them as CSV. The templates say where everything stands; here it is gathered.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mera_tl import plots, storage
from mera_tl.benchmark.recommendation import decided
from mera_tl.benchmark.records import promise
from mera_tl.certificate.certificate import percent
from mera_tl.plots.style import knob_axis
from mera_tl.report import tables
from mera_tl.report.html import Block, Figures, Table, render
from mera_tl.report.run_folder import RunFolder, find_runs, records_frame

MOST_EXAMPLES = 600
"""Examples on a page at most: first those that changed; more make it slow."""
MOST_LAYERS = 32
"""Layers whose predictions are drawn, one at a time."""
LONGEST_PROMPT = 4000
"""Characters of a prompt that are shown."""


def write_report(
    folders: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    images: bool = False,
) -> Path:
    """Write a self-contained page about one run or several, and its figures beside it.

    `folders` are run folders, or folders of them. The page is `out`, or report.html in the first
    folder; figures go to a folder <page>_files, with `images` as SVG and PNG too, where kaleido
    finds a browser. Works offline.

    Raises:
        ValueError: if a folder holds no run, or records of another format.
    """
    runs = find_runs(folders)
    first = Path(folders if isinstance(folders, str | Path) else folders[0])
    out = Path(out) if out is not None else first / "report.html"
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a file, such as {out / 'report.html'}.")
    figures = Figures(out.with_name(f"{out.stem}_files"), images=images)
    if len(runs) == 1:
        title, template = f"Steering {runs[0].title}", "run.html"
        context = {"r": _run(runs[0], figures)}
    else:
        title, template = f"Steering, {len(runs)} runs compared", "overview.html"
        context = _overview(runs, figures)
    images_said = figures.write_images()
    page = render(title, figures.figures, template=template, images=images_said, **context)
    storage.write_text(out, page)
    return out


# --- one run ------------------------------------------------------------------------------------


def _run(run: RunFolder, figures: Figures) -> dict[str, Any]:
    """Gather what the page of a run shows, from top to bottom."""
    first, verdict, frame = run.records[0], run.verdict, records_frame(run.records)
    main, asked = run.main_method, _asked(run)
    changes = run.changes(main or "")
    certificate = run.certificates[verdict.method] if verdict.method else None
    return {
        "id": figures.prefix,
        "title": run.title,
        "verdict": verdict,
        "what": run.recommendation.what,
        "warnings": run.warnings,
        **{name: first[name] for name in ("model", "task", "n", "n_train", "n_calibration")},
        "constant": _constant(run),
        "winner": [*_winner(run), *filter(None, [run.trust, promise(run.records)])],
        "certificate": str(certificate or ""),
        "evidence": list(_evidence(run, figures, asked)) if asked else [],
        "ways": Table.of(tables.ways(run)),
        "slider": _slider(run, figures.prefix, asked) if asked else None,
        "shown_method": main,
        **_examples(run, changes),
        "scatter": list(_scatter(changes, figures, str(main))),
        "methods": Table.of(tables.methods(run)),
        "n_methods": len(run.records),
        "comparison": [
            figures.place("spi", plots.spi_dots(frame), frame),
            figures.place("transitions", plots.transitions(frame), frame),
        ],
        "others": list(_others(run, figures, asked)),
        "reading": list(_reading(run, figures)),
        "failures": Table.of(tables.failures(run)),
        **_moved(run, figures),
        "side": Table.of(tables.side_effects(run)),
        # An option a line: a narrow page would break them at their hyphens.
        "command": run.command.replace(" --", " \\\n  --") + f"\nmera report {run.path.name}",
        "hashes": Table.of(tables.hashes(run)),
    }


def _constant(run: RunFolder) -> str:
    """Say what the best constant answer would get: a steering that only finds it is no insight."""
    answers = run.changes("no_steering")
    if answers.empty or "finish_before" in answers:  # of a reply that is scored nothing is constant
        return ""
    share = answers["label"].value_counts(normalize=True)
    return f' (always "{share.index[0]}" would get {100 * share.iloc[0]:.1f} %)'


_WHERE = {
    "all": "every token",
    "last": "from the final prompt token on",
    "generated": "generated tokens",
    "final": "read at the final prompt token",
}


def _winner(run: RunFolder) -> Iterator[str]:
    """Say what steers, how it was chosen, what is certified, what it did and what it cost."""
    verdict = run.verdict
    if verdict.method is None:
        yield f"{verdict.sentence}. On the test examples nothing changes, bit for bit."
        return
    record, certificate = run.record(verdict.method), run.certificates[verdict.method]
    best, moved, details = certificate.best, record["transitions"], record["details"]
    yield _what(run, record)
    if "n_candidates" in details:
        yield (
            f"Chosen among {details['n_candidates']:,} candidates, of which "
            f"{len(run.tried(verdict.method)):,} were run, on {details['n_search']:,} training "
            "examples held out from fitting; then tested once."
        )
    promise = verdict.sentence.partition(">= ")[2].rstrip(")")
    yield (
        f"Certified: at least {promise}, from {certificate.n:,} calibration examples "
        f"({best.recoveries} better, {best.regressions} worse)."
    )
    yield (
        f"On the test examples: {moved['0->1']} recovered, {moved['1->0']} regressed "
        f"(SPI {record['spi']:+.2f})."
    )
    if record["steered_share"]:
        yield (
            f"Cost: {percent(record['steered_share'])} of the examples are moved, by "
            f"{record['relative_shift']:.2f} of the residual's norm on average."
        )


def _what(run: RunFolder, record: dict[str, Any]) -> str:
    """Say what a method reads and moves: probe, direction, layers, tokens, threshold."""
    details, config = record["details"], run.config
    layers = details.get("layers", config.layers)
    layers = ", ".join(map(str, layers)) if isinstance(layers, list) else layers
    penalty = details.get("penalty")
    probe = details.get("probe", "ridge")
    probe = "one probe per answer" if penalty is None else f"{probe} probe, penalty {penalty:g}"
    parts = [probe, f"layer {layers}" if layers not in ("all", "best") else f"{layers} layers"]
    threshold = record["threshold"]
    if record["method"] == "flip":
        at = "" if threshold is None else f" {threshold:.3g}"
        parts += [f"answers the second-best option above predicted error{at}, moves nothing"]
    elif record["method"] == "class_probe":
        parts = [f"a classifier of layer {layers}, penalty {penalty:g}, answers; nothing is moved"]
    else:
        parts = [f"direction {details.get('direction', 'euclidean')}", *parts]
        parts += [_WHERE.get(details.get("positions", config.positions), "")]
        if details.get("first_k") is not None:
            parts += [f"of the reply its first {details['first_k']} tokens"]
        if threshold is not None:
            parts += [f"threshold {threshold:.3g}"]
        if details.get("strength"):
            parts += [f"strength {details['strength']:g}: a shift of fixed length"]
    said = "; ".join(filter(None, parts))
    return f"{said[0].upper()}{said[1:]}."


def _asked(run: RunFolder) -> str | None:
    """Return the certificate that the verdict rests on: the winner's, else the nearest to one."""
    best = {m: max(row.gain for row in c.evidence) for m, c in run.certificates.items()}
    return run.verdict.method or max(best, key=lambda method: best[method], default=None)


def _evidence(run: RunFolder, figures: Figures, method: str) -> Iterator[Block]:
    """Yield what a decision rests on: the search's own figure, or curve and bars of a grid."""
    tried = run.tried(method)
    if not tried.empty:
        yield figures.place(f"search_{method}", plots.search_table(tried), tried)
        if "foreseen" in tried and len(tried["foreseen"].dropna()):
            yield figures.place(f"foresight_{method}", plots.foresight(tried), tried)
    elif len(run.certificates[method].evidence) > 1:
        frame = run.evidence(method)
        yield figures.place(f"curve_{method}", plots.steering_curve(frame), frame)
        yield figures.place(f"evidence_{method}", plots.calibration_evidence(frame), frame)


def _slider(run: RunFolder, prefix: str, method: str) -> dict[str, Any] | None:
    """Say for every threshold what it recovers and breaks, and where it lies in the figures."""
    tried, record = run.tried(method), run.record(method)
    frame = run.evidence(method) if tried.empty else _siblings(tried, record["details"])
    if len(frame) < 2:
        return None
    if tried.empty:
        chosen = run.certificates[method].threshold
        note = "Counted on the calibration examples; all bounds hold at once."
        x, _ = knob_axis(frame["threshold"], str(frame["knob"].iloc[0]))
        marks = [{f"{prefix}curve_{method}": (float(at), None)} for at in x]
    else:
        chosen = record["threshold"]
        note = "Counted on training examples that chose among all candidates: no promise."
        share = 100 * frame[["regressions", "recoveries"]].div(frame["n"], axis=0)
        marks = [{f"{prefix}search_{method}": tuple(at)} for at in share.to_numpy().tolist()]
    says: list[str] = []
    for row, mark in zip(frame.to_dict("records"), marks, strict=True):
        if method == run.verdict.method:
            mark[f"{prefix}predicted"] = (row["threshold"], None)
        sure = ""
        if "lower" in row:
            certified = "certified" if row["certified"] else "not certified"
            sure = f"; gain at least {100 * row['lower']:+.1f} points: {certified}"
        says.append(
            f"{row['recoveries']:.0f} recovered, {row['regressions']:.0f} regressed of "
            f"{row['n']:,.0f}: {100 * row['gain']:+.1f} points{sure}."
        )
    nearest = (frame["threshold"] - (0.5 if chosen is None else chosen)).abs().to_numpy().argmin()
    labels = [f"{value:.3g}" for value in frame["threshold"]]
    return {"labels": labels, "says": says, "marks": marks, "chosen": int(nearest), "note": note}


def _siblings(tried: pd.DataFrame, chosen: dict[str, Any]) -> pd.DataFrame:
    """Return the candidates that differ from the chosen one in their threshold alone."""
    same = pd.Series(True, index=tried.index)
    for name in ("direction", "penalty", "layers", "positions", "first_k", "strength"):
        wanted = chosen.get(name)
        if name not in tried:  # in searches made before there was one
            continue
        same &= tried[name].map(lambda v, w=wanted: v == w or (w is None and v != v))
    return pd.DataFrame(tried[same]).sort_values("threshold")


def _others(run: RunFolder, figures: Figures, asked: str | None) -> Iterator[dict[str, Any]]:
    """Yield the other certificates, those that abstain last."""
    others = [m for m in run.certificates if m != run.verdict.method]
    for method in sorted(others, key=lambda m: run.certificates[m].abstained):
        certificate, record = run.certificates[method], run.record(method)
        moved = record["transitions"]
        result = "On the test examples the model is left alone, bit for bit."
        if not certificate.abstained:
            result = (
                f"On the test examples: accuracy {record['accuracy']:.3f} "
                f"(SPI {record['spi']:+.2f}), {moved['0->1']} recovered, {moved['1->0']} regressed."
            )
        yield {
            "method": method,
            "decision": decided(method, certificate.decision.value),
            "abstained": certificate.abstained,
            "sentence": str(certificate),
            "result": result,
            # What was asked for has its evidence above.
            "figures": [] if method == asked else list(_evidence(run, figures, method)),
        }


def _reading(run: RunFolder, figures: Figures) -> Iterator[Block]:
    frame = run.probe_errors()
    for metric in ("rmse", "auroc") if len(frame) else ():
        figure = plots.probe_error(frame, metric=metric, n=run.records[0]["n_train"])
        yield figures.place(f"probe_{metric}", figure, frame)


def _moved(run: RunFolder, figures: Figures) -> dict[str, Any]:
    """Gather whom a steering reaches: by predicted error in each layer, by token, in the plane.

    Of the verdict's method, or of the certified one that moves activations.
    """
    steering = [m for m, c in run.certificates.items() if not c.abstained and run.reach(m)]
    method = run.main_method if run.reach(run.main_method or "") else next(iter(steering), None)
    reach = run.reach(method or "")
    if method is None or reach is None:
        return {"moved": [], "by_layer": []}
    cloud, record = run.cloud(method), run.record(method)
    layers = reach.layers.tolist()
    main = cloud.layer if cloud is not None else layers[0]
    about: Any = {"method": method, "fixed": bool(record["details"].get("strength"))}
    # The main layer first: what the slider marks, and what is drawn before anything is chosen.
    by_layer, places = [], []
    for layer in sorted(layers, key=lambda each: (each != main, each))[:MOST_LAYERS]:
        predicted = run.predicted(method, layer)
        figure = plots.predicted_error(
            predicted, threshold=record["threshold"], layer=layer, **about
        )
        name = "predicted" if layer == main else f"predicted_{layer}"
        by_layer.append((layer, figures.place(name, figure, predicted)))
    if cloud is not None:
        plane = cloud.plane(seed=run.config.seed)
        figure = plots.geometry(plane, limit=cloud.limit, layer=main, **about)
        places.append(figures.place("geometry", figure, plane))
    share = reach.positions()
    figure = plots.steered_share(share, method=method, n=len(reach.before))
    places.append(figures.place("share", figure, share))
    return {"moved": places, "by_layer": by_layer}


# --- examples ---------------------------------------------------------------------------------


def _examples(run: RunFolder, changes: pd.DataFrame) -> dict[str, Any]:
    """Gather examples with their options' probabilities before and after, changed ones first."""
    if changes.empty:
        said = "No method changed whether an answer is correct."
        return {"explorer": None, "no_examples": said}
    try:
        test = run.test_task()
    except (ValueError, OSError) as error:
        return {"explorer": None, "no_examples": f"The prompts cannot be shown: {error}"}
    prompts = {example.row: example.prompt for example in test.examples}
    predicted = _predictions(run, changes)
    rows, rng = changes.to_dict("records"), random.Random(run.config.seed)
    said = "reply" if test.scored else "prediction"  # replies stand side by side as they are
    # Drawn by seed, not chosen; a stable sort keeps the draw within each kind.
    drawn = sorted(rng.sample(rows, len(rows)), key=lambda row: row["change"] in ("0->0", "1->1"))
    shown = [
        {
            "row": row["row"],
            "label": row["label"],
            "change": row["change"],
            "before": row[f"{said}_before"],
            "after": row[f"{said}_after"],
            "error_before": _short(row["error_before"]),
            "error_after": _short(row["error_after"]),
            "p_before": list(map(_short, row["probs_before"])),
            "p_after": list(map(_short, row["probs_after"])),
            "predicted": predicted.get(row["row"], []),
            "reply": None if test.scored else row.get("reply_after"),
            "prompt": prompts[row["row"]][-LONGEST_PROMPT:],
        }
        for row in drawn[:MOST_EXAMPLES]
    ]
    left = len(rows) - len(shown)
    note = f", of {len(rows):,}: all that changed, others drawn by seed" if left > 0 else ""
    explorer = {"options": list(test.options), "rows": shown, "drawn": note}
    return {"explorer": explorer, "no_examples": ""}


def _predictions(run: RunFolder, changes: pd.DataFrame) -> dict[int, list[Any]]:
    """Return, by row, each steered layer with its predicted error before and after."""
    reach = run.reach(run.main_method or "")
    if reach is None:
        return {}
    pairs = torch.stack([reach.before, reach.after], -1).tolist()
    layers, told = reach.layers.tolist(), zip(changes["row"], pairs, strict=True)
    return {
        row: [[n, *map(_short, pair)] for n, pair in zip(layers, each, strict=True)]
        for row, each in told
    }


def _short(share: float) -> float:
    return round(share, 4)


def _scatter(changes: pd.DataFrame, figures: Figures, method: str) -> Iterator[Block]:
    """Draw every example's error before and after; its points open the explorer's examples."""
    if not changes.empty:
        errors = pd.DataFrame(changes[["row", "error_before", "error_after", "change"]])
        errors = errors.rename(columns={"error_before": "before", "error_after": "after"})
        yield figures.place("errors", plots.error_before_after(errors, method=method), errors)


# --- several runs -------------------------------------------------------------------------------


def _overview(runs: Sequence[RunFolder], figures: Figures) -> dict[str, Any]:
    """Gather the comparison of all runs, then each run, folded away."""
    records = [record for run in runs for record in run.records]
    frame = records_frame(records)
    drawn = {
        "spi_heatmap": plots.spi_heatmap(frame),
        "spi_dots": plots.spi_dots(frame),
        "transitions": plots.transitions(frame),
    }
    return {
        "models": sorted({record["model"] for record in records}),
        "comparison": [figures.place(name, figure, frame) for name, figure in drawn.items()],
        "numbers": Table.of(tables.compared(records)),
        "runs": [_run(run, replace(figures, prefix=f"run{i}_")) for i, run in enumerate(runs)],
    }
