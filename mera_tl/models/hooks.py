"""Named points on the residual stream where functions read or replace the activation.

The vocabulary is TransformerLens's: a hook is a pair of a name and a function
`(activation, hook) -> activation or None`, and hooks are on for the length of a `with` block. Its
`HookedTransformer` brings its own points; these are for models of Hugging Face.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

FwdHooks = Sequence[tuple[str, Any]]
"""TransformerLens hooks: pairs of a hook name and a function `(activation, hook) -> activation`."""


def resid_post(layer: int) -> str:
    """Return the hook name of the residual stream after `layer`."""
    return f"blocks.{layer}.hook_resid_post"


class HookPoint:
    """A place in a model. What a hook leaves in `ctx` stays until someone clears it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ctx: dict[str, Any] = {}
        self.functions: list[Callable[..., Tensor | None]] = []

    def layer(self) -> int:
        """Return the layer that the point belongs to."""
        return int(self.name.split(".")[1])

    def __call__(self, activation: Tensor) -> Tensor:
        """Pass an activation through the hooks, in the order in which they were put on."""
        for function in self.functions:
            replaced = function(activation, hook=self)
            activation = activation if replaced is None else replaced
        return activation


@contextmanager
def hooks_on(points: dict[str, HookPoint], fwd_hooks: FwdHooks) -> Iterator[None]:
    """Put hooks on for the length of a `with` block; they are gone afterwards, whatever happens.

    Raises:
        KeyError: if a name is none of the points.
    """
    before = {name: list(points[name].functions) for name, _ in fwd_hooks}
    try:
        for name, function in fwd_hooks:
            points[name].functions.append(function)
        yield
    finally:
        for name, functions in before.items():
            points[name].functions[:] = functions
