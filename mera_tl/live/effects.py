"""What one choice does to one prompt: probabilities, predicted error, replies, before and after."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from mera_tl import plots
from mera_tl.certificate.certificate import percent
from mera_tl.inference.answers import option_tokens
from mera_tl.inference.prefix import Prefix, moves_none_before_the_last
from mera_tl.live.bench import Bench, Choices
from mera_tl.steering.generation import Sampling, reply_to, text_of
from mera_tl.steering.hook import SteerHook
from mera_tl.steering.steering import Steering
from mera_tl.steering.trace import Ledger, TracedPass, explain
from mera_tl.tasks.task import Example, Task


@dataclass(frozen=True, eq=False)
class Panel:
    """Texts and figures for a page or a notebook."""

    said: str
    """What changed, in a sentence."""
    bars: go.Figure | None = None
    """P(option) before and after; None without options or probe, or where replies are scored."""
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
    _require_prompt(prompt)
    options = bench.options if options is None else options
    if not bench.ways or (not bench.scored and len(options) < 2):
        return Panel("Without a probe and options there are replies only.")
    example = bench.examples.get(prompt) if bench.scored else Example(0, prompt, options, 0)
    if example is None:
        return Panel("Only a run's own prompts have a scorer; of others there are replies only.")
    key = (bench, prompt, options, choices)
    shown = _PANELS.get(key)
    if shown is None:
        with bench.lock:
            ledger = _ledger(bench, example, choices)
            frame = ledger.frame()
            bars = None if bench.scored else plots.option_bars(ledger.options, *ledger.probs)
            shown = Panel(
                _said(ledger, bench.steering(choices)),
                bars,
                plots.error_by_layer(frame),
                plots.ledger(frame, title="Token by token"),
                ledger,
            )
            _keep(_PANELS, key, shown)
    return shown


def replies(bench: Bench, prompt: str, choices: Choices) -> tuple[str, str]:
    """Return the unsteered reply and the steered one, each run once per prompt and choice.

    Raises:
        ValueError: if the prompt is empty or exceeds the context.
    """
    _require_prompt(prompt)
    with bench.lock:
        steering, n = bench.steering(choices), choices.max_new_tokens
        if bench.scored:  # what is shown is what is scored
            n = bench.settings.reply_tokens
        wanted = [None] if steering is None else [None, choices]
        keys = [(bench, prompt, n, each) for each in wanted]
        known = {key: _REPLIES[key] for key in keys if key in _REPLIES}
        missing = [key for key in keys if key not in known]
        if missing:
            steerings = [None if key[-1] is None else steering for key in missing]
            known |= zip(missing, _reply(bench, prompt, steerings, n), strict=True)
        for key in keys:  # the last to be forgotten, both of them
            _keep(_REPLIES, key, known[key])
        return known[keys[0]], known[keys[-1]]


def _require_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise ValueError("There is no prompt; type one.")


_UNSTEERED: OrderedDict[Any, TracedPass] = OrderedDict()
"""Unsteered runs by bench, prompt, options and what reads them; the latest few."""
_PANELS: OrderedDict[Any, Panel] = OrderedDict()
"""By bench, prompt, options and what is chosen."""
_REPLIES: OrderedDict[Any, str] = OrderedDict()
"""Replies by bench, prompt, length and what is chosen."""
KEPT = 16


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    """Keep a value, and of all only the latest."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > KEPT:
        kept.popitem(last=False)


def _ledger(bench: Bench, example: Example, choices: Choices) -> Ledger:
    """Read the prompt unsteered and steered."""
    steering = bench.steering(choices)
    way = next(iter(bench.ways.values())) if steering is None else steering
    layers = way.layer_numbers if way.space.layers else None  # latents are read where they move
    key = (bench, example.prompt, example.options, id(way.probe), layers)
    reading: dict[str, Any] = {"probe": way.probe, "settings": bench.settings}
    if key not in _UNSTEERED and layers is None:  # the steered run then begins where this one does
        _keep(_UNSTEERED, key, explain(bench.model, example, [], **reading).unsteered)
    hooks = [] if steering is None else steering.checked_hooks(bench.model)
    ledger = explain(bench.model, example, hooks, unsteered=_UNSTEERED.get(key), **reading)
    _keep(_UNSTEERED, key, ledger.unsteered)
    return ledger


def _reply(bench: Bench, prompt: str, steerings: Sequence[Steering | None], n: int) -> list[str]:
    """Return the model's replies in one batch: without a steering, under one, or both.

    Under a direction per answer, by the option that the model leans to.
    """
    model, sampling, options = bench.model, Sampling(max_new_tokens=n), None
    steering = steerings[-1]
    hooks = [] if steering is None else steering.checked_hooks(model)
    if any(hook.per_answer for _, hook in hooks):
        task = Task("one", (Example(0, prompt, bench.options, 0),), "all")
        options = option_tokens(model, task, replace(bench.settings, readout="last"))
    tokens = model.tokenize([prompt], prefix=bench.settings.prefix(model) if bench.options else "")
    prefix = _beginning(bench, prompt, tokens[0]) if moves_none_before_the_last(hooks) else None
    rows = reply_to(
        model,
        tokens * len(steerings),
        [(name, _Last(hook, len(steerings) - 1)) for name, hook in hooks],
        sampling,
        options=options,
        settings=bench.settings,
        is_traced=False,
        prefix=prefix,
    )
    return [text_of(model, row, sampling) for row in rows]


def _beginning(bench: Bench, prompt: str, tokens: Sequence[int]) -> Prefix | None:
    """Return what an unsteered run has left of the prompt's beginning, if there was one."""
    passes = (each for key, each in _UNSTEERED.items() if key[:2] == (bench, prompt))
    found = next(passes, None)
    begun = None if found is None else found.beginning
    return begun if begun is not None and begun.tokens == tuple(tokens[:-2]) else None


@dataclass(frozen=True, eq=False)
class _Last:
    """A steering hook that acts on the last row of a batch alone."""

    hook: SteerHook
    number: int

    @property
    def per_answer(self) -> bool:
        return self.hook.per_answer

    def __call__(self, resid: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
        """Return the activation, steered in that row."""
        own = hook.ctx["window"].labels.to(resid.device) == self.number
        return torch.where(own[:, None, None], self.hook(resid, hook), resid)


def _said(ledger: Ledger, steering: Steering | None) -> str:
    before, after = ledger.answers
    sure = [
        "" if answer is None else percent(probs[ledger.options.index(answer)])
        for answer, probs in zip(ledger.answers, ledger.probs, strict=True)
    ]
    said = [f"{a} ({p})" if a else "no answer" for a, p in zip(ledger.answers, sure, strict=True)]
    change = " becomes ".join(said)
    if before == after:
        change = f"The answer stays {after or 'none'}" + (
            f", {sure[0]}, then {sure[1]}" * bool(after)
        )
    if ledger.replies != (None, None):
        stays = before == after
        change = f"The reply stays {after}" if stays else f"The reply was {before} and is {after}"
    moved = "nothing is moved"
    if steering is not None and (idle := steering.idle_layers):
        moved += (
            f": in layer {', '.join(map(str, idle))} the probe's score does not fall along this "
            "direction; choose another layer or direction, or a fixed length"
        )
    if ledger.fired:
        moved = (
            f"{ledger.fired} of {ledger.shift.size} (layer, token) pairs move, by up to "
            f"{ledger.shift.max():.2f} of the activation's length"
        )
    return f"{change}; {moved}."
