"""Any decoder-only causal language model of transformers, run as it is, with hooks on its stream.

The decoder layers are found by structure, not by a list of families, and everything around them
(embedding, final norm, scaling, soft caps, head) is the model's own forward. So the numbers are the
original's, attention stays Hugging Face's own, and the only hook points are `resid_post`.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mera_tl.models.cache import KeyValueCache, LayerCache
from mera_tl.models.hooks import FwdHooks, HookPoint, hooks_on, resid_post
from mera_tl.models.partial import Part, can_unembed_some, is_passed_over, running

RESUMED = {torch.float32: 1e-4}
"""Largest relative difference of logits that rounding explains; others than float32: 5e-2."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, by TransformerLens's names."""

    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    dtype: torch.dtype
    window_size: int | None
    """How many columns back a layer with a window looks."""


class HookedCausalLM:
    """A Hugging Face model with hook points, called like a `HookedTransformer`."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.layers = decoder_layers(original)
        self.embed = original.get_input_embeddings()
        self.cfg = shape_of(original, len(self.layers))
        self.hook_dict = {
            name: HookPoint(name) for name in map(resid_post, range(self.cfg.n_layers))
        }
        self._accepted = set(inspect.signature(original.forward).parameters)
        self._handles = [
            layer.register_forward_hook(partial(_pass_through, point))
            for layer, point in zip(self.layers, self.hook_dict.values(), strict=True)
        ]
        # The last column of a batch lies apart in memory: torch would multiply it with the whole
        # matrix row by row, in bfloat16 with a copy of that for each, 5 and 500 times as long.
        if (head := original.get_output_embeddings()) is not None:
            self._handles.append(head.register_forward_pre_hook(_in_one_piece))

    def release(self) -> None:
        """Leave the original without hook points."""
        for handle in self._handles:
            handle.remove()

    @property
    def takes_positions(self) -> bool:
        """Whether a token's position is given to the model, and not its column."""
        return "position_ids" in self._accepted

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Return the weights, each once."""
        return self.original.parameters()

    @contextmanager
    def hooks(self, fwd_hooks: FwdHooks) -> Iterator["HookedCausalLM"]:
        """Put hooks on for the length of a `with` block."""
        with hooks_on(self.hook_dict, fwd_hooks):
            yield self

    def __call__(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        past_kv_cache: KeyValueCache | None = None,
        stop_at_layer: int | None = None,
        n_last: int = 0,
        part: Part | None = None,
    ) -> Float[Tensor, "batch some d"]:
        """Return the logits of the last `n_last` positions (0: of all).

        With `stop_at_layer`, return the residual stream before that layer instead. With `part`, run
        that only; layers that are not run leave their cache as it was.
        """
        mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
        if stop_at_layer is not None:
            return self._resid_before(stop_at_layer, tokens, mask)
        past = None
        if past_kv_cache is not None:
            mask = past_kv_cache.append_attention_mask(mask)
            past = _to_hugging_face(past_kv_cache)
        part, head = part or Part(), self.original.get_output_embeddings()
        with running(part, self.layers, head):
            logits = self._forward(tokens, mask, past, n_last)
        if past_kv_cache is not None:
            past_kv_cache.entries = _from_hugging_face(past)
        if part.tokens is not None and not can_unembed_some(head):
            logits = logits[..., list(part.tokens)]
        return logits[:, -n_last:]

    @cached_property
    def resumes(self) -> bool:
        """Whether a pass can start from the stream after some layer; tried once, on five tokens.

        Not where layers hand each other more than the stream, such as keys that they share.
        """
        if self.embed.weight.is_meta or self.cfg.n_layers < 2:
            return False
        functions = [list(point.functions) for point in self.hook_dict.values()]
        try:
            for point in self.hook_dict.values():
                point.functions.clear()
            with torch.no_grad():
                return self._resumes_after(self.cfg.n_layers - 2)
        except Exception:  # whatever it says: it is not made for this
            return False
        finally:
            for point, before in zip(self.hook_dict.values(), functions, strict=True):
                point.functions[:] = before

    def _resumes_after(self, layer: int) -> bool:
        device = self.embed.weight.device
        tokens, kept = torch.arange(5, device=device)[None], list[Tensor]()
        cache = KeyValueCache([], torch.empty((1, 0), dtype=torch.int, device=device))
        with self.hooks([(resid_post(layer), lambda resid, hook: kept.append(resid))]):  # noqa: ARG005
            whole = self(tokens, past_kv_cache=cache, n_last=1)
        part = Part(layer, kept[0][:, -1:])
        again = self(tokens[:, -1:], past_kv_cache=cache.drop_last(), n_last=1, part=part)
        return bool(
            (whole - again).abs().max() <= RESUMED.get(whole.dtype, 5e-2) * whole.abs().max()
        )

    def _forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch all"],
        past: Any,
        n_last: int,
    ) -> Float[Tensor, "batch some d_vocab"]:
        arguments = {
            "input_ids": tokens,
            "attention_mask": mask,
            # A position is the number of real tokens before it, whatever the padding.
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :],
            "past_key_values": past,
            "use_cache": past is not None,
            "logits_to_keep": n_last,
        }
        accepted = {name: value for name, value in arguments.items() if name in self._accepted}
        return self.original(**accepted).logits

    def _resid_before(
        self, layer: int, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        def stop(resid: Tensor, hook: HookPoint) -> NoReturn:  # noqa: ARG001
            raise _ReachedError(resid)

        with self.hooks([(resid_post(layer - 1), stop)]):
            try:
                self._forward(tokens, mask, None, 1)
            except _ReachedError as reached:
                return reached.resid
        raise AssertionError("every layer is passed")


def _in_one_piece(head: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ARG001
    return tuple(tensor.contiguous() for tensor in given)


class _ReachedError(Exception):
    """Ends a forward pass at the layer that was asked for."""

    def __init__(self, resid: Tensor) -> None:
        self.resid = resid


def decoder_layers(original: Any) -> list[torch.nn.Module]:
    """Return the decoder layers of a causal language model, first to last.

    They are the outermost list of modules that holds most of the weights, other than the lists
    inside vision or audio towers: experts lie within a layer, embeddings in no list.

    Raises:
        ValueError: if there is no such list.
    """
    text = original.config.get_text_config()
    n_layers = getattr(text, "num_hidden_layers", None)
    lists = [
        module
        for name, module in original.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == (n_layers or len(module)) > 0
        and not any(part.isdigit() for part in name.split("."))
        and not any(tower in name for tower in ("vision", "audio", "visual"))
    ]
    if not lists:
        raise ValueError(
            f"No list of decoder layers was found in {type(original).__name__}; "
            "only decoder-only causal language models can be steered."
        )
    return list(max(lists, key=lambda found: sum(w.numel() for w in found.parameters())))


def _pass_through(point: HookPoint, module: Any, args: Any, output: Any) -> Any:  # noqa: ARG001
    if not point.functions or is_passed_over(module):
        return None
    if isinstance(output, tuple):
        return (point(output[0]), *output[1:])
    return point(output)


def shape_of(original: Any, n_layers: int) -> Shape:
    """Read the sizes that a config has, and take the usual for what it leaves out."""
    text = original.config.get_text_config()
    rows, width = original.get_input_embeddings().weight.shape
    d_model = getattr(text, "hidden_size", None) or width
    n_heads = getattr(text, "num_attention_heads", None) or 1
    names = ("sliding_window", "window_size", "attention_chunk_size")
    windows = (getattr(text, name, None) for name in names)
    return Shape(
        n_layers=n_layers,
        d_model=d_model,
        d_vocab=getattr(text, "vocab_size", None) or rows,
        n_ctx=getattr(text, "max_position_embeddings", None) or 2**20,
        n_heads=n_heads,
        n_key_value_heads=getattr(text, "num_key_value_heads", None) or n_heads,
        d_head=getattr(text, "head_dim", None) or d_model // n_heads,
        d_mlp=getattr(text, "intermediate_size", None) or 4 * d_model,
        dtype=original.dtype,
        window_size=next((w for w in windows if w), None),
    )


def _to_hugging_face(cache: KeyValueCache) -> Any:
    """Hold the same tensors, heads before positions; nothing is copied.

    Layers with a sliding window keep everything too: the window is in the attention mask, and a
    cache that has thrown tokens away could not take its last one back.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    past = DynamicCache()
    for entry in cache.entries:
        layer = DynamicLayer()
        layer.lazy_initialization(entry.past_keys, entry.past_values)
        layer.keys = entry.past_keys.transpose(1, 2)
        layer.values = entry.past_values.transpose(1, 2)
        past.layers.append(layer)
    return past


def _from_hugging_face(past: Any) -> list[LayerCache]:
    pairs = [(layer.keys, layer.values) for layer in past.layers]
    return [LayerCache(keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in pairs]
