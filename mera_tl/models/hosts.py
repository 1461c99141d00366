"""Any decoder-only model as a host of hooks: where they go on, and how its passes are noticed."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mera_tl.models.hugging_face import HookedCausalLM, decoder_layers
from mera_tl.models.model import Model


@dataclass(frozen=True, eq=False)
class Pass:
    """What a forward pass was called with, as far as it says where its columns are."""

    mask: Tensor | None
    n_past: int
    layer: int = -1
    """Where it was noticed: at a layer, or before all of them."""


Begin = Callable[[Pass], None]
"""Is called before a pass."""


@dataclass(frozen=True, eq=False)
class Host:
    """Where hooks go on a model, and how its passes are noticed."""

    name: str
    layers: Sequence[nn.Module]
    embed: nn.Module
    generators: tuple[Any, ...]
    """Objects whose `generate` says how long the prompt is."""
    watch: Callable[[Begin, set[int]], Iterator[Any]]
    """Have a function called before every pass over some layers; yield handles."""
    reader: Callable[[], AbstractContextManager[Model]]
    """The same network, to run prompts of our own."""

    def device_of(self, layer: int) -> torch.device:
        """Return where a layer computes."""
        device = next(weight.device for weight in self.layers[layer].parameters())
        # Offloaded weights are fetched as they are needed.
        return torch.device("cpu") if device.type == "meta" else device


def host_of(model: Any) -> Host:
    """Find out what kind of model this is, by its parts."""
    name = model.name if isinstance(model, Model) else type(model).__name__
    model = model.hooked if isinstance(model, Model) else model
    inner = getattr(model, "original", None) or vars(model).get("original_model")
    if inner is not None:  # the hugging_face engine, or a bridge
        return _hugging_face(inner, name, (model, inner))
    if hasattr(model, "hook_dict") and hasattr(model, "blocks"):
        return _transformer_lens(model, name)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", True):
        raise ValueError(
            f"{name} is no model that can be steered; pass a mera_tl.Model, a HookedTransformer, a "
            "TransformerBridge or a decoder-only causal language model of transformers."
        )
    return _hugging_face(model, name, (model,))


def _hugging_face(model: Any, name: str, owners: tuple[Any, ...]) -> Host:
    """Take a model of transformers: a pass begins in the module that holds the decoder layers."""
    layers = decoder_layers(model)
    body = next(
        m for m in model.modules() if any(list(c.children()) == layers for c in m.children())
    )
    names = list(inspect.signature(body.forward).parameters)

    def before(begin: Begin, module: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG001
        given = dict(zip(names, args, strict=False)) | kwargs
        cache = given.get("past_key_values")
        n_past = 0 if cache is None else int(cache.get_seq_length())
        begin(Pass(given.get("attention_mask"), n_past))

    def watch(begin: Begin, steered: set[int]) -> Iterator[Any]:  # noqa: ARG001
        yield body.register_forward_pre_hook(partial(before, begin), with_kwargs=True)

    @contextmanager
    def reader() -> Iterator[Model]:
        hooked = HookedCausalLM(model)
        try:
            yield Model(hooked, None, name, ())
        finally:
            hooked.release()

    generators = tuple(owner for owner in owners if hasattr(owner, "generate"))
    return Host(name, layers, model.get_input_embeddings(), generators, watch, reader)


def _transformer_lens(model: Any, name: str) -> Host:
    """Take a `HookedTransformer`, whose `generate` calls its blocks but not the model itself."""

    def watch(begin: Begin, steered: set[int]) -> Iterator[Any]:
        def before(number: int, module: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG001
            entry = kwargs.get("past_kv_cache_entry")
            n_past = 0 if entry is None else entry.past_keys.shape[1]
            begin(Pass(kwargs.get("attention_mask"), n_past, number))

        for number in sorted(steered):
            block = model.blocks[number]
            yield block.register_forward_pre_hook(partial(before, number), with_kwargs=True)

    def reader() -> AbstractContextManager[Model]:
        return nullcontext(Model(model, None, name, ()))

    return Host(name, list(model.blocks), model.embed, (model,), watch, reader)
