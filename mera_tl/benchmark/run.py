"""One run: a model on a task, every method on the same split, one record each.

    collect -> fit -> calibrate or abstain -> evaluate -> record

A run lives in a folder. What a step has written is found again by the next, or by a second start:
preflight.json, activations/, probes/<kind>/, searches/, certificates/<method>/,
reach/<method>.safetensors, outcomes/<method>.jsonl, records.jsonl. A folder goes on with the
options, the data and the weights it began with, or is refused.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mera_tl import storage
from mera_tl.benchmark.config import (
    DEFAULT_METHODS,
    REPLY_METHODS,
    RunConfig,
    narrow,
    parse_layers,
    parse_tasks,
    parse_thresholds,
)
from mera_tl.benchmark.contents import (
    CONFIG,
    CONTENT,
    FORMAT,
    cheap_content,
    hashed_content,
    require_content,
    require_options,
    require_weights,
)
from mera_tl.benchmark.duration import method_seconds
from mera_tl.benchmark.elsewhere import paired_change, some_prompts
from mera_tl.benchmark.pre_flight import Preflight, preflight
from mera_tl.benchmark.records import decision_of, idle, scores, unlikely, versions
from mera_tl.benchmark.resources import choose_threads, spare_memory
from mera_tl.benchmark.shares import Shares, others_on_the_same
from mera_tl.certificate.calibration import calibrate
from mera_tl.certificate.certificate import Calibration
from mera_tl.certificate.description import is_about
from mera_tl.certificate.terms import Terms
from mera_tl.inference.activations import Activations, collect
from mera_tl.inference.answers import ReadSettings, option_tokens
from mera_tl.inference.evaluation import evaluate, tokenize_task
from mera_tl.inference.free_text import free_text, reply_text
from mera_tl.inference.outcomes import Outcomes
from mera_tl.methods import methods
from mera_tl.methods.methods import (
    METHODS,
    Method,
    Treatment,
    find_method,
    find_methods,
    require_suited,
)
from mera_tl.models.identity import manifest_of
from mera_tl.models.loading import load_model
from mera_tl.models.model import FwdHooks, Model
from mera_tl.probes.fitting import fit_error_probe, fit_ranked_probe
from mera_tl.probes.probe import LinearProbe
from mera_tl.sae.loading import default_source, load_saes
from mera_tl.sae.probes import fit_latent_probe
from mera_tl.steering.hook import SteerHook
from mera_tl.steering.reach import evaluate_reach
from mera_tl.steering.spaces import ResidualSpace, SAESpace, Space
from mera_tl.steering.steering import Steering
from mera_tl.steering.unsteered import Passes
from mera_tl.storage import Content
from mera_tl.tasks.loading import load_task
from mera_tl.tasks.task import Splits, Task

if TYPE_CHECKING:  # an abstract property may be overridden by a property only
    cached_property = property

logger = logging.getLogger(__name__)


class Run(methods.Run):
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
        self._probes: dict[str, LinearProbe] = {}
        self._progress = progress

    def __repr__(self) -> str:
        return f"Run({self.config.model} on {self.config.task}, in {self.folder})"

    # --- what was asked for ---------------------------------------------------------------------

    @cached_property
    def model(self) -> Model:
        """The model, loaded, on as many threads as it is worth.

        Raises:
            ValueError: if the folder began with other weights; a name of the hub may be moved on.
        """
        model = self._load(self.config)
        require_weights(self.folder, model)
        choose_threads(model)
        return model

    @cached_property
    def read(self) -> ReadSettings:
        """How answers are read; replies to a scored task are scored."""
        settings = replace(narrow(self.config, ReadSettings), progress=self._progress)
        return ReadSettings.of(self.splits.train, settings)

    @cached_property
    def splits(self) -> Splits:
        """Train, calibration and test, disjoint."""
        return load_splits(self.config)

    @cached_property
    def others(self) -> dict[str, Task[Any]]:
        """A few prompts of each other task on which steerings are looked at."""
        config = self.config
        where: Any = {"data_dir": config.data_dir, "trust_task_code": config.trust_task_code}
        names = parse_tasks(config.other_tasks)
        return {name: some_prompts(load_task(name, **where), config.seed) for name in names}

    @cached_property
    def passes(self) -> Passes:
        """What prompts leave unsteered, kept while the run is open."""
        return Passes(spare_memory(self.model))

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

    def suited(self, methods: Sequence[str]) -> Sequence[str]:
        """Return the methods that are compared; by default, those for the kind of task."""
        asked = tuple(methods) == DEFAULT_METHODS and self.splits.train.scored
        return REPLY_METHODS if asked else methods

    def announce(self, methods: Sequence[str]) -> None:
        """Fix how methods share delta, before an outcome of theirs is seen.

        Methods that come later share a delta of their own: then the promises of all hold together
        with the sum only, which is said, here and in their records.

        Raises:
            ValueError: if a method is unknown, the primary one asks for no certificate, or there is
                nothing to learn from for those that do.
        """
        _ = self.others  # one that does not exist is named before anything is spent
        found = self._fitting(methods)
        code = {each.name: each.code for each in found if each.code}
        self.shares.announce([each.name for each in found if each.certifies], code)

    def _fitting(self, methods: Sequence[str]) -> list[Method]:
        """Return methods by their names; refuse those that this task or space has no use for."""
        found = find_methods(methods, self.config.space)
        require_suited(found, self.splits.train)
        if any(each.certifies for each in found):
            self.splits.train.require_classes()
        return found

    @property
    def shares(self) -> Shares:
        """How the methods of this folder share delta."""
        return Shares(self.folder, self.config.delta, self.config.primary)

    @property
    def familywise_delta(self) -> float:
        """Greatest probability that any certificate of this folder is wrong."""
        return self.shares.familywise_delta

    @cached_property
    def earlier(self) -> tuple[str, ...]:
        """A sentence per run beside this one that was certified on the same examples otherwise."""
        told = others_on_the_same(
            self.folder, self.config, self.splits.calibration, self.model.fingerprint
        )
        for sentence in told:
            logger.warning("%s", sentence)
        return told

    def terms(self, method: str) -> Terms:
        """Return the terms of a method's certificate: what is its own of delta."""
        config = self.config
        delta, shared = self.shares.of(method)
        return Terms(
            delta=delta,
            run_delta=config.delta if shared else None,
            metric=config.metric,
            bound=config.bound,
            seed=config.seed,
            max_regressions=config.max_regressions,
        )

    def check(self, methods: Sequence[str] = ()) -> None:
        """Load what was named; nothing is run yet.

        Raises:
            ValueError: if a name, the data, the options, the layers or the methods do not fit
                together.
        """
        if methods:
            self._fitting(self.suited(methods))
        layers, train = parse_layers(self.config.layers), self.splits.train
        option_tokens(self.model, train, self.read)
        for split in self.splits:
            tokenize_task(self.model, split, self.read)  # a prompt that is too long fails here
        for other in self.others.values():
            read = ReadSettings.of(other, replace(self.read, readout=self.config.readout))
            option_tokens(self.model, other, read)
            tokenize_task(self.model, other, read)
        if isinstance(layers, tuple) and max(layers) >= self.model.n_layers:
            raise ValueError(
                f"layers={self.config.layers!r} but {self.model.name} has {self.model.n_layers} "
                f"layers, numbered 0 to {self.model.n_layers - 1}; choose among them."
            )
        _ = self.space  # SAEs that are not there, or do not fit, fail before anything is run

    # --- what is computed once, and found again -------------------------------------------------

    def kept(
        self,
        name: str,
        last: str,
        make: Callable[[Path], object],
        load: Callable[[Path], Content],
        *,
        key: Callable[[], dict[str, Any]] | None = None,
    ) -> Content:
        """Load a folder of the run; where its file `last` is missing, make it first.

        With a `key`, all that the content depends on, it is shared with other runs by the cache.
        """
        cache = self.cache if key is not None else None
        return storage.kept(self.folder / name, last, make, load, cache=cache, key=key)

    @cached_property
    def preflight(self) -> Preflight:
        """What a few training prompts told before anything was spent."""
        name = "preflight.json"

        def make(folder: Path) -> None:
            found = preflight(self.model, self.splits.train, settings=self.read)
            storage.write_json(folder / name, found.to_json())

        def load(folder: Path) -> Preflight:
            return Preflight.from_json(storage.read_json(folder / name))

        key = partial(self._key, self.splits.train)
        return self.kept("", name, make, load, key=lambda: key() | {"preflight": 3})

    def seconds(self, methods: Sequence[str]) -> dict[str, float]:
        """Estimate what each method will take, from the measured rate; see `method_seconds`."""
        found, rate = find_methods(self.suited(methods)), self.preflight.seconds_per_prompt
        prompts = tokenize_task(self.model, self.splits.train, self.read)
        told = {"rate": rate, "n_tokens": sum(map(len, prompts)) / len(prompts)}
        return method_seconds(found, self.splits, self.model, self.config, **told)

    @cached_property
    def activations(self) -> Activations:
        """Of the training split, unsteered."""
        train = self.splits.train

        def make(folder: Path) -> None:
            collect(self.model, train, settings=self.read, out=folder)

        key = partial(self._key, train)
        return self.kept("activations", "manifest.json", make, Activations.load, key=key)

    @cached_property
    def base(self) -> Outcomes:
        """The unsteered outcomes on the test split."""
        test, name = self.splits.test, "no_steering.jsonl"

        def make(folder: Path) -> None:
            base = evaluate(self.model, test, settings=self.read, title="unsteered test")
            storage.write_records(folder / name, base.to_records())

        def load(folder: Path) -> Outcomes:
            return Outcomes.from_records(storage.read_records(folder / name), test.options)

        return self.kept(
            "outcomes", name, make, load, key=lambda: self._key(test) | {"outcomes": "unsteered"}
        )

    def probe(self, name: str) -> LinearProbe:
        """Fit a probe on the training split, once: a kind, or worst_ or median_regression."""
        if name in self._probes:
            return self._probes[name]
        where: dict[str, Any] = {"position": self.config.probe_position, "seed": self.config.seed}
        kind: Any = name
        rank, _, regression = kind.partition("_")
        fit: Callable[..., LinearProbe] = partial(fit_error_probe, kind=kind)
        folder = f"probes/{name}"
        if regression == "regression":
            fit = partial(fit_ranked_probe, rank=rank)
        elif isinstance(self.space, SAESpace):
            fit = partial(fit_latent_probe, space=self.space, kind=kind)
        if name == "contrastive" and self.config.pairs:
            where["penalty"] = float(self.config.pairs)
            folder += f"_{self.config.pairs}"
        if name == "ridge" and self.config.probe_penalty is not None:
            where["penalty"] = self.config.probe_penalty

        def make(place: Path) -> None:
            self.splits.train.require_classes()
            fit(self.activations, **where).save(place)

        def key() -> dict[str, Any]:
            return self._key(self.splits.train) | where | {"probe": folder.removeprefix("probes/")}

        # Latents are read through SAEs that no key names: their probes stay in the run.
        shared = None if isinstance(self.space, SAESpace) else key
        self._probes[name] = self.kept(folder, "probe.json", make, LinearProbe.load, key=shared)
        return self._probes[name]

    def steering(self, probe: LinearProbe) -> Steering:
        """Return the probe's steering at this run's layers and positions."""
        layers, positions = parse_layers(self.config.layers), self.config.positions
        return Steering(probe, space=self.space, layers=layers, positions=positions)

    def calibrate(self, name: str, candidates: Steering | Sequence[Steering]) -> Calibration:
        """Calibrate candidates on the calibration split, once per name.

        One steering without a threshold stands for the thresholds of the configuration.
        """
        if isinstance(candidates, Steering) and candidates.limit == math.inf:
            thresholds = parse_thresholds(self.config.thresholds)
            candidates = [candidates.at(threshold) for threshold in thresholds]
        certify = partial(
            calibrate,
            self.model,
            self.splits.calibration,
            candidates,
            min_gain=self.config.min_gain,
            terms=self.terms(name),
            settings=self.read,
            passes=self.passes,
        )
        decision = self.decide(name, certify)
        steerings = [candidates] if isinstance(candidates, Steering) else candidates
        if not is_about([row.steering for row in decision.evidence], steerings):
            raise ValueError(
                f"{self.folder / 'certificates' / name} certifies other steerings than these; "
                "give these another name, which then has a delta of its own."
            )
        return decision

    def decide(self, name: str, certify: Callable[[], Calibration]) -> Calibration:
        """Certify in another way than `calibrate`, once per name."""
        self.shares.announce([name])  # whoever asks: what is not announced is not counted

        def make(folder: Path) -> None:
            decision, warnings = certify(), list(self.preflight.warnings)
            replace(decision, setup={**decision.setup, "warnings": warnings}).save(folder / name)

        def load(folder: Path) -> Calibration:
            return Calibration.load(folder / name, space=self.space)

        return self.kept("certificates", f"{name}/steering.json", make, load)

    def _key(self, task: Task[Any]) -> dict[str, Any]:
        """Name all that activations and unsteered answers of a task depend on, by content."""
        read = {name: value for name, value in asdict(self.read).items() if name != "progress"}
        if self.read.truncate:  # by a text that the data's hash does not know
            prompts = tokenize_task(self.model, task, self.read)
        else:
            prompts = self.model.tokenize([example.prompt for example in task.examples])
        return {
            "model": manifest_of(self.model),
            "device": str(self.model.device),
            "engine": self.config.engine,
            "data": [task.name, task.role, task.data_hash],
            "tokens": storage.fingerprint(prompts),
            "read": read,
            "versions": versions() | {"format": FORMAT, "repeats": 1},
        }

    # --- records --------------------------------------------------------------------------------

    def records(self, methods: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield one record per method, computing those that are not in the folder yet."""
        methods = self.suited(methods)
        self.announce(methods)  # all are checked before the first costs anything
        for name in methods:
            yield self.record(name)

    def record(self, name: str) -> dict[str, Any]:
        """Return a method's record, from the folder if it is there.

        Records of other methods stay, also of those that this process does not know.
        """
        (method,) = find_methods([name], self.config.space)
        path = self.folder / "records.jsonl"
        done = {record["method"]: record for record in storage.read_records(path)}
        if method.code or method.name not in done:  # a user's own code may have changed
            self.announce([name])
        if method.name not in done:
            done[method.name] = self._evaluate(method.name)
            order = [*METHODS, *done]
            ordered = sorted(done.values(), key=lambda record: order.index(record["method"]))
            storage.write_records(path, ordered)
        return done[method.name]

    def treat(self, name: str) -> Treatment:
        """Return what a method does, from the folder as far as it is there."""
        self.announce([name])
        return find_method(name).treat(self)

    def _evaluate(self, name: str) -> dict[str, Any]:
        base = self.base
        started = time.perf_counter()
        treatment = METHODS[name].treat(self)
        outcomes = self._apply(name, treatment) if treatment.acts else base
        seconds, asks = time.perf_counter() - started, METHODS[name].certifies
        storage.write_records(self.folder / "outcomes" / f"{name}.jsonl", outcomes.to_records())
        text = self._free_text(treatment, outcomes)
        odd = idle(name, outcomes, base) + unlikely(name, text, self._base_text)
        for sentence in odd:
            logger.warning("%s", sentence)
        lacks = (treatment.lacks,) if treatment.lacks else ()
        told = (*(self.earlier if asks else ()), *odd, *lacks)
        return {
            "format": FORMAT,
            "model": self.model.name,
            "task": self.splits.test.name,
            "method": name,
            "space": self.config.space,
            "seed": self.config.seed,
            **scores(outcomes, base),
            **decision_of(treatment),
            "familywise_delta": self.familywise_delta,
            "warnings": [*self.preflight.warnings, *told],
            "free_text": text,
            "elsewhere": self._elsewhere(treatment.fwd_hooks),
            "tokens_generated": outcomes.n_generated.double().mean().item(),
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
            return treatment.apply(self, test)
        outcomes, reach = evaluate_reach(self.model, test, hooks, settings=self.read, title="test")
        reach.save(self.folder / "reach" / f"{name}.safetensors")
        return outcomes

    def _free_text(self, treatment: Treatment, outcomes: Outcomes) -> dict[str, Any] | None:
        """Continue some test prompts freely under the treatment, where that was asked for.

        Replies that have been scored are measured as they are.
        """
        if self.splits.test.scored and outcomes is self.base:
            return self._base_text
        if self.splits.test.scored:
            return asdict(reply_text(self.model, self.splits.test, outcomes, settings=self.read))
        if not self.config.free_text:
            return None
        test = self.splits.test
        task = test.subset(range(min(self.config.free_text, len(test))))
        if treatment.instruction is not None:
            task = task.with_instruction(treatment.instruction)
        return asdict(free_text(self.model, task, treatment.fwd_hooks, settings=self.read))

    @cached_property
    def _base_text(self) -> dict[str, Any] | None:
        """The unsteered replies to a scored task, measured as text."""
        test = self.splits.test
        if not test.scored:
            return None
        return asdict(reply_text(self.model, test, self.base, settings=self.read))

    def _elsewhere(self, hooks: FwdHooks) -> dict[str, dict[str, Any]]:
        """Answer a few prompts of other tasks under a steering, where that was asked for.

        A steering by the answer has no say about other options.
        """
        by_answer = any(getattr(hook, "per_answer", False) for _, hook in hooks)
        some = self.others if hooks and not by_answer else {}
        return {name: self._compare(task, hooks) for name, task in some.items()}

    def _compare(self, task: Task[Any], hooks: FwdHooks) -> dict[str, Any]:
        settings = replace(self.read, readout=self.config.readout)
        answer = partial(evaluate, self.model, task, settings=settings, title=task.name)
        file = f"{task.name}-{task.data_hash[:8]}.jsonl"

        def make(folder: Path) -> None:
            storage.write_records(folder / file, answer().to_records())

        def load(folder: Path) -> Outcomes:
            return Outcomes.from_records(storage.read_records(folder / file), task.options)

        return paired_change(answer(hooks), self.kept("elsewhere", file, make, load))


def load_configured(config: RunConfig) -> Model:
    """Load the model that a configuration names."""
    return load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        chat=config.chat and None,  # None: where there is a template
        system=config.system,
        n_devices=config.n_devices,
        engine=config.engine,
    )


def load_splits(config: RunConfig) -> Splits:
    """Load the task that a configuration names, and split it."""
    c = config
    task = load_task(
        c.task, data_dir=c.data_dir, template=c.template, trust_task_code=c.trust_task_code
    )
    return task.split(c.seed, train=c.train, calibration=c.calibration, test=c.test)


@contextmanager
def open_run(
    config: RunConfig,
    folder: str | Path,
    *,
    progress: bool = True,
    load: Callable[[RunConfig], Model] | None = None,
    cache: Path | None = None,
    methods: Sequence[str] = (),
) -> Iterator[Run]:
    """Hold a run's folder; start it, or go on with it if it is of the same configuration.

    Activations, probes and unsteered outcomes are taken from `cache`, a folder that runs may share.
    `methods` that are named here are checked before a new folder is begun.

    Raises:
        ValueError: if the folder holds another configuration, or another process works in it.
    """
    if not isinstance(config, RunConfig):
        raise ValueError(f"{config!r:.60} is none; pass RunConfig(model=..., task=...).")
    folder = Path(folder)
    run = Run(config, folder, progress=progress, load=load, cache=cache)
    path = folder / CONFIG
    if path.exists():
        require_options(folder, config)
    else:
        storage.require_folder(folder)
        run.check(methods)  # bad names, data and layers fail before anything is written
    with storage.lock(folder):
        storage.sweep(folder)
        cheap = cheap_content(config, run.splits)
        if path.exists():
            require_options(folder, config)
            require_content(folder, cheap, lambda: hashed_content(run.model, run.space))
        else:
            storage.write_json(folder / CONTENT, cheap | hashed_content(run.model, run.space))
            storage.write_json(path, config.to_json())
        yield run
