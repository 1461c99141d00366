"""Run folders read back as data frames, the shape in which figures and reports take them."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mera_tl import store
from mera_tl.activations import Activations
from mera_tl.benchmark import FORMAT
from mera_tl.certificate import Calibration
from mera_tl.config import RunConfig, parse_layers
from mera_tl.probes import LinearProbe
from mera_tl.tasks import Task, load_task

MOST_POINTS = 800
"""Examples drawn in a cloud at most; more only cover one another."""


@dataclass(frozen=True, eq=False)
class RunFolder:
    """What a run has left in its folder."""

    path: Path
    config: RunConfig
    records: tuple[dict[str, Any], ...]

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Read a run.

        Raises:
            ValueError: if there is none, or its records have another format.
        """
        path = Path(path)
        records = store.read_records(path / "records.jsonl")
        if not records:
            raise ValueError(f"{path} holds no records.jsonl; pass the folder of a `mera run`.")
        formats = {record.get("format", 0) for record in records}
        if formats != {FORMAT}:
            raise ValueError(
                f"{path} holds records of format {sorted(formats)}, this version reads {FORMAT}; "
                "run it again into a new folder, or use the mera_tl that wrote it: "
                f"{records[0].get('versions', {}).get('mera-tl', 'unknown')}."
            )
        names = {field.name for field in fields(RunConfig)}
        kept = store.read_json(path / "config.json")
        config = RunConfig(**{name: value for name, value in kept.items() if name in names})
        return cls(path, config, tuple(records))

    @property
    def title(self) -> str:
        """Model, task and seed."""
        first = self.records[0]
        space = "" if first["space"] == "raw" else " in SAE space"
        return f"{first['model']} on {first['task']}{space}, seed {first['seed']}"

    @property
    def command(self) -> str:
        """The command line that makes this run again; what is default is left out."""
        config = self.config
        parts = ["mera run --model", shlex.quote(config.model), "--task", shlex.quote(config.task)]
        for field in fields(RunConfig):
            value = getattr(config, field.name)
            if value == field.default or field.name in ("model", "task"):
                continue
            flag = "--" + field.name.replace("_", "-")
            parts += [flag] if value is True else [flag, shlex.quote(str(value))]
        methods = [record["method"] for record in self.records]
        return " ".join([*parts, "--methods", *methods, "--out", shlex.quote(self.path.name)])

    def record(self, method: str) -> dict[str, Any]:
        """Return the record of a method."""
        return next(record for record in self.records if record["method"] == method)

    @cached_property
    def certificates(self) -> dict[str, Calibration]:
        """The certificates, in the order of the records."""
        paths = {
            r["method"]: self.path / "certificates" / f"{r['method']}.json" for r in self.records
        }
        return {name: Calibration.load(path) for name, path in paths.items() if path.exists()}

    def evidence(self, method: str) -> pd.DataFrame:
        """Return the evidence of a certificate, for `plots.steering_curve`."""
        return evidence_frame(self.certificates[method], method)

    @property
    def main_method(self) -> str | None:
        """The certified method with the highest bound; without one, what changed most answers."""
        steering = {m: c.best.lower for m, c in self.certificates.items() if not c.abstained}
        if steering:
            return max(steering, key=lambda method: steering[method])
        changed = {
            r["method"]: r["transitions"]["0->1"] + r["transitions"]["1->0"] for r in self.records
        }
        most = max(changed, key=lambda method: changed[method])
        return most if changed[most] else None

    def probe_errors(self) -> pd.DataFrame:
        """Return the held-out metrics of every probe, for `plots.probe_error`."""
        tables = []
        for path in sorted(self.path.glob("probes/*/probe.json")):
            plain = store.read_json(path)
            name = f"{path.parent.name}, {plain['position']}"
            tables.append(pd.DataFrame(plain["metrics"]).assign(probe=name))
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def changes(self, method: str) -> pd.DataFrame:
        """Return what a method did to each test example: answers and errors before and after."""
        folder = self.path / "outcomes"
        before = pd.DataFrame(store.read_records(folder / "no_steering.jsonl"))
        after = pd.DataFrame(store.read_records(folder / f"{method}.jsonl"))
        if before.empty or after.empty:
            return pd.DataFrame()
        frame = before.merge(after, on=["row", "label"], suffixes=("_before", "_after"))
        change = [
            f"{int(b)}->{int(a)}"
            for b, a in zip(frame["correct_before"], frame["correct_after"], strict=True)
        ]
        return frame.assign(change=change)

    def predicted(self, method: str) -> pd.DataFrame:
        """Return the highest error predicted for each test example, and its unsteered answer."""
        frame = self.changes(method)
        if frame.empty or not frame["peak_after"].notna().to_numpy().all():
            return pd.DataFrame()
        peak = torch.tensor(frame["peak_after"].to_numpy(float))
        return pd.DataFrame(
            {"predicted": torch.sigmoid(peak).numpy(), "correct": frame["correct_before"]}
        )

    def cloud(self, method: str) -> "Cloud | None":
        """Return the training activations as a method's probe sees them, if both are kept.

        None in SAE space, where a probe does not read the activations themselves.
        """
        if self.record(method)["space"] != "raw":
            return None
        kind = self.record(method)["details"].get("probe")
        folder = self.path / "probes" / str(kind)
        activations = self.path / "activations"
        if not (folder / "probe.json").exists() or not (activations / "manifest.json").exists():
            return None
        probe, kept = LinearProbe.load(folder), Activations.load(activations)
        if probe.position not in kept.by_position:
            return None
        layers = parse_layers(self.config.layers)
        scope = range(len(probe.weights)) if layers == "all" else layers
        scope = (probe.best_layer,) if layers == "best" else tuple(scope)
        return Cloud(probe, kept, scope)

    def test_task(self) -> Task[Any]:
        """Build the test split again.

        Raises:
            ValueError: if the data is gone or has changed since.
        """
        c = self.config
        task = load_task(c.task, data_dir=c.data_dir, template=c.template)
        test = task.split(c.seed, train=c.train, calibration=c.calibration, test=c.test).test
        wanted = self.records[0]["hashes"]["data"]["test"]
        if test.data_hash != wanted:
            raise ValueError(
                f"The test split of {c.task} has hash {test.data_hash}, the run saw {wanted}; "
                "bring the data back that it was made with."
            )
        return test


@dataclass(frozen=True, eq=False)
class Cloud:
    """Training activations and a probe: how many are steered, and where they lie."""

    probe: LinearProbe
    activations: Activations
    scope: tuple[int, ...]
    """The steered layers."""

    def share(self, threshold: float) -> pd.DataFrame:
        """Return the share of examples above the threshold, layer by layer."""
        predicted = self.probe.predicted_error(self.activations.resid(self.probe.position))
        share = (predicted > threshold).double().mean(-1)
        layers = range(len(share))
        steered = [layer in self.scope for layer in layers]
        return pd.DataFrame({"layer": layers, "share": share.tolist(), "steered": steered})

    def plane(self, layer: int, threshold: float | None, *, seed: int = 0) -> pd.DataFrame:
        """Return a sample in the plane of the probe and the leading direction orthogonal to it.

        With a threshold, `score_after` and `other_after` say where the shortest shift goes.
        """
        resid = self.activations.resid(self.probe.position)
        score = self.probe.score(resid)[layer]
        other = _leading_other(resid[layer], self.probe.weights[layer])
        rng = np.random.default_rng(seed)
        keep = np.sort(rng.permutation(len(score))[:MOST_POINTS])
        frame = pd.DataFrame(
            {
                "score": score.numpy(),
                "other": other.numpy(),
                "correct": self.activations.correct.numpy(),
            }
        ).iloc[keep]
        if threshold is not None:
            limit = np.log(threshold / (1 - threshold))
            moved = frame["score"] > limit
            frame["score_after"] = np.where(moved, limit, np.nan)
            frame["other_after"] = np.where(moved, frame["other"], np.nan)
        return frame


def _leading_other(
    resid: Float[Tensor, "example d_model"], weights: Float[Tensor, " d_model"]
) -> Float[Tensor, " example"]:
    """Project onto the direction of greatest variance among those orthogonal to the probe."""
    unit = weights / weights.norm().clamp(min=1e-30)
    centred = (resid - resid.mean(0)).double()
    rest = centred - (centred @ unit.double())[:, None] * unit.double()
    _, vectors = torch.linalg.eigh(rest.T @ rest)
    return rest @ vectors[:, -1]


def evidence_frame(certificate: Calibration, method: str) -> pd.DataFrame:
    """Return a certificate's evidence, one row per threshold, with its terms in every row."""
    frame = pd.DataFrame([asdict(row) for row in certificate.evidence])
    known = certificate.base is not None and certificate.protocol.metric == "correct"
    return frame.assign(
        chosen=frame["threshold"] == certificate.threshold,
        method=method,
        knob=certificate.protocol.knob,
        n=certificate.n,
        min_gain=certificate.min_gain,
        confidence=1 - certificate.protocol.delta,
        base=certificate.base if known else np.nan,
    )


def records_frame(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return records with the ends of their interval as `spi_low` and `spi_high`.

    NaN where nothing was steered: there is nothing uncertain in it.
    """
    ends = []
    for record in records:
        idle = record["method"] == "no_steering" or record["decision"] == "ABSTAIN"
        known = None if idle else record.get("spi_interval")  # records of 0.1.0 have none
        ends.append(known or (np.nan, np.nan))
    low, high = zip(*ends, strict=True)
    return pd.DataFrame(list(records)).assign(spi_low=low, spi_high=high)


def find_runs(folders: str | Path | Sequence[str | Path]) -> list[RunFolder]:
    """Open runs: folders of runs, or folders whose subfolders are.

    Raises:
        ValueError: if one of them holds no run.
    """
    given = [folders] if isinstance(folders, str | Path) else list(folders)
    paths: list[Path] = []
    for folder in map(Path, given):
        inside = sorted(path.parent for path in folder.glob("*/records.jsonl"))
        paths += [folder] if (folder / "records.jsonl").exists() or not inside else inside
    return [RunFolder.open(path) for path in paths]
