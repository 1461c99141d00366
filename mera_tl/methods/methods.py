"""Every way of steering that is compared: rows of a table, and a short function for each idea.

A method gets the run (model, splits, activations, probes) and returns a `Treatment`: what to do to
the test prompts, and the certificate it rests on, if any. Most are one idea with another probe or
direction, so a new one is a row; a user's own is a function under `@method`.
"""

import difflib
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mera_tl import storage
from mera_tl.certificate.calibration import calibrate
from mera_tl.certificate.certificate import Calibration
from mera_tl.certificate.terms import PAPER_THRESHOLDS
from mera_tl.certificate.withholding import Withholding
from mera_tl.inference.evaluation import evaluate
from mera_tl.inference.outcomes import Outcomes
from mera_tl.inference.progress import seconds_of
from mera_tl.methods.candidates import RAW, features
from mera_tl.methods.class_probe import ClassProbe, certify_class_probe, fit_class_probe
from mera_tl.methods.families import FAMILIES, search_family
from mera_tl.methods.race import Choices, Search, divide, search
from mera_tl.methods.redrawing import PREDICTED, RETRY_THRESHOLDS, Draws, draw_replies
from mera_tl.methods.replying import (
    DIRECTIONS,
    NoDirection,
    ReplyChoices,
    probe_of_replies,
    search_replies,
)
from mera_tl.methods.second_best import certify_flip, flipped, reading_hooks, search_flip
from mera_tl.methods.treatment import Method, Run, Treat, Treatment
from mera_tl.methods.trusting import certify_trust, withheld
from mera_tl.probes.probe import LinearProbe
from mera_tl.steering.directions import fit_direction
from mera_tl.steering.rules import Additive
from mera_tl.steering.spaces import SAESpace, Space
from mera_tl.tasks.task import Task

logger = logging.getLogger(__name__)

INSTRUCTION = "Think before you answer."
"""The sentence of `prompt_steering`, placed before "Answer:"."""
REMINDERS = (
    "{instruction}",
    "Remember: {instruction}",
    "This is very important: {instruction} Nothing else is acceptable.",
)
"""Those of a scored task, of which the best on training data is taken; the first repeats it."""
N_DRAWS = 4
"""Replies of `best_of_k`, the greedy one among them."""
STRENGTHS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
"""From which `tuned_*` choose, as multiples of the layer's typical residual norm."""

METHODS: dict[str, Method] = {}


def method(function: Treat) -> Treat:
    """Register a function `run -> Treatment` as a method, under its name.

    `run` is a `mera_tl.methods.Run`: one model, task and split, with its activations and probes;
    `run.calibrate(name, steering)` certifies and keeps. For the command line the function lies in
    a file: `--methods my_method.py:name`.

    Raises:
        ValueError: if it is no function with a name, or a method of this package has that name.
    """
    name = getattr(function, "__name__", "")
    if not name.isidentifier():
        raise ValueError(f"{function!r:.60} has no name; put @mera_tl.method above a function.")
    if name in BUILT_IN:
        raise ValueError(f"{name} is a method of mera_tl; give your function another name.")
    about = (function.__doc__ or "A method without a docstring.").strip().splitlines()[0]
    METHODS[name] = Method(name, about, function, on="both", code=_code_of(function))
    return function


def _code_of(function: Treat) -> str:
    """Return the hash of the file that defines a function, or of its text in a notebook."""
    try:
        path = Path(inspect.getfile(function))
        return (
            storage.file_hash(path)
            if path.is_file()
            else storage.fingerprint(inspect.getsource(function))
        )
    except (OSError, TypeError):  # made by code, or typed: there is no text of it
        return ""


def find_method(name: str) -> Method:
    """Return a method by its id, or a user's own by "my_method.py:name", whose code is then run.

    Raises:
        ValueError: if there is none, with the nearest names.
    """
    path, colon, own = name.rpartition(":")
    if colon and path.endswith(".py"):
        return _load_method(Path(path), own)
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.4)
        nearest = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(
            f"There is no method {name!r}{nearest} (`mera methods` lists all; your own is "
            "my_method.py:name)."
        )
    return METHODS[name]


def find_methods(names: Sequence[str], space: str = "raw") -> list[Method]:
    """Return methods by their ids, each once and each of them at work in the space.

    Raises:
        ValueError: if a method is unknown, named twice or works in the residual stream only.
    """
    if isinstance(names, str):
        raise ValueError(f"methods={names!r} is no list of names; pass one, as [{names!r}].")
    if not names:
        raise ValueError("methods is empty; name at least one (`mera methods` lists all).")
    found = [find_method(name) for name in names]
    for each in found:
        if [other.name for other in found].count(each.name) > 1:
            raise ValueError(f"The method {each.name} is named twice; name each method once.")
        if space != "raw" and not each.in_latents:
            able = ", ".join(other.name for other in METHODS.values() if other.in_latents)
            raise ValueError(
                f"{each.name} works in the residual stream only; in SAE space there are {able}."
            )
    return found


def require_suited(methods: Sequence[Method], task: Task[Any]) -> None:
    """Refuse methods that need options on a scored task, and methods for replies elsewhere.

    Raises:
        ValueError: naming the first such method, and those that would do.
    """
    wanted = "replies" if task.scored else "options"
    for each in methods:
        if each.on not in (wanted, "both"):
            able = ", ".join(o.name for o in METHODS.values() if o.on in (wanted, "both"))
            lacks = (
                "options to choose from, and replies to this task are scored"
                if task.scored
                else "replies that are scored, and this task has options"
            )
            raise ValueError(f"{each.name} needs {lacks}; on {task.name} there are {able}.")


def _load_method(path: Path, name: str) -> Method:
    if not path.is_file():
        raise ValueError(f"There is no file {path}; pass the path of your method as FILE.py:NAME.")
    try:
        function: Treat | None = storage.run_python(path).get(name)
    except Exception as error:
        raise ValueError(f"{path} does not run ({type(error).__name__}: {error}).") from error
    if function is None or not callable(function):
        raise ValueError(f"{path} defines no function {name!r}; name one that takes the run.")
    if name not in METHODS or METHODS[name].treat is not function:
        method(function)
    return METHODS[name]


# --- the ideas ----------------------------------------------------------------------------------


def _additive(name: str, probe: str, run: Run) -> Treatment:  # noqa: ARG001
    """Move every token by a fixed length against a probe."""
    fitted, strength = run.probe(probe), run.config.strength
    steering = replace(run.steering(fitted), rule=Additive(strength))
    details = {"strength": strength, **_of(fitted)}
    return Treatment(steering.fwd_hooks(), details=details, probe=fitted)


def _tuned(name: str, probe: str, run: Run) -> Treatment:
    """Choose that length on the calibration split, with the certificate MERA needs."""
    fitted = run.probe(probe)
    steering = run.steering(fitted)
    decision = run.calibrate(name, [replace(steering, rule=Additive(s)) for s in STRENGTHS])
    return _certified(decision, fitted, {"strength": decision.strength, **_of(fitted)})


def _mera(name: str, probe: str, run: Run) -> Treatment:
    """Follow MERA's rule: steer at the certified threshold or not at all."""
    fitted = run.probe(probe)
    decision = run.calibrate(name, run.steering(fitted))
    return _certified(decision, fitted, {**_of(fitted), "fit": probe})


def _published(name: str, probe: str, run: Run) -> Treatment:
    """Follow MERA's rule as published: the paper's thresholds, and the best of its regressions.

    Other thresholds hold where they are asked for. Latents get the ridge probe: there the paper's
    six lasso penalties in every layer take hours.
    """
    if probe == "best_regression" and isinstance(run.space, SAESpace):
        probe = "ridge"
    fitted = run.probe(probe)
    candidates: Any = run.steering(fitted)
    if run.config.thresholds == "default":
        candidates = [candidates.at(threshold) for threshold in PAPER_THRESHOLDS]
    decision = run.calibrate(name, candidates)
    return _certified(decision, fitted, {**_of(fitted), "fit": probe})


def _along(name: str, kind: str, run: Run) -> Treatment:
    """Follow MERA's rule along another direction than the probe's own."""
    probe = run.probe("ridge")
    direction = fit_direction(features(run.activations, run.space), probe, kind)
    steering = replace(run.steering(probe), direction=direction.vectors)
    details = {"probe": probe.kind, "penalty": probe.penalty}
    details |= {"direction": kind, "notes": list(direction.notes)}
    return _certified(run.calibrate(name, steering), probe, details)


def _certified(
    decision: Calibration, probe: LinearProbe | None, details: dict[str, Any]
) -> Treatment:
    """Steer as certified, or not at all."""
    return Treatment(decision.fwd_hooks(), calibration=decision, details=details, probe=probe)


def _of(probe: LinearProbe) -> dict[str, Any]:
    return {"probe": probe.kind, "penalty": probe.penalty, "best_layer": probe.best_layer}


def _searched(run: Run) -> Treatment:
    """Search freely on training data, certify once."""
    if run.splits.train.scored:
        return _replying("searched", DIRECTIONS, run)

    def look(folder: Path) -> Search:
        given = run.config.search_budget
        choices = replace(_choices(run), budget=None if given is None else seconds_of(given))
        told: dict[str, Any] = {"choices": choices, "settings": run.read, "space": run.space}
        return search(run.model, run.splits.train, run.activations, folder=folder, **told)

    found = _search(run, "searched", look, run.space)
    decision = run.calibrate("searched", found.steering.at(found.chosen.threshold))
    return _certified(decision, found.steering.probe, _details(found))


def _flip(run: Run) -> Treatment:
    """Answer the second-best option where the predicted error is too high."""
    train, learned, choices = run.splits.train, run.activations, _choices(run)
    found = _search(run, "flip", lambda _: search_flip(train, learned, choices=choices))
    certify = partial(
        certify_flip, run.model, run.splits.calibration, found, **_terms_of(run, "flip")
    )
    decision = run.decide("flip", certify)
    idle = Treatment(calibration=decision, details=_details(found), probe=found.steering.probe)
    threshold = decision.threshold
    if threshold is None:
        return idle

    def answer(outcomes: Outcomes) -> Outcomes:
        return flipped(outcomes, outcomes.max_score, threshold)

    instead = f"above {threshold:.3g} the second-best option is answered"
    hooks = reading_hooks(found.steering)
    return replace(idle, fwd_hooks=hooks, answer=answer, instead=instead)


def _class_probe(run: Run) -> Treatment:
    """Answer by a classifier of the activations, in the model's place."""
    train, learned, seed = run.splits.train, run.activations, run.config.seed

    def make(folder: Path) -> None:
        train.require_classes()
        fit_class_probe(train, learned, seed=seed).save(folder)

    found = run.kept("probes/class", "class_probe.json", make, ClassProbe.load)
    terms = _terms_of(run, "class_probe")
    certify = partial(certify_class_probe, run.model, run.splits.calibration, found, **terms)
    decision = run.decide("class_probe", certify)
    held_out = max(found.accuracy)
    details = {"layers": [found.layer], "penalty": found.penalty, "held_out_accuracy": held_out}
    classifier = None if decision.abstained else found
    return Treatment(calibration=decision, details=details, classifier=classifier)


def _family(name: str, run: Run) -> Treatment:
    """Choose among a family's candidates on training data, certify one."""

    def certify() -> Calibration:
        train, choices = run.splits.train, _choices(run)
        told: dict[str, Any] = {"choices": choices, "settings": run.read, "passes": run.passes}
        train.require_classes()
        found = search_family(FAMILIES[name], run.model, train, run.activations, **told)
        terms = {**_terms_of(run, name), "passes": run.passes}
        return calibrate(run.model, run.splits.calibration, found.steering, **terms)

    decision = run.decide(name, certify)
    chosen = decision.best.steering
    names = ("rule", "layers", "positions", "threshold", "strength")
    details = {each: chosen[each] for each in names if each in chosen}
    details |= {"direction": name, "probe": "its own", "penalty": 0.0}
    return _certified(decision, None, details)


def _withhold(run: Run) -> Treatment:
    """Answer where the predicted error is low, and certify how few of those answers are wrong."""
    steering = replace(run.steering(run.probe("ridge")), layers="best")
    terms, alpha = run.terms("withhold"), run.config.max_risk
    details = {**_of(steering.probe), "max_risk": alpha}
    if terms.delta == 0:
        return Treatment(details=details, probe=steering.probe)  # another method is primary
    certify = partial(certify_trust, run.model, run.splits.calibration, steering, run.activations)
    name = "withholding.json"

    def make(folder: Path) -> None:
        found = certify(alpha=alpha, terms=terms, settings=run.read)
        storage.write_json(folder / name, found.to_json())

    def load(folder: Path) -> Withholding:
        return Withholding.from_json(storage.read_json(folder / name))

    found = run.kept("withholding", name, make, load)
    threshold, row = found.threshold, found.chosen or found.rows[0]
    details |= {"answered": row.answered / found.n, "wrong_at_most": row.wrong_at_most}
    idle = Treatment(details=details, probe=steering.probe, withholding=found)
    if threshold is None:
        return idle
    instead = f"above {threshold:.3g} no answer is given"
    answer = partial(withheld, threshold=threshold)
    return replace(idle, fwd_hooks=reading_hooks(steering), answer=answer, instead=instead)


def _replying(name: str, directions: tuple[str, ...], run: Run) -> Treatment:
    """Search how to steer replies along some directions, certify once."""

    def look(folder: Path) -> Search:
        config = run.config
        choices = ReplyChoices(directions, metric=config.metric, seed=config.seed)
        options: dict[str, Any] = {"choices": choices, "settings": run.read, "folder": folder}
        return search_replies(run.model, run.splits.train, run.activations, **options)

    try:
        found = _search(run, name, look)
    except NoDirection as error:  # the other methods of the run may still find something
        logger.warning("%s: %s", name, error)
        return Treatment(lacks=f"{name}: {error}")
    decision = run.calibrate(name, found.steering)
    return _certified(decision, found.steering.probe, _details(found))


def _prompted(run: Run) -> Treatment:
    """Ask more firmly: on a scored task by the reminder that does better on training data."""
    train = run.splits.train
    if not train.scored:
        return Treatment(instruction=INSTRUCTION)
    if not all(example.instruction for example in train.examples):
        raise ValueError(
            f"prompt_steering repeats the task's instruction, and {train.name} has none; give it "
            "an `instruction`, or leave the method out."
        )

    def make(folder: Path) -> None:
        _, judge = divide(train, ReplyChoices().search_share, run.config.seed)
        part = train.subset(judge)
        tried = {
            each: evaluate(run.model, part.with_instruction(each), settings=run.read).accuracy
            for each in REMINDERS
        }
        storage.write_json(folder / "reminders.json", tried)

    def load(folder: Path) -> dict[str, float]:
        return storage.read_json(folder / "reminders.json")

    tried = run.kept("searches/prompt_steering", "reminders.json", make, load)
    best = max(tried, key=tried.__getitem__)
    return Treatment(instruction=best, details={"reminder": best, "tried": tried})


def _redrawing(name: str, run: Run) -> Treatment:
    """Draw replies again: a second one where the first looks wrong, or the best of several."""
    probe = probe_of_replies(run.activations, seed=run.config.seed)
    if probe is None:
        return Treatment(lacks=f"{name}: hardly any reply in training has a token to read.")
    draw = partial(draw_replies, run.model, probe=probe, settings=run.read)
    details: dict[str, Any] = {"n_draws": N_DRAWS, "layer": probe.best_layer}
    if name == "retry":
        _, judge = divide(run.splits.train, ReplyChoices().search_share, run.config.seed)
        drawn = draw(run.splits.train.subset(judge), n_draws=2)
        gains = {t: drawn.retried(t).accuracy for t in RETRY_THRESHOLDS}
        details |= {"n_draws": 2, "threshold": max(gains, key=gains.__getitem__)}

    def reply(task: Task[Any]) -> Outcomes:
        # The three methods that draw again share their draws.
        make: Callable[[Path], object] = lambda at: draw(task, n_draws=N_DRAWS).save(at)  # noqa: E731
        draws = run.kept(f"draws/{task.data_hash}", PREDICTED, make, Draws.load)
        if name == "retry":
            return draws.retried(details["threshold"])
        return draws.best() if name == "best_of_k" else draws.best_scored()

    return Treatment(reply=reply, details=details, probe=probe)


def _search(run: Run, name: str, look: Callable[[Path], Search], space: Space = RAW) -> Search:
    """Search once per run, in a folder that keeps what was tried if the run is ended."""

    def make(folder: Path) -> None:
        run.splits.train.require_classes()
        look(folder).save(folder)

    return run.kept(f"searches/{name}", "search.json", make, partial(Search.load, space=space))


def _choices(run: Run) -> Choices:
    return Choices(metric=run.config.metric, seed=run.config.seed)


def _terms_of(run: Run, name: str) -> dict[str, Any]:
    """Return the terms on which a method of a run is certified, and how answers are read."""
    return {"terms": run.terms(name), "min_gain": run.config.min_gain, "settings": run.read}


def _details(found: Search) -> dict[str, Any]:
    names = ("direction", "penalty", "layers", "positions", "first_k", "strength")
    chosen = {name: getattr(found.chosen, name) for name in names}
    chosen["layers"] = list(found.chosen.layers)
    return chosen | {"n_candidates": len(found.table), **found.details}


# --- the table ----------------------------------------------------------------------------------

_FIXED, _TUNED = "Move every token by a fixed length against", "Certify the best length against"
_CONTRAST, _PAPERS = "high minus low error", "MERA with the paper's"
_ALONG = "MERA along `S w`,"
_WITHIN = "wrong minus right examples within true classes"
_PER_ANSWER = "one direction per unsteered answer, the true class held fixed"
_ROWS = (
    ("additive_probe", _additive, "ridge", f"{_FIXED} the regression probe."),
    ("additive_logistic_probe", _additive, "logistic", f"{_FIXED} the logistic probe."),
    ("vanilla_contrastive", _additive, "contrastive", f"{_FIXED} {_CONTRAST}."),
    ("additive_sub_probe", _additive, "worst_regression", f"{_FIXED} the paper's worst."),
    ("additive_median_probe", _additive, "median_regression", f"{_FIXED} the paper's median."),
    ("tuned_additive_probe", _tuned, "ridge", f"{_TUNED} the regression probe."),
    ("tuned_contrastive", _tuned, "contrastive", f"{_TUNED} {_CONTRAST}."),
    ("optimal_probe", _published, "best_regression", "MERA as published: its best regression."),
    ("ridge_probe", _mera, "ridge", "MERA with one strongly regularised ridge probe."),
    ("optimal_logistic_probe", _published, "logistic", "MERA with the logistic probe."),
    ("optimal_contrastive", _published, "contrastive", f"MERA with {_CONTRAST} as the probe."),
    ("sub_optimal_probe", _published, "worst_regression", f"{_PAPERS} worst regression."),
    ("median_optimal_probe", _published, "median_regression", f"{_PAPERS} median one."),
    ("pattern_probe", _along, "pattern", f"{_ALONG} the shortest shift in the data's metric."),
    ("controlled_pattern", _along, "controlled_pattern", f"{_ALONG} S within true classes."),
    ("controlled_contrastive", _along, "controlled_contrastive", f"MERA along {_WITHIN}."),
    ("answer_controlled", _along, "answer_controlled", f"MERA along {_PER_ANSWER}."),
)


def _row(name: str, about: str, treat: Treat, **flags: Any) -> None:
    METHODS[name] = Method(name, about, treat, **flags)


_anywhere: dict[str, Any] = {"certifies": False, "on": "both"}
_row("no_steering", "Leave the model alone.", lambda run: Treatment(), **_anywhere)  # noqa: ARG005
_row("prompt_steering", f"Ask: {INSTRUCTION}", _prompted, **_anywhere)
for _name, _idea, _of_what, _about in _ROWS:
    _latents = _idea is not _tuned and _of_what not in ("worst_regression", "median_regression")
    _certifies = _idea is not _additive
    _treat = partial(_idea, _name, _of_what)
    # What is learned within true classes, or per answer, needs options.
    _on = "options" if "controlled" in _name else "both"
    _row(_name, _about, _treat, in_latents=_latents, certifies=_certifies, on=_on)
_about = "Search direction, layers, scope, threshold in training; certify one."
_row("searched", _about, _searched, on="both")
_row("flip", "Answer the second-best option where predicted error is high; steer nothing.", _flip)
_row("class_probe", "Answer by a classifier of the activations; steer nothing.", _class_probe)
for _name, _of_family in FAMILIES.items():
    _about = (_of_family.__doc__ or "").splitlines()[0]
    _row(_name, _about, partial(_family, _name), in_latents=False)
_about = "Answer only where predicted error is low; certify how few answers are wrong."
_row("withhold", _about, _withhold, in_latents=False)
_steer = "Search layer, strength, scope, gate of a direction for replies; certify one: "
for _name, _about in {
    "instruction": "prompts with and without the instruction.",
    "prompt_controlled": "wrong and right replies to the same prompt.",
    "reply_contrast": "wrong and right replies.",
    "kind_controlled": "wrong and right replies to questions of the same kind.",
}.items():
    _kinds = ("contrastive" if _name == "reply_contrast" else _name,)
    _row(_name, _steer + _about, partial(_replying, _name, _kinds), in_latents=False, on="replies")
for _name, _about in {
    "retry": "Draw a second reply where the first one's predicted error is high.",
    "best_of_k": f"Draw {N_DRAWS} replies; keep the one with the least predicted error.",
    "best_of_k_scorer": f"Draw {N_DRAWS} replies; keep the one that the scorer likes best.",
}.items():
    _flags: dict[str, Any] = {"in_latents": False, "certifies": False, "on": "replies"}
    _row(_name, _about, partial(_redrawing, _name), **_flags)
BUILT_IN = frozenset(METHODS)
"""Names that no user's method may take."""
