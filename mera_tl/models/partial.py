"""Parts of a Hugging Face forward pass: from some layer's residual stream on, to some tokens only.

The model's own forward stays what runs. Lower layers pass their input through, the layer that is
started after returns the stream it is given, and the head's matrix is that of a few rows; whatever
the model does around them (masks, positions, final norm, scaling, soft caps) it does as ever.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True, eq=False)
class Part:
    """Which part of a pass is run."""

    after: int | None = None
    """The layer whose output is known; None runs all layers."""
    resid: Tensor | None = None
    """That output, "row pos d_model"."""
    tokens: Sequence[int] | None = None
    """The tokens whose logits are wanted; None for all."""


@contextmanager
def running(part: Part, layers: Sequence[Any], head: Any) -> Iterator[None]:
    """Let a model run a part only, for the length of a `with` block."""
    changed: list[Any] = []
    with ExitStack() as stack:
        stack.callback(lambda: [module.__dict__.pop("forward", None) for module in changed])
        if part.tokens is not None and can_unembed_some(head):
            kept = list(part.tokens)
            weight, bias = head.weight[kept], None if head.bias is None else head.bias[kept]
            changed.append(head)
            head.forward = lambda x: linear(x, weight, bias)
        if part.after is not None:
            changed += layers[: part.after + 1]
            for layer in layers[: part.after]:
                layer.forward = _pass_on
            layers[part.after].forward = lambda *_, **__: part.resid
        yield


def can_unembed_some(head: Any) -> bool:
    """Return whether a head is nothing but a matrix, of which rows may be taken."""
    return type(head) is torch.nn.Linear


def is_passed_over(layer: Any) -> bool:
    """Return whether a layer is not run: what it passes on is no residual stream of its own."""
    return layer.__dict__.get("forward") is _pass_on


def _pass_on(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else kwargs["hidden_states"]
