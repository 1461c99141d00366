"""What a method may look at, and what it gives: a `Treatment` of the test prompts."""

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mera_tl.certificate.certificate import Calibration
from mera_tl.certificate.terms import Terms
from mera_tl.certificate.withholding import Withholding
from mera_tl.inference.activations import Activations, collect
from mera_tl.inference.answers import ReadSettings
from mera_tl.inference.evaluation import evaluate
from mera_tl.inference.outcomes import Outcomes
from mera_tl.methods.class_probe import ClassProbe
from mera_tl.models.model import FwdHooks, Model
from mera_tl.probes.probe import LinearProbe
from mera_tl.steering.spaces import Space
from mera_tl.steering.steering import Steering
from mera_tl.steering.unsteered import Passes
from mera_tl.storage import Content
from mera_tl.tasks.task import Splits, Task


class Run(ABC):  # noqa: B024
    """What a method may look at: one model, one task, one split; `benchmark.Run` is one."""

    # ruff: noqa: B027, D102
    # fmt: off
    config: Any
    """The options, a `RunConfig`: strength, seed, min_gain."""
    @property
    def read(self) -> ReadSettings: ...
    @property
    def model(self) -> Model: ...
    @property
    def splits(self) -> Splits: ...
    @property
    def activations(self) -> Activations: ...
    @property
    def passes(self) -> Passes: ...
    @property
    def space(self) -> Space: ...
    def terms(self, method: str) -> Terms: ...
    def probe(self, name: str) -> LinearProbe: ...
    def steering(self, probe: LinearProbe) -> Steering: ...
    def calibrate(
        self, name: str, candidates: Steering | Sequence[Steering]
    ) -> Calibration: ...
    def decide(self, name: str, certify: Callable[[], Calibration]) -> Calibration: ...
    def kept(
        self, name: str, last: str, make: Callable[[Path], object], load: Callable[[Path], Content]
    ) -> Content: ...
    # fmt: on


@dataclass(frozen=True, eq=False)
class Treatment:
    """What a method does to test prompts."""

    fwd_hooks: FwdHooks = ()
    instruction: str | None = None
    """A sentence placed before "Answer:"."""
    calibration: Calibration | None = None
    """The certificate, for methods that may abstain."""
    details: dict[str, Any] = field(default_factory=dict)
    """What a reader of the record should know: strength, layer, penalty."""
    probe: LinearProbe | None = None
    answer: Callable[[Outcomes], Outcomes] | None = None
    """What becomes of the answers, for a method that changes them and not the activations."""
    instead: str = ""
    """In words, when and how that is done."""
    classifier: ClassProbe | None = None
    """What answers in the model's place, from its activations."""
    withholding: Withholding | None = None
    """The certificate of a method that withholds answers, and corrects none."""
    reply: Callable[[Task[Any]], Outcomes] | None = None
    """How a task is answered, for a method that replies in its own way."""
    lacks: str = ""
    """What the method needs and the training data do not have; then it does nothing."""

    @property
    def acts(self) -> bool:
        """Whether the model is run again; otherwise answers are the unsteered ones, or theirs."""
        own = (self.classifier, self.reply, self.instruction)
        return bool(self.fwd_hooks) or any(each is not None for each in own)

    def apply(self, run: Run, task: Task[Any]) -> Outcomes:
        """Answer a task under this treatment."""
        if self.classifier is not None:
            read = collect(run.model, task, settings=run.read)
            return self.classifier.answer(read)
        if self.reply is not None:
            return self.reply(task)
        if self.instruction is not None:
            task = task.with_instruction(self.instruction)
        outcomes = evaluate(run.model, task, self.fwd_hooks, settings=run.read, title="test")
        return outcomes if self.answer is None else self.answer(outcomes)


Treat = Callable[[Run], Treatment]


@dataclass(frozen=True)
class Method:
    """A name, one sentence, and what to do."""

    name: str
    about: str
    treat: Treat
    in_latents: bool = True
    """Whether it works in SAE space too."""
    certifies: bool = True
    """Whether it asks for a certificate, which costs a share of delta."""
    on: Literal["options", "replies", "both"] = "options"
    """Whether it answers tasks with options, scored tasks, or both."""
    code: str = ""
    """Hash of the code of a user's own; what that imports is not looked at."""
