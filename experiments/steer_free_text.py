"""Does steering make a real model follow instructions that it is given and does not follow?

Six kinds of checkable instruction on short questions, SmolLM2-135M-Instruct, three splits. A
direction is learned from prompts with and without the instruction (`instruction`), from wrong and
right replies (`contrastive`), or from wrong and right replies to the same prompt
(`prompt_controlled`). Layer, strength, scope and gate are chosen on training prompts; one candidate
is certified on others; all is measured on a third part. A scorer looks at the form alone: `held`
says whether replies still answer the question, where that takes a word or two
(`short_answers.toml`). Beside it on the same prompts: a firmer wording of the instruction, a second
reply where a probe expects an error, the best of four replies by that probe, and by the scorer
itself. Instructions were chosen by how often the unsteered model follows them on 32 training
prompts (.03 to .59), before anything was steered; three were left out that it never follows there
(all lower case, a closing phrase, JSON of a message).

gemma-3-270m, a base model, gets the first two of the six that it follows on .03 to .60 of 32
training prompts.

Expected: `instruction` gains where the model half understands. Two hours on one core. Replies and
trials are kept as they come: a run that is killed goes on, and splits share what they can.

    python -m experiments.steer_free_text --model FOLDER
    python -m experiments.steer_free_text --model GEMMA --once --test 60 --system None \\
        --tasks ifeval_like_words ifeval_like_numbered_list
    python -m experiments.steer_free_text --model organism --tasks spam_sentence --once \\
        --directions kind_controlled contrastive prompt_controlled --strengths 1 2 4 --train 400 \\
        --calibration 300 --test 400 --reply-tokens 6 --dtype float32 --system None
"""

import tomllib
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import tyro

from mera_tl import (
    Activations,
    Model,
    Outcomes,
    ReadSettings,
    Steering,
    Task,
    Terms,
    certify,
    collect,
    evaluate,
    load_model,
    load_task,
    storage,
)
from mera_tl.benchmark import paired_change, scores, some_prompts
from mera_tl.inference import reply_text
from mera_tl.methods import REMINDERS, Draws, ReplyChoices, Search, draw_replies, search_replies
from mera_tl.probes import fit_error_probe
from mera_tl.tasks import Scorer

RESULTS = Path(__file__).parent / "results" / Path(__file__).stem
N_DRAWS = 4
RETRY_ABOVE = 0.5
"""Predicted error; fixed, not tuned."""


@dataclass(frozen=True)
class Config:
    """What is run."""

    model: str = "smollm2"
    """Folder of the model."""
    tasks: tuple[str, ...] = (
        "ifeval_like_json",
        "ifeval_like_keyword",
        "ifeval_like_words",
        "ifeval_like_numbered_list",
        "ifeval_like_no_comma",
        "ifeval_like_one_word",
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    directions: tuple[str, ...] = ("instruction",)
    """On every split."""
    once: tuple[str, ...] = ("contrastive", "prompt_controlled", "draws", "elsewhere")
    """On the first split only: directions, the baselines that draw again, and what the steering
    along the first direction does to three other tasks."""
    strengths: tuple[float, ...] = (0.75, 1.5)
    first_k: tuple[int, ...] = ()
    watching: tuple[float, ...] = ()
    """More that is tried with the best candidates, see `ReplyChoices`; each costs replies."""
    train: int = 60
    calibration: int = 80
    test: int = 80
    reply_tokens: int = 20
    system: str | None = "Reply briefly."
    dtype: str = "bfloat16"
    data_dir: str | None = None
    out: Path = Path("runs/steer_free_text")


@dataclass(frozen=True, eq=False)
class Cell:
    """One task, with what is kept of it."""

    model: Model
    task: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        return self.config.out / Path(self.config.model).name / self.task

    @property
    def settings(self) -> ReadSettings:
        return ReadSettings(
            "reply", reply_tokens=self.config.reply_tokens, batch_tokens=4096, progress=False
        )

    def answered(self, name: str, task: Task[Any], hooks: Any = (), remind: str = "") -> Outcomes:
        """Answer what has not been answered under this name; the rest is there."""
        path = self.folder / f"{name}.jsonl"
        known = {record["row"]: record for record in storage.read_records(path)}
        lacking = [i for i, e in enumerate(task.examples) if e.row not in known]
        if lacking:
            some = task.subset(lacking)
            some = some.with_instruction(remind) if remind else some
            new = evaluate(self.model, some, hooks, settings=self.settings)
            known |= {record["row"]: record for record in new.to_records()}
            storage.write_records(path, list(known.values()))
        rows = [known[example.row] for example in task.examples]
        return Outcomes.from_records(rows, task.options)

    def learned(self, task: Task[Any]) -> Activations:
        folder = self.folder / f"activations-{self.seed}"
        make = partial(collect, self.model, task, settings=self.settings)
        return storage.kept(folder, "manifest.json", lambda at: make(out=at), Activations.load)


def searched(cell: Cell, kind: str, splits: Any) -> Search:
    """Search along a direction; at once where that has been done."""
    config, folder = cell.config, cell.folder / f"{kind}-{cell.seed}"
    more: dict[str, Any] = {"first_k": config.first_k, "watching": config.watching}
    choices = ReplyChoices((kind,), strengths=config.strengths, seed=cell.seed, **more)
    options: dict[str, Any] = {"choices": choices, "settings": cell.settings, "folder": folder}
    return search_replies(cell.model, splits.train, cell.learned(splits.train), **options)


def steered(cell: Cell, kind: str, splits: Any) -> tuple[Outcomes, dict[str, Any]]:
    """Search along a direction, certify, and answer the test prompts under what was chosen."""
    found = searched(cell, kind, splits)
    steering: Steering = found.steering
    name = f"{kind}-{cell.seed}-steered"
    before, after = (
        cell.answered(name if hooks else "no_steering", splits.calibration, hooks)
        for hooks in ((), steering.fwd_hooks())
    )
    rows = [example.row for example in splits.calibration.examples]
    decision = certify(after.gain(before).numpy()[None], terms=Terms(seed=cell.seed), examples=rows)
    # Measured whether certified or not: the table says which it was.
    test = cell.answered(name, splits.test, steering.fwd_hooks())
    told = {"decision": decision.decision.value, "certificate": str(decision).splitlines()[0]}
    chosen = {k: found.details[k] for k in ("notes", "probe_auroc", "probe_auroc_within_kind")}
    return test, {**told, "chosen": str(found.chosen), **chosen}


def drawn(cell: Cell, splits: Any) -> dict[str, Outcomes]:
    """Draw replies to the test prompts again: the baselines that pay in tokens."""
    probe = fit_error_probe(cell.learned(splits.train), position="generated", seed=cell.seed)

    def make(folder: Path) -> None:
        draws = draw_replies(cell.model, splits.test, probe, N_DRAWS, settings=cell.settings)
        draws.save(folder)

    folder = cell.folder / f"draws-{cell.seed}"
    draws = storage.kept(folder, "predicted.safetensors", make, Draws.load)
    return {
        "retry": draws.retried(RETRY_ABOVE),
        "best_of_k": draws.best(),
        "best_of_k_scorer": draws.best_scored(),
    }


def elsewhere(cell: Cell, splits: Any) -> dict[str, Any]:
    """Answer a few prompts of the three tasks that come next under this task's steering."""
    kind, tasks = cell.config.directions[0], cell.config.tasks
    hooks, place, on = searched(cell, kind, splits).steering.fwd_hooks(), tasks.index(cell.task), {}
    for other in (*tasks, *tasks)[place + 1 : place + 4]:
        there = replace(cell, task=other)
        some = some_prompts(load_task(other, data_dir=cell.config.data_dir), cell.seed)
        name = f"{kind}-{cell.seed}-of-{cell.task}"
        on[other] = paired_change(
            there.answered(name, some, hooks), there.answered("no_steering", some)
        )
    n = sum(told["n"] for told in on.values())
    net = sum(told["better"] - told["worse"] for told in on.values())
    return {"of": kind, "n": n, "accuracy_change": net / n, "on": on}


def reminded(cell: Cell, splits: Any) -> tuple[Outcomes, dict[str, Any]]:
    """Ask more firmly, by the wording that does best on training prompts."""
    some = splits.train.subset(range(cell.config.train // 3))
    tried = [
        cell.answered(f"prompt_steering-{i}", some, remind=wording).accuracy
        for i, wording in enumerate(REMINDERS)
    ]
    best = max(range(len(REMINDERS)), key=tried.__getitem__)
    test = cell.answered(f"prompt_steering-{best}", splits.test, remind=REMINDERS[best])
    return test, {"reminder": REMINDERS[best], "tried": tried}


@cache
def short_answers() -> dict[str, dict[str, str]]:
    """Return what answers a question, by its kind and its subject."""
    lists = tomllib.loads(Path(__file__).with_name("short_answers.toml").read_text("utf-8"))
    pairs = {kind: (each.split(":") for each in text.split(";")) for kind, text in lists.items()}
    return {k: {" ".join(s.split()): a.strip() for s, a in some} for k, some in pairs.items()}


def held(task: Task[Any], outcomes: Outcomes) -> dict[str, float]:
    """Return the shares of replies that hold a right answer, and that also have the form.

    Of the `n` whose question has a short one.
    """
    occurs, found = Scorer("contains"), list[tuple[float, float]]()
    replies = zip(task.examples, outcomes.replies, outcomes.correct.tolist(), strict=True)
    for example, reply, has_form in replies:
        question, known = example.without_instruction().prompt, short_answers().get(example.kind)
        answers = [a for subject, a in (known or {}).items() if occurs(question, subject)]
        if answers:
            answered = occurs(reply or "", "|".join(answers))
            found.append((answered, answered * has_form))
    n = len(found)
    answer, both = (sum(each) / max(1, n) for each in zip(*found, (0.0, 0.0), strict=True))
    return {"n": n, "answer": answer, "both": both}


def prompt_tokens(cell: Cell, task: Task[Any], remind: str = "") -> float:
    """Return how long prompts are on average: a firmer wording is paid for there."""
    some = task.with_instruction(remind) if remind else task
    lengths = list(map(len, cell.model.tokenize([example.prompt for example in some.examples])))
    return sum(lengths) / len(lengths)


def run(cell: Cell, known: Container[str]) -> Iterator[dict[str, Any]]:
    """Measure, on one split of a task, every method that is not known yet."""
    config = cell.config
    sizes: Any = {n: getattr(config, n) for n in ("train", "calibration", "test")}
    splits = load_task(cell.task, data_dir=config.data_dir).split(cell.seed, **sizes)
    base = cell.answered("no_steering", splits.test)

    place = {"model": Path(config.model).name, "task": cell.task, "seed": cell.seed}

    def record(name: str, outcomes: Outcomes, told: dict[str, Any]) -> dict[str, Any]:
        measured = scores(outcomes, base)
        kept = ("n", "accuracy", "accuracy_change", "spi", "p_value", "transitions")
        text = asdict(reply_text(cell.model, splits.test, outcomes, settings=cell.settings, most=8))
        found = {n: measured[n] for n in kept}
        found |= {"tokens": outcomes.n_generated.double().mean().item()}
        found |= {"prompt_tokens": prompt_tokens(cell, splits.test, told.get("reminder", ""))}
        found |= {n: text[n] for n in ("perplexity", "distinct_2")}
        found |= {"held": held(splits.test, outcomes)}
        return {**place, "method": name, **found, **told}

    kinds = (*config.directions, *(config.once if cell.seed == config.seeds[0] else ()))
    for name in ("no_steering", "prompt_steering", *kinds):
        if name in known or (name == "draws" and "best_of_k" in known):
            continue
        if name == "draws":
            yield from (record(each, made, {}) for each, made in drawn(cell, splits).items())
        elif name == "elsewhere":
            yield {**place, "method": name, **elsewhere(cell, splits)}
        elif name == "no_steering":
            yield record(name, base, {})
        elif name == "prompt_steering":
            yield record(name, *reminded(cell, splits))
        else:
            yield record(name, *steered(cell, name, splits))


def main(config: Annotated[Config, tyro.conf.OmitArgPrefixes] = Config()) -> None:  # noqa: B008
    model = load_model(config.model, system=config.system, dtype=config.dtype)
    path = RESULTS / f"{Path(config.model).name}.jsonl"
    records = storage.read_records(path)
    # Splits outermost: ended early, every task has been looked at.
    for seed, task in product(config.seeds, config.tasks):
        known = {r["method"] for r in records if (r["task"], r["seed"]) == (task, seed)}
        for record in run(Cell(model, task, seed, config), known):
            records.append(record)
            storage.write_records(path, records)
            told = record.get("certificate", "")
            print(
                task, seed, record["method"], f"{record['accuracy_change']:+.2f}", told, flush=True
            )


if __name__ == "__main__":
    tyro.cli(main)
