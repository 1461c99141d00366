"""The check at load: an engine must compute what the original model computes.

Random tokens, longer than any sliding window where that is cheap, in a left-padded batch and on a
cache, through an engine; row by row, alone and without a cache, through the original as
transformers runs it. Logits and the residual stream after every layer must agree, a hook's write at
every layer must reach the logits as a hand-written hook's does, and hooks must leave.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from mera_tl.models.hooks import resid_post
from mera_tl.models.hugging_face import decoder_layers
from mera_tl.models.model import Model

_LONGEST_WINDOW = 1024
"""Longer windows are not exceeded here: on a CPU that would take minutes."""
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative difference that rounding explains, per token; a wrong model is far above."""


def difference(model: Model, original: Any) -> str:
    """Return one sentence on where a model departs from its original, "" where it does not."""
    if broken := _broken_weights(original):
        return f"its weights are not finite ({broken})"
    with torch.inference_mode():
        rows = _random_rows(model, original)
        wanted = [_alone(original, row) for row in rows]
        return (
            _unlike(model, rows, wanted)
            or _hooks_that_stay(model, rows[1])
            or _deaf_to_hooks(model, original, rows[1])
        )


def _broken_weights(original: Any) -> str:
    for name, weight in original.named_parameters():
        # The sum of the squares is finite only if every value is; it needs no second tensor.
        if not torch.isfinite(torch.linalg.vector_norm(weight, dtype=torch.float32)):
            return name
    return ""


def _random_rows(model: Model, original: Any) -> list[list[int]]:
    """Return a long row and a short one; the short one is padded when they stand together."""
    text = original.config.get_text_config()
    window = getattr(text, "sliding_window", None) or 0
    length = min(window if window <= _LONGEST_WINDOW else 0, model.n_ctx - 12) + 12
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.hooked.cfg.d_vocab, (length,), generator=generator).tolist()
    return [tokens, tokens[-7:]]


def _alone(
    original: Any, row: Sequence[int], shifts: Sequence[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return the original's logits of the last two tokens and the stream after every layer."""
    streams: list[Tensor] = []

    def look(module: Any, args: Any, output: Any) -> Any:  # noqa: ARG001
        stream = output[0] if isinstance(output, tuple) else output
        if shifts is not None:
            stream = stream + shifts[len(streams)]
        streams.append(stream)
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    with ExitStack() as hooks:
        for layer in decoder_layers(original):
            hooks.enter_context(layer.register_forward_hook(look))
        ids = torch.tensor([list(row)], device=original.device)
        logits = original(input_ids=ids, use_cache=False, logits_to_keep=2).logits
    return logits[0, -2:], [stream[0] for stream in streams]


def _unlike(model: Model, rows: list[list[int]], wanted: list[tuple[Tensor, list[Tensor]]]) -> str:
    """Compare the stream and the logits, the prompts left-padded and the last token on a cache."""
    kept: dict[int, list[Tensor]] = {layer: [] for layer in range(model.n_layers)}
    hooks: list[Any] = [
        (resid_post(layer), lambda resid, hook: kept[hook.layer()].append(resid)) for layer in kept
    ]
    with model.hooked.hooks(fwd_hooks=hooks):
        logits = _two_steps(model, rows)
    for layer, parts in kept.items():
        if len(parts) != 2 or parts[0].ndim != 3:
            return f"layer {layer} does not pass a residual stream on, once in every pass"
        stream = torch.cat(parts, dim=1)
        for number, row in enumerate(rows):
            there = wanted[number][1][layer]
            if (gap := _gap(stream[number, -len(row) :], there)) > _tolerance(model):
                return f"the residual stream differs from layer {layer} on (by {100 * gap:.1f} %)"
    for number in range(len(rows)):
        if (gap := _gap(logits[number], wanted[number][0])) > _tolerance(model):
            return (
                f"the stream agrees after every layer, but the logits differ (by {100 * gap:.1f} %)"
            )
    return ""


def _two_steps(model: Model, rows: list[list[int]]) -> Tensor:
    """Return the logits of each row's last two tokens: the prompts' and one more on the cache."""
    width = max(len(row) for row in rows)
    tokens, mask = torch.zeros(2, len(rows), width, dtype=torch.long, device=model.device)
    for number, row in enumerate(rows):
        tokens[number, -len(row) :] = torch.tensor(row)
        mask[number, -len(row) :] = 1
    cache = model.new_cache(len(rows))
    first = model.next_token_logits(tokens[:, :-1], mask[:, :-1], cache)
    return torch.stack([first, model.next_token_logits(tokens[:, -1:], mask[:, -1:], cache)], 1)


def _deaf_to_hooks(model: Model, original: Any, row: list[int]) -> str:
    """Shift the stream after every layer, here and by hand on the original."""
    generator = torch.Generator().manual_seed(1)
    _, streams = _alone(original, row)
    shifts = [
        torch.randn(stream.shape[-1], generator=generator).to(stream) * stream.std() * 0.3
        for stream in streams
    ]
    hooks: list[Any] = [
        (resid_post(layer), lambda resid, hook: resid + shifts[hook.layer()].to(resid.device))
        for layer in range(model.n_layers)
    ]
    with model.hooked.hooks(fwd_hooks=hooks):
        here = _two_steps(model, [row])[0]
    there, _ = _alone(original, row, shifts)
    if (gap := _gap(here, there)) > _tolerance(model):
        return f"what hooks write does not reach the logits as it should (by {100 * gap:.1f} %)"
    return ""


def _hooks_that_stay(model: Model, row: list[int]) -> str:
    before = _two_steps(model, [row])
    with model.hooked.hooks(fwd_hooks=[(resid_post(0), lambda resid, hook: 2 * resid)]):  # noqa: ARG005
        _two_steps(model, [row])
    return (
        "" if torch.equal(before, _two_steps(model, [row])) else "hooks stay on after their block"
    )


def _gap(here: Tensor, there: Tensor) -> float:
    """Return the largest difference of a token's vector, relative to its length."""
    here, there = here.float(), there.float().to(here.device)
    if here.shape != there.shape:
        return float("inf")
    scale = there.norm(dim=-1).clamp(min=1e-6)
    return float(((here - there).norm(dim=-1) / scale).nan_to_num(torch.inf).max())


def _tolerance(model: Model) -> float:
    return _TOLERANCE.get(model.hooked.cfg.dtype, 1e-1)
