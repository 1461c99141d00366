"""What one choice does to one prompt: probabilities, predicted error, replies, before and after."""

from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import plotly.graph_objects as go

from mera_tl import plots
from mera_tl.inference.answers import option_tokens
from mera_tl.live.bench import Bench, Choices
from mera_tl.steering.generation import Sampling, reply_to, text_of
from mera_tl.steering.steering import Steering
from mera_tl.steering.trace import Ledger, Pass, explain
from mera_tl.tasks.task import Example, Task


@dataclass(frozen=True, eq=False)
class Panel:
    """Texts and figures for a page or a notebook."""

    said: str
    """What changed, in a sentence."""
    bars: go.Figure | None = None
    """P(option) before and after; None without options or probe."""
    layers: go.Figure | None = None
    """Predicted error by layer, before and after, at the token where the probe may be asked."""
    tokens: go.Figure | None = None
    """What moved, token by token and layer by layer."""
    ledger: Ledger | None = None


def panel(
    bench: Bench, prompt: str, choices: Choices, *, options: tuple[str, ...] | None = None
) -> Panel:
    """Tell what a choice does to the answer to a prompt.

    What does not depend on threshold, strength and tokens is run once per prompt and way.

    Raises:
        ValueError: if the prompt is empty or exceeds the context, or options cannot be read.
    """
    options = _checked(prompt, bench.options if options is None else options)
    if not bench.ways or len(options) < 2:
        return Panel("Without a probe and options there are replies only.")
    with bench.lock:
        ledger = _ledger(bench, Example(0, prompt, options, 0), choices)
    frame = ledger.frame()
    return Panel(
        _said(ledger),
        plots.option_bars(ledger.options, *ledger.probs),
        plots.error_by_layer(frame),
        plots.ledger(frame, title="Token by token"),
        ledger,
    )


def replies(bench: Bench, prompt: str, choices: Choices) -> tuple[str, str]:
    """Return the unsteered reply, run once per prompt, and the steered one.

    Raises:
        ValueError: if the prompt is empty or exceeds the context.
    """
    _checked(prompt, ())
    with bench.lock:
        steering, n = bench.steering(choices), choices.max_new_tokens
        unsteered = _unsteered(bench, prompt, n)
        return unsteered, unsteered if steering is None else _reply(bench, prompt, steering, n)


def _checked(prompt: str, options: tuple[str, ...]) -> tuple[str, ...]:
    if not prompt.strip():
        raise ValueError("There is no prompt; type one.")
    return options


_UNSTEERED: OrderedDict[Any, Pass | None] = OrderedDict()
"""Unsteered runs by bench, prompt, options and what reads them; the latest few."""
KEPT = 32


def _ledger(bench: Bench, example: Example, choices: Choices) -> Ledger:
    """Read the prompt unsteered and steered."""
    steering = bench.steering(choices)
    way = next(iter(bench.ways.values())) if steering is None else steering
    layers = way.layer_numbers if way.space.layers else None  # latents are read where they move
    key = (id(bench), example.prompt, example.options, id(way.probe), layers)
    ledger = explain(
        bench.model,
        example,
        [] if steering is None else steering,
        probe=way.probe,
        settings=bench.settings,
        unsteered=_UNSTEERED.get(key),
    )
    _UNSTEERED[key] = ledger.unsteered
    _UNSTEERED.move_to_end(key)
    while len(_UNSTEERED) > KEPT:
        _UNSTEERED.popitem(last=False)
    return ledger


@lru_cache(maxsize=64)
def _unsteered(bench: Bench, prompt: str, n: int) -> str:
    return _reply(bench, prompt, None, n)


def _reply(bench: Bench, prompt: str, steering: Steering | None, n: int) -> str:
    """Return the model's reply; under a direction per answer, by the option that it leans to."""
    model, sampling, options = bench.model, Sampling(max_new_tokens=n), None
    hooks = [] if steering is None else steering.checked_hooks(model)
    if any(hook.per_answer for _, hook in hooks):
        task = Task("one", (Example(0, prompt, bench.options, 0),), "all")
        options = option_tokens(model, task, replace(bench.settings, readout="last"))
    tokens = model.tokenize([prompt], prefix=bench.settings.prefix(model) if bench.options else "")
    (row,) = reply_to(
        model, tokens, hooks, sampling, options=options, settings=bench.settings, is_traced=False
    )
    return text_of(model, row, sampling)


def _said(ledger: Ledger) -> str:
    before, after = ledger.answers
    sure = [
        "" if answer is None else f"{probs[ledger.options.index(answer)]:.0%}"
        for answer, probs in zip(ledger.answers, ledger.probs, strict=True)
    ]
    change = f"{before or 'no answer'} ({sure[0]}) becomes {after or 'no answer'} ({sure[1]})"
    if before == after:
        change = f"The answer stays {after or 'none'}" + (
            f", {sure[0]}, then {sure[1]}" * bool(after)
        )
    moved = "nothing is moved"
    if ledger.fired:
        moved = (
            f"{ledger.fired} of {ledger.shift.size} (layer, token) pairs move, by up to "
            f"{ledger.shift.max():.2f} of the activation's length"
        )
    return f"{change}; {moved}."
