"""Run folders read back as data frames, the shape in which figures and reports take them."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mera_tl import storage
from mera_tl.benchmark.config import RunConfig, parse_layers
from mera_tl.benchmark.contents import FORMAT
from mera_tl.benchmark.recommendation import Recommendation, read_run, recommend
from mera_tl.benchmark.run import load_splits
from mera_tl.certificate.certificate import Calibration, percent, promised_points
from mera_tl.inference.activations import Activations
from mera_tl.methods.race import Search
from mera_tl.models.model import resid_post
from mera_tl.probes.probe import LinearProbe
from mera_tl.steering.directions import fit_direction
from mera_tl.steering.reach import Reach
from mera_tl.steering.rules import Adaptive, Additive
from mera_tl.steering.steering import Steering
from mera_tl.tasks.task import Task

MOST_POINTS = 800
"""Examples drawn in a cloud at most; more only cover one another."""


@dataclass(frozen=True)
class Verdict:
    """What a run comes to: what corrects its errors, or nothing."""

    method: str | None
    """The certified method that `recommend` takes; None if none is certified to correct."""
    before: float
    """Accuracy on the test examples, unsteered."""
    after: float
    sentence: str
    """The decision in a few words."""

    @property
    def change(self) -> str:
        """Accuracy before and after, or what it is and stays."""
        before, after = percent(self.before), percent(self.after)
        return f"{before} -> {after}" if self.method else before


@dataclass(frozen=True, eq=False)
class RunFolder:
    """What a run has left in its folder."""

    path: Path
    config: RunConfig
    records: tuple[dict[str, Any], ...]

    def __repr__(self) -> str:
        return f"RunFolder({self.path}: {self.title}, {len(self.records)} methods)"

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Read a run.

        Raises:
            ValueError: if there is none, or its records have another format.
        """
        path = Path(path)
        records = read_run(path)
        formats = {record.get("format", 0) for record in records}
        if formats != {FORMAT}:
            raise ValueError(
                f"{path} holds records of format {sorted(formats)}, this version reads {FORMAT}; "
                "run it again into a new folder, or use the mera_tl that wrote it: "
                f"{records[0].get('versions', {}).get('mera-tl', 'unknown')}."
            )
        names = {field.name for field in fields(RunConfig)}
        kept = storage.read_json(path / "config.json")
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

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with its baseline or with single methods, each sentence once."""
        return tuple(dict.fromkeys(w for r in self.records for w in r.get("warnings", ())))

    @property
    def trust(self) -> str:
        """Which answers may be trusted, in a sentence, where `withhold` was asked."""
        said = [r["certificate"] for r in self.records if r["method"] == "withhold"]
        return (said[0] or "").split("\n")[0] if said else ""

    def record(self, method: str) -> dict[str, Any]:
        """Return the record of a method."""
        return next(record for record in self.records if record["method"] == method)

    @cached_property
    def certificates(self) -> dict[str, Calibration]:
        """The certificates, in the order of the records."""
        asked = [
            r["method"]
            for r in self.records
            if r["decision"] is not None and r["method"] != "withhold"
        ]
        return {name: Calibration.load(self.path / "certificates" / name) for name in asked}

    def evidence(self, method: str) -> pd.DataFrame:
        """Return the evidence of a certificate, for `plots.steering_curve`."""
        return self.certificates[method].frame(method)

    @cached_property
    def recommendation(self) -> Recommendation:
        """What to do, and what else could be done."""
        return recommend(self.path)

    @property
    def main_method(self) -> str | None:
        """The method that corrects, by the run's one verdict; else what changed most answers."""
        if self.recommendation.what in ("steer", "flip", "classify"):
            return self.recommendation.method
        changed = {
            r["method"]: r["transitions"]["0->1"] + r["transitions"]["1->0"]
            for r in self.records
            if r["method"] != "withhold"
        } or {"no_steering": 0}
        most = max(changed, key=lambda method: changed[method])
        return most if changed[most] else None

    @property
    def verdict(self) -> Verdict:
        """What the run comes to, in one line."""
        first, method = self.records[0], self.main_method
        base = first["accuracy"] - first["accuracy_change"]
        certificate = self.certificates.get(method or "")
        if method is not None and certificate is not None and not certificate.abstained:
            promise = promised_points(certificate.promised)
            if float(promise) >= 1:
                promise = promise.split(".")[0]
            what = "" if certificate.terms.metric == "correct" else " of error"
            limit = certificate.terms.max_regressions
            harm = "" if limit is None else f", <= {100 * limit:g} % turned wrong"
            says = self.recommendation.what.upper()
            sentence = f"{says} (certified >= {promise} points{what}{harm})"
            return Verdict(method, base, self.record(method)["accuracy"], sentence)
        # The same number as `recommend` says.
        gains = [way.gain for way in self.recommendation.ways if way.gain is not None]
        said = f"ABSTAIN (best seen {100 * max(gains):+.1f} points)" if gains else "no certificate"
        return Verdict(None, base, base, said)

    def probe_errors(self) -> pd.DataFrame:
        """Return the held-out metrics of every probe, for `plots.probe_error`."""
        tables = []
        for path in sorted(self.path.glob("probes/*/probe.json")):
            plain = storage.read_json(path)
            name = f"{path.parent.name}, {plain['position']}"
            tables.append(pd.DataFrame(plain["metrics"]).assign(probe=name))
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def tried(self, method: str) -> pd.DataFrame:
        """Return the candidates of a method's search on training data; empty if it made none."""
        path = self.path / "searches" / method / "candidates.jsonl"
        return pd.DataFrame(storage.read_records(path))

    def changes(self, method: str) -> pd.DataFrame:
        """Return what a method did to each test example: answers and errors before and after."""
        folder = self.path / "outcomes"
        before = pd.DataFrame(storage.read_records(folder / "no_steering.jsonl"))
        after = pd.DataFrame(storage.read_records(folder / f"{method}.jsonl"))
        if before.empty or after.empty:
            return pd.DataFrame()
        frame = before.merge(after, on=["row", "label"], suffixes=("_before", "_after"))
        change = [
            f"{int(b)}->{int(a)}"
            for b, a in zip(frame["correct_before"], frame["correct_after"], strict=True)
        ]
        return frame.assign(change=change)

    def reach(self, method: str) -> Reach | None:
        """Return what a method moved where on the test examples; None if it steered nothing."""
        path = self.path / "reach" / f"{method}.safetensors"
        return Reach.load(path) if path.exists() else None

    def predicted(self, method: str, layer: int) -> pd.DataFrame:
        """Return predicted error and correctness of each test example, before and after a layer."""
        reach, changes = self.reach(method), self.changes(method)
        if reach is None or changes.empty:
            return pd.DataFrame()
        answers = changes[["correct_before", "correct_after"]].reset_index(drop=True)
        return pd.concat([reach.examples(layer), answers], axis=1)

    def cloud(self, method: str) -> "Cloud | None":
        """Return the training activations with a method's steering, if both are kept.

        None in SAE space, where a probe does not read the activations themselves, and for methods
        that do not steer.
        """
        record, kept = self.record(method), self.path / "activations"
        if record["space"] != "raw" or not (kept / "manifest.json").exists():
            return None
        activations = Activations.load(kept)
        steering = self._steering(record, activations)
        if steering is None or steering.probe.position not in activations.by_position:
            return None
        return Cloud(steering, activations)

    def _steering(self, record: dict[str, Any], activations: Activations) -> Steering | None:
        """Build a method's steering again from what it left; without a threshold if it abstained.

        A direction that is not kept is fitted again, to the same activations.
        """
        details, threshold = record["details"], record["threshold"]
        searched = self.path / "searches" / record["method"]
        folder = self.path / "probes" / str(details.get("fit", details.get("probe")))
        if record["method"] in ("flip", "withhold"):
            return None
        if (searched / "search.json").exists():
            steering = Search.load(searched).steering
            return steering if threshold is not None else replace(steering, rule=Adaptive())
        if not (folder / "probe.json").exists():
            return None
        layers, probe = parse_layers(self.config.layers), LinearProbe.load(folder)
        steering = Steering(probe, layers=layers, positions=self.config.positions)
        if kind := details.get("direction"):
            vectors = fit_direction(activations, probe, kind).vectors
            steering = replace(steering, direction=vectors)
        if details.get("strength"):
            return replace(steering, rule=Additive(details["strength"]))
        return steering if threshold is None else steering.at(threshold)

    def test_task(self) -> Task[Any]:
        """Build the test split again.

        Raises:
            ValueError: if the data is gone or has changed since.
        """
        test, wanted = load_splits(self.config).test, self.records[0]["hashes"]["data"]["test"]
        if test.data_hash != wanted:
            raise ValueError(
                f"The test split of {self.config.task} has hash {test.data_hash}, the run saw "
                f"{wanted}; bring the data back that it was made with."
            )
        return test


@dataclass(frozen=True, eq=False)
class Cloud:
    """Training activations and a steering: where they lie, and where it takes them."""

    steering: Steering
    activations: Activations

    @property
    def layer(self) -> int:
        """The steered layer; of several the one that reads best."""
        layers, best = self.steering.layer_numbers, self.steering.probe.best_layer
        return best if best in layers else layers[0]

    @property
    def limit(self) -> float | None:
        """The score above which examples move; None if all do, or none."""
        limit = getattr(self.steering.rule, "limit", math.inf)
        return limit if math.isfinite(limit) else None

    def plane(self, *, seed: int = 0) -> pd.DataFrame:
        """Return a sample in the plane of the probe and the leading direction orthogonal to it.

        `score_after` and `other_after` say where the steering takes an example, NaN where it is
        left alone; `in_plane` is the share of the shift's length that lies in this plane.
        """
        idle = self.steering.limit == math.inf  # it abstained, and only its scores are read
        hooks = self.steering.reading_hooks() if idle else self.steering.fwd_hooks()
        hook = dict(hooks)[resid_post(self.layer)]
        resid = self.activations.resid(self.steering.probe.position)[self.layer].float()
        answers = self.activations.outcomes.predictions.clamp(min=0)
        weights, bias, step = (
            values if values.ndim == n else values[answers]
            for values, n in ((hook.weights, 1), (hook.bias, 0), (hook.step, 1))
        )
        score = (resid * weights).sum(-1) + bias
        shift = hook.rule.amount(score)[:, None] * step
        moved = (shift != 0).any(-1).numpy()
        axes, other = _other_axis(resid, hook.weights)
        centred = resid.double() - resid.double().mean(0)
        after = {
            "score_after": score + (shift * weights).sum(-1),
            "other_after": (centred + shift) @ other,
            "in_plane": (shift.double() @ axes.T).norm(dim=-1) / shift.norm(dim=-1),
        }
        columns = {"score": score, "other": centred @ other, "correct": self.activations.correct}
        frame = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
        for name, values in after.items():
            frame[name] = np.where(moved, values.numpy(), np.nan)
        drawn = np.random.default_rng(seed).permutation(len(frame))[:MOST_POINTS]
        return frame.iloc[np.sort(drawn)]


def _other_axis(
    resid: Float[Tensor, "example d_model"], weights: Float[Tensor, "*option d_model"]
) -> tuple[Float[Tensor, "axis d_model"], Float[Tensor, " d_model"]]:
    """Return the direction of greatest variance orthogonal to all probes, and it with theirs."""
    probes = torch.linalg.qr(weights.double().reshape(-1, weights.shape[-1]).T).Q.T
    centred = resid.double() - resid.double().mean(0)
    rest = centred - centred @ probes.T @ probes
    _, vectors = torch.linalg.eigh(rest.T @ rest)
    return torch.cat([probes, vectors[:, -1:].T]), vectors[:, -1]


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
        # A grid keeps records of its own beside the folders of its runs.
        paths += [folder] if (folder / "config.json").exists() or not inside else inside
    return [RunFolder.open(path) for path in paths]
