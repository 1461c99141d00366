"""Many steerings of one task at the price of few: thresholds, strengths, layers, a whole search.

What they share is run once. Each prompt runs unsteered and leaves its residual stream and its
cache; products with the probes tell which steering moves which example, and in which layer first.
All other outcomes are known: they are the unsteered ones. What is left are rows, each one example
under one steering. They start from what the unsteered pass left in the first layer that moves them,
many steerings and examples in one batch, under one hook a layer (`stack`). A row that leaves the
prompt alone costs one token; one that does not, its prompt from that layer on. Every outcome equals
that of `evaluate` with that steering's hooks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mera_tl.inference.answers import (
    OptionTokens,
    Reading,
    ReadSettings,
    option_tokens,
    read_from,
    tokens_read,
)
from mera_tl.inference.decoding import Decoding, hooked_pass
from mera_tl.inference.evaluation import (
    check_answers,
    check_call,
    gather,
    n_after,
    run_batches,
    tokenize_task,
)
from mera_tl.inference.multiple_choice import LOGITS
from mera_tl.inference.outcomes import Outcomes
from mera_tl.inference.prefix import Prefix
from mera_tl.models.model import Model
from mera_tl.steering.stack import Extent, Stack, columns_of, extent_of
from mera_tl.steering.steering import Steering
from mera_tl.steering.unsteered import Passes, Recorder, UnsteeredPass, unsteered_pass
from mera_tl.tasks.task import Task

CACHED = 4
"""Rows that go on decoding, or are not run beside their prompt, bring a cache of their own: at most
this many times `batch_tokens`."""


def evaluate_many(
    model: Model,
    task: Task[Any],
    steerings: Sequence[Steering],
    *,
    settings: ReadSettings | None = None,
    decide: bool = False,
    passes: Passes | None = None,
) -> list[Outcomes]:
    """Answer every example of a task under every steering; as `evaluate` with each one's hooks.

    A steering without a limit gives the unsteered outcomes, with every score in its scope read.
    With `decide`, answers are all that is asked for: under readout `options` probabilities are then
    rough, under `exact` replies end where they can be no answer any more, and much less is run.
    `passes` keeps what prompts leave unsteered for later calls on the same model and examples.

    Raises:
        ValueError: as `evaluate`.
    """
    check_call(model, task)
    listed = isinstance(steerings, Sequence)
    if not listed or not all(isinstance(each, Steering) for each in steerings):
        raise ValueError(
            f"{steerings!r:.60} is no list of steerings; pass them as [steering, ...]."
        )
    check_answers(task.options, steerings)
    settings = ReadSettings.of(task, settings)
    options = option_tokens(model, task, settings)
    prompts = tokenize_task(model, task, settings)
    n_new, outcomes = n_after(model, task, settings), dict[int, Outcomes]()
    # One hook a layer reads and writes one space; steerings made one by one have equal ones.
    for space in dict.fromkeys(each.space for each in steerings):
        numbers = [i for i, each in enumerate(steerings) if each.space == space]
        stack = Stack(tuple(steerings[i] for i in numbers))
        prefix = None if stack.everywhere else Prefix.of(model, prompts, n_new)
        batches = _Batch(model, stack, options, settings, prefix, decide, passes)

        def run(batch: list[int], batches: _Batch = batches) -> _Readings:
            return batches.read([prompts[i] for i in batch])

        # Passes of one token: more prompts at once, as long as their cache stays near the cores.
        wide = settings if stack.everywhere else settings.wider(2)
        results = run_batches(prompts, run, wide, "steerings")
        order = [i for batch, _ in results for i in batch]
        columns = {
            each.name: torch.cat([readings[each.name] for _, readings in results], dim=1)
            for each in fields(Reading)
        }
        for place, i in enumerate(numbers):
            reading = Reading(**{name: values[place] for name, values in columns.items()})
            outcomes[i] = gather(task, options, [(order, reading)])
    return [outcomes[i] for i in range(len(steerings))]


_Heights = Mapping[tuple[int, Extent], Tensor]
"""Per layer and scope the highest unsteered scores "when reader row": in the prompt, after it."""


_Readings = Mapping[str, Tensor]
"""The values of a `Reading`, with an axis of steerings before that of rows."""


@dataclass(frozen=True, eq=False)
class _Rows:
    """Examples under steerings that move them."""

    steering: Int[Tensor, " row"]
    example: Int[Tensor, " row"]
    layer: Int[Tensor, " row"]
    """The first that moves a token of the prompt; the number of layers if none does."""
    n_below: Int[Tensor, " row"]
    """(layer, token) pairs in scope below that layer, which are not run again."""
    score_below: Float[Tensor, " row"]

    def pick(self, rows: Int[Tensor, " kept"]) -> "_Rows":
        return _Rows(*(getattr(self, each.name)[rows] for each in fields(self)))


@dataclass(frozen=True, eq=False)
class _Batch:
    """Prompts that are read under all steerings of a stack."""

    model: Model
    stack: Stack
    options: OptionTokens
    settings: ReadSettings
    prefix: Prefix | None
    decide: bool
    passes: Passes | None

    def read(self, prompts: Sequence[Sequence[int]]) -> _Readings:
        """Read every prompt under every steering."""
        start = self._unsteered(prompts)
        readings, rows = self._foreseen(start)
        for chunk in self._chunks(rows, max(map(len, prompts))):
            some = rows.pick(chunk)
            reading = self._run(some, start)
            for each in fields(Reading):
                readings[each.name][some.steering, some.example] = getattr(reading, each.name)
        return readings

    def _unsteered(self, prompts: Sequence[Sequence[int]]) -> UnsteeredPass:
        """Run prompts without steering, unless that was done and kept."""
        model, whole = self.model, self.stack.everywhere
        told = (model, prompts, self.options, self.settings, self.prefix, self.decide)
        if self.passes is None or whole:
            return unsteered_pass(*told, list(self.stack.layers), whole=whole)
        read = (self.options.tokens, self.options.continuations, self.options.ends)
        settings = replace(self.settings, progress=False)
        key = (id(model), settings, self.decide, read, *map(tuple, prompts))
        return self.passes.of(key, lambda: unsteered_pass(*told, range(model.n_layers)))

    def _run(self, rows: _Rows, start: UnsteeredPass) -> Reading:
        """Run rows that are first moved in the same layer."""
        hooks, layer = self.stack.hooks(rows.steering), int(rows.layer[0])
        decoding, answers = start.decoding, start.answers
        here = rows.example.to(answers.device)
        with torch.inference_mode(), hooked_pass(self.model, hooks):
            labels = torch.arange(len(here), device=here.device)
            wide = self.stack.steerings[int(rows.steering[0])].positions == "all"
            known = {"answers": answers[here], "labels": labels}
            fork = decoding.fork(here, hooks, **known, beside=not wide)
            fork.n_steerable += rows.n_below.to(here)
            fork.max_score = rows.score_below.to(fork.max_score)
            if layer == self.model.n_layers:
                after = start.logits[here]
            else:
                left = start.record.resid[layer][0]
                tokens = tokens_read(self.options, self.settings)
                after = fork.resume(layer, left[here] if wide else left[here, -1:], tokens)
            return self._read(fork, after)

    def _read(self, decoding: Decoding, logits: Float[Tensor, "row some"]) -> Reading:
        return read_from(decoding, logits, self.options, self.settings, decide=self.decide)

    def _chunks(self, rows: _Rows, n_columns: int) -> Iterator[Int[Tensor, " row"]]:
        """Yield rows that can run together: first moved in one layer, in whole prompts or not."""
        wide = torch.tensor([each.positions == "all" for each in self.stack.steerings])
        kind = wide[rows.steering] * (self.model.n_layers + 1) + rows.layer
        budget = self.settings.batch_tokens
        for number in kind.unique().tolist():
            chosen = (kind == number).nonzero()[:, 0]
            # Rows of one prompt sit together, so that few seats beside it stay empty.
            chosen = chosen[rows.example[chosen].argsort(stable=True)]
            size = CACHED * budget // n_columns
            if number > self.model.n_layers:
                size = budget // n_columns
            elif self.model.shares_prompts:
                size = budget
            # All logits of a chunk stand in memory at once.
            size = min(size, LOGITS // self.model.d_vocab)
            yield from chosen.split(max(1, size))

    def _foreseen(self, start: UnsteeredPass) -> tuple[_Readings, _Rows]:
        """Return all readings as if no row was moved, and the rows that are."""
        base, answers = start.base, start.answers
        heights, counts = self._heights(start.record, answers)
        n = len(self.stack.steerings)
        same = {each.name: torch.stack([getattr(base, each.name)] * n) for each in fields(Reading)}
        found = []
        for numbers in self.stack.groups:
            first, chosen = self.stack.steerings[numbers[0]], torch.tensor(numbers)
            layers, scope = first.layer_numbers, extent_of(first)
            stacked = [self.stack.layers[layer] for layer in layers]
            readers = [layer.probes.index(id(first.probe)) for layer in stacked]
            high = [heights[n, scope][:, r] for n, r in zip(layers, readers, strict=True)]
            prompt, later = torch.stack(high, dim=1)
            same["max_score"][chosen] = prompt.maximum(later).amax(0)
            same["n_steerable"][chosen] = len(layers) * counts[scope].sum(0)
            limit = torch.tensor([self.stack.steerings[n].limit for n in numbers])[:, None, None]
            moves = torch.stack([layer.moves(chosen, answers) for layer in stacked], dim=1)
            above = (prompt > limit) & moves
            after = ((later > limit) & moves).any(1)
            steering, example = (above.any(1) | after).nonzero().unbind(-1)
            # How many of a steering's layers come before the first that moves the row.
            below = above.int().argmax(1)[steering, example]
            below[~above.any(1)[steering, example]] = len(layers)
            layer = torch.tensor([*layers, self.model.n_layers])[below]
            if not self.model.resumes:  # then all layers are run again, and count for themselves
                below[below < len(layers)], layer[below < len(layers)] = 0, layers[0]
            nothing = torch.full_like(prompt[:1], -torch.inf)
            highest = torch.cat([nothing, prompt.cummax(0).values])[below, example]
            n_below = below * counts[scope][0, example]
            found.append(_Rows(chosen[steering], example, layer, n_below, highest))
        together = [torch.cat([getattr(r, each.name) for r in found]) for each in fields(_Rows)]
        return same, _Rows(*together)

    def _heights(
        self, record: Recorder, answers: Int[Tensor, " row"]
    ) -> tuple[_Heights, Mapping[Extent, Int[Tensor, "when row"]]]:
        """Return the highest scores, and how many tokens of each scope are in and after prompts."""
        scopes = {extent_of(each) for each in self.stack.steerings}
        n = len(answers)
        heights: dict[tuple[int, Extent], Tensor] = {}
        counts: dict[Extent, Tensor] = {s: torch.zeros(2, n, dtype=torch.long) for s in scopes}
        for number, layer in self.stack.layers.items():
            high = {s: torch.full((2, len(layer.probes), n), -torch.inf) for s in scopes}
            for window, resid in zip(record.windows, record.resid[number], strict=True):
                assert window.labels is not None
                rows, late = window.labels.cpu(), int(not window.n_prompt)
                real = window.real[:, -resid.shape[1] :].cpu()
                score = layer.scores(resid, answers[window.labels]).cpu()
                for scope in scopes:
                    inside = real & columns_of(scope, window, resid.shape[1])
                    top = score.masked_fill(~inside, -torch.inf).amax(-1)
                    high[scope][late].scatter_reduce_(1, rows.expand_as(top), top, "amax")
                    if number == next(iter(self.stack.layers)):
                        counts[scope][late].index_add_(0, rows, inside.sum(-1))
            heights |= {(number, scope): high[scope] for scope in scopes}
        return heights, dict(counts)
