"""One run: a model on a task, every method on the same split, one record each.

    collect -> fit -> calibrate or abstain -> evaluate -> record

A run lives in a folder. What a step has written is found again by the next, or by a second start:
activations/, probes/<kind>/, certificates/<method>.json, reach/<method>.safetensors,
outcomes/<method>.jsonl, records.jsonl.
"""

import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from mera_tl import storage
from mera_tl.benchmark.config import RunConfig, parse_layers
from mera_tl.certificate.terms import Protocol
from mera_tl.inference.activations import Activations, collect
from mera_tl.inference.answers import ReadSettings, option_tokens
from mera_tl.inference.evaluation import evaluate
from mera_tl.inference.free_text import free_text
from mera_tl.inference.outcomes import (
    Outcomes,
    accuracy_interval,
    paired_p_value,
    spi,
    spi_interval,
)
from mera_tl.methods.controlled import METHODS
from mera_tl.methods.methods import Setting, Treatment, find_method, require_space
from mera_tl.models.model import Model, load_model
from mera_tl.sae.loading import default_source, load_saes
from mera_tl.steering.reach import evaluate_reach
from mera_tl.steering.spaces import ResidualSpace, Space
from mera_tl.steering.steering import SteerHook
from mera_tl.tasks.task import Splits, Task, load_task

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of records; raised when a field changes its meaning."""


class Run:
    """A run in its folder; everything in it is computed once, on first use."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        *,
        progress: bool = True,
        load: Callable[[RunConfig], Model] | None = None,
        cache: Path | None = None,
    ) -> None:
        self.config, self.folder, self.cache = config, Path(folder), cache
        self._load = load or load_configured
        self.read = ReadSettings(
            readout=config.readout,
            batch_size=config.batch_size,
            batch_tokens=config.batch_tokens,
            max_new_tokens=config.max_new_tokens,
            truncate=config.truncate,
            progress=progress,
        )

    @cached_property
    def model(self) -> Model:
        """The model, loaded."""
        return self._load(self.config)

    @cached_property
    def splits(self) -> Splits:
        """Train, calibration and test, disjoint."""
        config = self.config
        task = load_task(config.task, data_dir=config.data_dir, template=config.template)
        return task.split(
            config.seed, train=config.train, calibration=config.calibration, test=config.test
        )

    def check(self) -> None:
        """Load what was named; nothing is run yet.

        Raises:
            ValueError: if a name, the data, the options or the layers do not fit together.
        """
        layers = parse_layers(self.config.layers)
        option_tokens(self.model, self.splits.train.options)
        if isinstance(layers, tuple) and max(layers) >= self.model.n_layers:
            raise ValueError(
                f"layers={self.config.layers!r} but {self.model.name} has {self.model.n_layers} "
                f"layers, numbered 0 to {self.model.n_layers - 1}; choose among them."
            )
        _ = self.space  # SAEs that are not there, or do not fit, fail before anything is run

    @cached_property
    def space(self) -> Space:
        """Where probes read and rules write."""
        config = self.config
        if config.space == "raw":
            return ResidualSpace()
        return load_saes(
            config.sae or default_source(config.model),
            parse_layers(config.layers),
            self.model,
            sibling=config.sae_sibling,
            correction=config.sae_correction,
        )

    @cached_property
    def activations(self) -> Activations:
        """Of the training split; read from the folder where they are already."""
        folder, task = self.folder / "activations", self.splits.train

        def make(place: Path) -> None:
            collect(self.model, task, settings=self.read, out=place)

        if not (folder / "manifest.json").exists():
            storage.shared(folder, self.cache, self._key(task), make, last="manifest.json")
        return Activations.load(folder)

    def _key(self, task: Task[Any]) -> dict[str, Any]:
        """Name all that activations and unsteered answers of a task depend on, by content."""
        read = {name: value for name, value in asdict(self.read).items() if name != "progress"}
        prompts = self.model.tokenize([example.prompt for example in task.examples])
        return {
            "model": self.model.manifest,
            "device": str(self.model.device),
            "data": [task.name, task.role, task.data_hash],
            "tokens": storage.fingerprint(prompts),
            "read": read,
            "versions": versions() | {"format": FORMAT},
        }

    @cached_property
    def setting(self) -> Setting:
        """What the methods look at."""
        config = self.config
        return Setting(
            model=self.model,
            splits=self.splits,
            activations=self.activations,
            protocol=Protocol(delta=config.delta, metric=config.metric, seed=config.seed),
            min_gain=config.min_gain,
            layers=parse_layers(config.layers),
            positions=config.positions,
            probe_position=config.probe_position,
            strength=config.strength,
            pairs=config.pairs,
            read=self.read,
            space=self.space,
            seed=config.seed,
            folder=self.folder,
            cache=self.cache,
            cache_key=self._key(self.splits.train) if self.cache is not None else {},
        )

    @cached_property
    def base(self) -> Outcomes:
        """The unsteered outcomes on the test split."""
        folder, task, name = self.folder / "outcomes", self.splits.test, "no_steering.jsonl"

        def make(place: Path) -> None:
            base = evaluate(self.model, task, settings=self.read, title="unsteered test")
            storage.write_records(place / name, base.to_records())

        if not (folder / name).exists():
            key = {**self._key(task), "outcomes": "unsteered"}
            storage.shared(folder, self.cache, key, make, last=name)
        return Outcomes.from_records(storage.read_records(folder / name), task.options)

    def records(self, methods: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield one record per method, computing those that are not in the folder yet."""
        for name in methods:
            find_method(name)  # every name is checked before the first costs anything
            require_space(name, self.config.space)
        for name in methods:
            yield self.record(name)

    def record(self, name: str) -> dict[str, Any]:
        """Return a method's record, from the folder if it is there."""
        path = self.folder / "records.jsonl"
        done = {record["method"]: record for record in storage.read_records(path)}
        if name not in done:
            done[name] = self._evaluate(name)
            storage.write_records(path, [done[known] for known in METHODS if known in done])
        return done[name]

    def _evaluate(self, name: str) -> dict[str, Any]:
        require_space(name, self.config.space)
        base = self.base
        started = time.perf_counter()
        treatment = METHODS[name](self.setting)
        outcomes = base
        if treatment.fwd_hooks or treatment.instruction is not None:
            outcomes = self._apply(name, treatment)
        seconds = time.perf_counter() - started
        storage.write_records(self.folder / "outcomes" / f"{name}.jsonl", outcomes.to_records())
        return {
            "format": FORMAT,
            "model": self.model.name,
            "task": self.splits.test.name,
            "method": name,
            "space": self.config.space,
            "seed": self.config.seed,
            **scores(outcomes, base),
            **_decision(treatment),
            "free_text": self._free_text(treatment),
            "details": treatment.details,
            "seconds": round(seconds, 3),
            "n_train": len(self.splits.train),
            "n_calibration": len(self.splits.calibration),
            "hashes": {
                "config": storage.fingerprint(self.config.to_json()),
                "model": self.model.fingerprint,
                "data": {split.role: split.data_hash for split in self.splits},
            },
            "versions": versions(),
        }

    def _apply(self, name: str, treatment: Treatment) -> Outcomes:
        """Answer the test split under a treatment; keep what its steering hooks did where."""
        test, hooks = self.splits.test, treatment.fwd_hooks
        steers = any(isinstance(hook, SteerHook) for _, hook in hooks)
        if not steers or treatment.answer is not None:
            return treatment.apply(self.setting, test)
        outcomes, reach = evaluate_reach(self.model, test, hooks, settings=self.read, title="test")
        reach.save(self.folder / "reach" / f"{name}.safetensors")
        return outcomes

    def _free_text(self, treatment: Treatment) -> dict[str, Any] | None:
        """Continue some test prompts freely under the treatment, where that was asked for."""
        if not self.config.free_text:
            return None
        test = self.splits.test
        task = test.subset(range(min(self.config.free_text, len(test))))
        if treatment.instruction is not None:
            task = task.with_instruction(treatment.instruction)
        return asdict(free_text(self.model, task, treatment.fwd_hooks, settings=self.read))


def scores(outcomes: Outcomes, base: Outcomes) -> dict[str, Any]:
    """Return the metrics of a run against the unsteered run on the same examples."""
    return {
        "n": len(outcomes),
        "accuracy": outcomes.accuracy,
        "error": outcomes.mean_error,
        "accuracy_interval": list(accuracy_interval(outcomes)),
        "spi": spi(outcomes.accuracy, base.accuracy),
        "spi_interval": list(spi_interval(outcomes, base)),
        "p_value": paired_p_value(outcomes, base),
        "accuracy_change": outcomes.accuracy - base.accuracy,
        "error_change": outcomes.mean_error - base.mean_error,
        "transitions": outcomes.transitions(base),
        "unanswered": int((~outcomes.answered).sum()),
        "steered_share": outcomes.steered_share,
        "tokens_steered": outcomes.n_tokens.double().mean().item(),
        "layers_steered": outcomes.n_layers.double().mean().item(),
        "relative_shift": outcomes.relative_shift,
        **outcomes.weighted_scores(),
    }


def _decision(treatment: Treatment) -> dict[str, Any]:
    decision = treatment.calibration
    if decision is None:
        return {"decision": None, "threshold": None, "certificate": None}
    return {
        "decision": decision.decision.value,
        "threshold": decision.threshold,
        "certificate": str(decision),
    }


def versions() -> dict[str, str]:
    """Return the versions that a number may depend on."""
    names = ("mera-tl", "torch", "transformer-lens", "transformers")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def load_configured(config: RunConfig) -> Model:
    """Load the model that a configuration names."""
    return load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        chat=config.chat,
        n_devices=config.n_devices,
        engine=config.engine,
    )


@contextmanager
def open_run(
    config: RunConfig,
    folder: str | Path,
    *,
    progress: bool = True,
    load: Callable[[RunConfig], Model] | None = None,
    cache: Path | None = None,
) -> Iterator[Run]:
    """Hold a run's folder; start it, or go on with it if it is of the same configuration.

    Activations, probes and unsteered outcomes are taken from `cache`, a folder that runs may share.

    Raises:
        ValueError: if the folder holds another configuration, or another process works in it.
    """
    folder = Path(folder)
    run = Run(config, folder, progress=progress, load=load, cache=cache)
    with storage.lock(folder):
        storage.sweep(folder)
        path = folder / "config.json"
        if path.exists():
            _require_same(storage.read_json(path), config, folder)
        else:
            run.check()  # bad names, data and layers fail before anything is written
            storage.write_json(path, config.to_json())
        yield run


def _require_same(kept: dict[str, Any], config: RunConfig, folder: Path) -> None:
    wanted = config.to_json()
    # A field that is younger than the folder has its default there.
    kept = {f.name: f.default for f in fields(RunConfig)} | kept
    differ = [name for name in wanted if kept.get(name) != wanted[name]]
    if differ:
        first = differ[0]
        raise ValueError(
            f"{folder} holds a run with another configuration ({', '.join(differ)}: e.g. {first} "
            f"was {kept.get(first)!r}, is {wanted[first]!r}); choose another --out."
        )


def table(records: Sequence[dict[str, Any]], *, full: bool = False) -> pd.DataFrame:
    """Return records as the table that a person reads; `full` with all that a record measures.

    Jobs that failed have no row.
    """
    done = [record for record in records if "failure" not in record]
    return pd.DataFrame([_row(record, full) for record in done])


def _row(record: dict[str, Any], full: bool) -> dict[str, Any]:
    row = {name: record[name] for name in ("model", "task", "method", "space", "seed", "n")}
    row |= {name: record[name] for name in ("accuracy", "error")} | {"SPI": record["spi"]}
    if full:
        row |= dict(zip(("SPI low", "SPI high"), record["spi_interval"], strict=True))
        row["p"] = record["p_value"]
    row |= {change: record["transitions"][change] for change in ("0->1", "1->0")}
    row["steered"] = record["steered_share"]
    if full:
        # Records that are older than a measure lack it.
        row["tokens"], row["layers"] = record.get("tokens_steered"), record.get("layers_steered")
        row["shift"] = record.get("relative_shift")
        row |= {name: record[name] for name in ("precision", "recall", "f1")}
        text = record["free_text"] or {}
        row |= {name: text.get(name) for name in ("perplexity", "distinct_1", "distinct_2")}
    threshold = float("nan") if record["threshold"] is None else record["threshold"]
    return row | {"decision": record["decision"] or "", "threshold": threshold}
