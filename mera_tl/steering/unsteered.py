"""What prompts leave when they run unsteered, from which every steering of them may start.

Many methods of a run are certified on the same prompts. They share one pass: the residual stream at
the final prompt token, the key-value cache, and the unsteered answers are kept.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mera_tl.inference.answers import (
    OptionTokens,
    Reading,
    ReadSettings,
    about_to_answer,
    read_from,
)
from mera_tl.inference.decoding import Decoding, Window, hooked_pass
from mera_tl.inference.prefix import Prefix
from mera_tl.models.model import Model, resid_post


class Recorder:
    """Hooks that keep the residual stream of an unsteered run, pass by pass."""

    def __init__(self, layers: Sequence[int], n_columns: int | None) -> None:
        self._n_columns = n_columns
        self.windows: list[Window] = []
        self.resid: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self.hooks = [(resid_post(layer), self._keep) for layer in layers]

    def _keep(self, resid: Float[Tensor, "row pos d_model"], hook: Any) -> None:
        if hook.layer() == next(iter(self.resid)):
            self.windows.append(hook.ctx["window"])
        kept = resid if self._n_columns is None else resid[:, -self._n_columns :].clone()
        self.resid[hook.layer()].append(kept)


@dataclass(frozen=True, eq=False)
class UnsteeredPass:
    """A batch of prompts, run and answered."""

    record: Recorder
    """The residual stream after some layers, of the final prompt token or of all."""
    decoding: Decoding
    """The batch at the end of its prompts."""
    logits: Float[Tensor, "example d_vocab"]
    """After the final prompt tokens."""
    base: Reading
    answers: Int[Tensor, " example"]
    """The option that each example is about to answer."""

    @property
    def n_bytes(self) -> int:
        """What it keeps in memory."""
        resid = [kept for passed in self.record.resid.values() for kept in passed]
        return self.decoding.n_bytes + sum(each.nbytes for each in [self.logits, *resid])


def unsteered_pass(
    model: Model,
    prompts: Sequence[Sequence[int]],
    options: OptionTokens,
    settings: ReadSettings,
    prefix: Prefix | None,
    decide: bool,
    layers: Sequence[int],
    *,
    whole: bool = False,
) -> UnsteeredPass:
    """Run a batch of prompts and answer them, recording some layers; `whole`: at every token."""
    record = Recorder(layers, None if whole else 1)
    labels = torch.arange(len(prompts), device=model.device)
    with torch.inference_mode(), hooked_pass(model, record.hooks):
        decoding = Decoding(model, prompts, record.hooks, labels, prefix)
        logits = decoding.prompt()
        unsteered = decoding.fork(labels, record.hooks)
        base = read_from(unsteered, logits, options, settings, decide=decide)
        answers = base.predictions.to(labels)
        if settings.decodes:  # a reply may turn out otherwise than it began
            answers = about_to_answer(decoding, logits, options, settings)
    return UnsteeredPass(record, decoding, logits, base, answers)


class Passes:
    """Unsteered passes of one model, kept for those who ask again, as far as memory allows.

    What does not fit is run again, as all would be without. Weights must stay as they are.
    """

    def __init__(self, n_bytes: int = 1 << 30) -> None:
        self._left = n_bytes
        self._kept: dict[Hashable, UnsteeredPass] = {}

    def of(self, key: Hashable, run: Callable[[], UnsteeredPass]) -> UnsteeredPass:
        """Return the pass that a key names, with all it depends on; run it where it is not kept."""
        found = self._kept.get(key) or run()
        if key not in self._kept and found.n_bytes <= self._left:
            self._left -= found.n_bytes
            self._kept[key] = found
        return found
