"""Look before a run spends anything: does the model answer this task, and how long will it take?

`preflight` answers a few prompts. Its `warnings` are meant for the screen, the record, the
certificate's sentence, the table and the report alike: where a model gives one answer, "error" is
the class, and a probe of it is a classifier. `str()` of it is what `mera preflight` prints and what
`mera run` shows first; a run is `degenerate` if there is a warning, which `--strict` refuses.
"""

import resource
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from typing import Any

from mera_tl.certificate.certificate import percent
from mera_tl.inference.answers import OptionTokens, ReadSettings, by_length, option_tokens
from mera_tl.inference.evaluation import evaluate, tokenize_task
from mera_tl.inference.outcomes import Outcomes
from mera_tl.models.chat import control_tokens
from mera_tl.models.model import Model
from mera_tl.tasks.task import Task

ONE_ANSWER = 0.95
"""Share of answers from which on a model is said to give one answer only."""
MOSTLY = 0.5
"""Share of unanswered prompts above which they are the story."""
SHOWN = 150
"""Characters of a prompt that are shown."""


@dataclass(frozen=True)
class Preflight:
    """What a few prompts told about a model on a task."""

    model: str
    task: str
    readout: str
    n: int
    """Prompts answered."""
    accuracy: float
    majority: float
    """The share of the most frequent true option, which answering it always would reach."""
    unanswered: float
    """Share of prompts without an answer."""
    answers: Mapping[str, float]
    """Share of each option among all answers given."""
    shown: tuple[Mapping[str, Any], ...]
    """Three prompts: their text, the reply if one was decoded, the answer, the true option."""
    reading: Mapping[str, tuple[str, ...]]
    """How each option is read: the variants that count, as text."""
    seconds_per_prompt: float
    memory: int
    """Most bytes that this process has held so far."""
    typed_controls: int = 0
    """Prompts of the split whose own text holds a control token that the model reads as such."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with this baseline, a sentence each; none if it makes sense."""
        found = []
        if self.typed_controls:
            s = "s" * (self.typed_controls != 1)
            found.append(
                f"Control tokens stand in the text of {self.typed_controls:,} training prompt{s}, "
                "and a plain prompt is read as it is written; take them out of the data, or use a "
                "chat template, in which they are text."
            )
        if self.readout == "reply":
            return (*found, *self._of_replies())
        if self.unanswered > MOSTLY:
            found.append(
                f"{percent(self.unanswered)} of replies are no answer; look at them, and read "
                "whole options instead (--readout options)."
            )
        if self.answers and max(self.answers.values()) >= ONE_ANSWER:
            one = max(self.answers, key=self.answers.__getitem__)
            found.append(
                f"{percent(self.answers[one])} of answers are {one!r}: the model hardly "
                "tells the classes apart, and what is called error is the class."
            )
        # Half an example more: equal to the majority is no better than it, but not below.
        if self.accuracy < self.majority - 0.5 / self.n:
            found.append(
                f"On {self.n} training prompts accuracy is {percent(self.accuracy)}, below the "
                f"{percent(self.majority)} that always giving the most frequent answer would "
                "reach; a gain up to there is no skill."
            )
        return tuple(found)

    def _of_replies(self) -> tuple[str, ...]:
        if self.accuracy == 0:
            return (
                f"None of {self.n} replies is right, so replies teach nothing: only a direction "
                "that needs no right reply (instruction) can be found.",
            )
        if self.accuracy == 1:
            return (f"All of {self.n} replies are right: there is nothing to gain.",)
        return ()

    @property
    def degenerate(self) -> bool:
        """Whether there is a warning."""
        return bool(self.warnings)

    def seconds(self, n_prompts: int | float) -> float:
        """Estimate how long so many prompts will take, each run once."""
        return self.seconds_per_prompt * n_prompts

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for a record."""
        return {**asdict(self), "warnings": list(self.warnings)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Preflight":
        """Rebuild what `to_json` returned."""
        parts: dict[str, Any] = {"typed_controls": 0, **value}  # older ones do not say
        parts = {each.name: parts[each.name] for each in fields(cls)}
        parts["shown"] = tuple(parts["shown"])
        parts["reading"] = {option: tuple(read) for option, read in parts["reading"].items()}
        return cls(**parts)

    def __str__(self) -> str:
        shares = ", ".join(f"{option} {percent(share)}" for option, share in self.answers.items())
        lines = [
            f"{self.model} on {self.task}: {self.n} prompts, readout {self.readout}",
            f"accuracy {percent(self.accuracy)} (always the most frequent: "
            f"{percent(self.majority)}), unanswered {percent(self.unanswered)}",
            f"answers: {shares or 'none'}",
        ]
        if self.readout == "reply":
            lines[1:] = [f"right replies: {percent(self.accuracy)}"]
        lines += [f"{o} is read as {', '.join(map(repr, v))}" for o, v in self.reading.items()]
        for one in self.shown:
            said = "answers" if one["reply"] is None else f"replies {one['reply']!r}, read as"
            answer = one["answer"] or "no answer"
            lines += [f"asked {one['prompt']!r}", f"    {said} {answer} (true: {one['label']})"]
            if self.readout == "reply":
                lines[-1] = f"    replies {one['reply']!r}: {answer}"
        lines.append(
            f"{self.seconds(1000):.3g} s per 1,000 prompts; {self.memory / 2**20:,.0f} MiB of "
            "memory so far"
        )
        lines += [f"WARNING: {warning}" for warning in self.warnings]
        wrap = textwrap.TextWrapper(width=80, subsequent_indent="    ")
        return "\n".join(wrap.fill(line) for line in lines)


def preflight(
    model: Model, task: Task[Any], settings: ReadSettings | None = None, n: int = 50
) -> Preflight:
    """Answer `n` prompts of a task, unsteered, and sum up what a user should know beforehand.

    Prompts are taken evenly over the task, so that an order by class does not matter. With a
    training split nothing of calibration or test is seen.

    Raises:
        ValueError: as `evaluate`.
    """
    settings = ReadSettings.of(task, settings)
    n = min(n, len(task))
    places = [i * len(task) // n for i in range(n)]
    some, prompts = task.subset(places), tokenize_task(model, task, settings)
    options = option_tokens(model, some, settings)
    evaluate(model, some.subset([0]), settings=settings, title="warm-up")
    start = time.perf_counter()
    outcomes = evaluate(model, some, settings=settings, title="pre-flight")
    seconds = (time.perf_counter() - start) / n
    # Of few prompts those in a batch differ more in length, and more of it is padding.
    seconds *= _width(prompts, settings) / _width([prompts[i] for i in places], settings)
    counts = [outcomes.labels.eq(i).sum().item() for i in range(len(task.options))]
    said = outcomes.predictions[outcomes.answered]
    shares = {o: said.eq(i).double().mean().item() for i, o in enumerate(task.options)}
    return Preflight(
        model=model.name,
        task=task.name,
        readout=settings.readout,
        n=n,
        accuracy=outcomes.accuracy,
        majority=0.0 if task.scored else max(counts) / n,
        unanswered=1 - outcomes.answered.double().mean().item(),
        answers=shares if len(said) else {},
        shown=tuple(_shown(some, outcomes, i) for i in sorted({0, n // 2, n - 1})),
        reading={} if task.scored else _reading(options),
        seconds_per_prompt=seconds,
        memory=_peak_memory(),
        typed_controls=_typed_controls(model, prompts),
    )


def _typed_controls(model: Model, prompts: Sequence[Sequence[int]]) -> int:
    """Count prompts with more control tokens than the tokenizer and the template give to all."""
    controls = control_tokens(model.tokenizer)
    counts = [sum(token in controls for token in ids) for ids in prompts]
    return sum(count > min(counts) for count in counts)


def _width(prompts: Sequence[Sequence[int]], settings: ReadSettings) -> float:
    """Return how many columns a prompt takes in its batch, on average."""
    batches = by_length(prompts, settings)
    return sum(len(batch) * len(prompts[batch[0]]) for batch in batches) / len(prompts)


def _shown(task: Task[Any], outcomes: Outcomes, place: int) -> dict[str, Any]:
    example, said = task.examples[place], int(outcomes.predictions[place])
    # Where a prompt has a text of its own, the question around it is the same for all.
    text = " ".join((example.text or example.prompt).split())
    return {
        "row": example.row,
        "prompt": text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...",
        "reply": outcomes.replies[place],
        "answer": task.options[said] if said >= 0 else None,
        "label": task.options[example.label],
    }


def _reading(options: OptionTokens) -> dict[str, tuple[str, ...]]:
    """Return what each option is read through, as the tokenizer spells it."""
    read = {}
    for option, whole, single in zip_longest(
        options.options, options.continuations, options.tokens, fillvalue=()
    ):
        ids = whole or [(token,) for token in single]
        read[str(option)] = tuple(options.tokenizer.decode(list(one)) for one in ids)
    return read


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
