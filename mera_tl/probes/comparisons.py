"""Questions put to probes: where error can be read, how well, whether that is more than chance.

Every answer is a data frame, one row per layer and fit, for choosing on held-out folds and for
reporting on examples that no fold has seen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch

from mera_tl.probes import metrics
from mera_tl.probes.cross_validation import FULL, Examples, Fits, Grid, fit_grid, held_out_table
from mera_tl.probes.probe import LinearProbe, Position, Tasks, read_examples


def probe_path(
    activations: Tasks,
    *,
    untouched: Tasks | None = None,
    grid: Grid = FULL,
    positions: Sequence[Position] = ("last",),
    clip: float = 0.01,
    seed: int = 0,
) -> pd.DataFrame:
    """Fit every kind and penalty for every layer and position: one row each, with all metrics.

    Held-out metrics are for choosing (see `held_out_table`). Reporting takes the columns
    `untouched_*`: the fit on all examples, measured on activations that no fold has seen.

    Raises:
        ValueError: as `fit_error_probe`.
    """
    examples: dict[Position, Examples] = {p: read_examples(activations, p) for p in positions}
    tables = []
    for together in _same_examples(examples):
        parts = [examples[position] for position in together]
        stack = replace(parts[0], resid=torch.cat([part.resid for part in parts]))
        fits = fit_grid(stack, grid, clip=clip, seed=seed, refit=untouched is not None)
        table = held_out_table(stack, fits, clip=clip, seed=seed)
        place, table["layer"] = divmod(table["layer"], len(parts[0].resid))
        table.insert(0, "position", [together[i] for i in place])
        if untouched is not None:
            fresh = [read_examples(untouched, position) for position in together]
            table = table.join(_untouched(fits, fresh, clip))
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _same_examples(examples: Mapping[Position, Examples]) -> list[list[Position]]:
    """Group the positions that hold the same examples: all that were answered, or all there are.

    Their layers are fitted as one stack, which costs little more than one of them.
    """
    groups: dict[int, list[Position]] = {}
    for position, each in examples.items():
        groups.setdefault(len(each), []).append(position)
    return list(groups.values())


def _untouched(fits: Fits, fresh: Sequence[Examples], clip: float) -> pd.DataFrame:
    """Measure the refitted probes of each position on examples that no fold has seen."""
    n_layers, measured = len(fresh[0].resid), []
    for i, each in enumerate(fresh):
        score = fits.layers(i * n_layers, (i + 1) * n_layers).score(each.resid.double(), -1)
        measured.append(metrics.measure(score, each.error.double(), each.incorrect, clip=clip))
    columns = {name: torch.cat([part[name] for part in measured]) for name in metrics.METRICS}
    return pd.DataFrame({f"untouched_{name}": v.flatten().tolist() for name, v in columns.items()})


def transfer(probes: Mapping[str, LinearProbe], tasks: Mapping[str, Tasks]) -> pd.DataFrame:
    """Measure every probe on every task, at the probe's best layer."""
    rows = []
    for fitted_on, probe in probes.items():
        for measured_on, activations in tasks.items():
            row = probe.measure(activations).loc[probe.best_layer].to_dict()
            rows.append({"fitted_on": fitted_on, "measured_on": measured_on, **row})
    return pd.DataFrame(rows)


def selectivity(
    activations: Tasks,
    *,
    grid: Grid | None = None,
    position: Position = "last",
    clip: float = 0.01,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare each probe with one fitted to a control task, the same targets shuffled.

    What a probe reads beyond its control is in the activations and not in the probe's capacity
    (Hewitt and Liang, 2019). Returns the rows of `probe_path` with `auroc_control`, `r2_control`
    and the differences `auroc_selectivity`, `r2_selectivity`.
    """
    examples = read_examples(activations, position)
    tables = []
    for each in (examples, examples.shuffled(seed)):
        fits = fit_grid(each, grid or {"ridge": (3.0,)}, clip=clip, seed=seed, refit=False)
        tables.append(held_out_table(each, fits, clip=clip, seed=seed))
    table, control = tables
    for name in ("auroc", "r2"):
        table[f"{name}_control"] = control[name]
        table[f"{name}_selectivity"] = table[name] - control[name]
    return table
