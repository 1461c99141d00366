"""Which model this is, whatever kind of object holds it.

A `Model` knows from loading. A model of transformers says where it was loaded from: that is hashed
as `load_model` would (once: hashes are kept), and every tensor is compared with the file, so that a
model trained, merged or ablated since is another one.
"""

import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mera_tl import storage
from mera_tl.models.checkpoint import Source, locate, outline, read_config, read_model
from mera_tl.models.fingerprints import fingerprint
from mera_tl.models.hugging_face import decoder_layers
from mera_tl.models.model import Model

_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[str, list[int]]] = weakref.WeakKeyDictionary()
"""Fingerprints of modules whose weights are known, and what these held."""


def manifest_of(model: Any) -> dict[str, Any]:
    """Return what identifies a model: of a `Model` its manifest, of others what can be told.

    Weights that cannot be told are described in words, and so differ from every fingerprint.

    Raises:
        ValueError: if it is no model.
    """
    if isinstance(model, Model):
        inner = getattr(model.hooked, "original", model.hooked)
        if inner not in _KNOWN or _remembered(inner):
            return model.manifest
        now = storage.fingerprint(_held(inner))
        return model.manifest | {"model_fingerprint": f"changed since it was loaded ({now})"}
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{model!r:.60} is no model; pass what mera_tl.load_model(...) returns, or a model of "
            "transformers or TransformerLens."
        )
    inner: Any = getattr(model, "original", None) or vars(model).get("original_model") or model
    name = type(model).__name__
    if hasattr(inner, "hook_dict"):  # a HookedTransformer, whose weights may have been processed
        sizes = {"n_layers": inner.cfg.n_layers, "d_model": inner.cfg.d_model}
        dtype, weights = inner.cfg.dtype, _remembered(inner) or "that it cannot name"
    else:
        width = inner.get_input_embeddings().weight.shape[1]
        sizes = {"n_layers": len(decoder_layers(inner)), "d_model": width}
        dtype, weights = inner.dtype, _remembered(inner) or _from_files(inner)
    words = {"model": name, "model_fingerprint": weights}
    return words | sizes | {"dtype": str(dtype).removeprefix("torch.")}


def identity_of(model: Any) -> dict[str, Any]:
    """Say by hashes what model, tokenizer and chat template this is."""
    manifest = manifest_of(model)
    if not isinstance(model, Model):
        return manifest
    tokenizer = model.tokenizer
    # Equal vocabularies may be merged differently: an example shows it.
    example = "To steer, or not to steer?\n\tDelta = 0.05 \u2014 answer: yes"
    seen = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "ids": tokenizer(example)["input_ids"],
        "template": getattr(tokenizer, "chat_template", None) if model.chat else None,
    }
    return {**manifest, "tokenizer": storage.fingerprint(seen)}


def remember(module: nn.Module, weights: str) -> None:
    """Keep the fingerprint of a module, for as long as its weights are what they are now."""
    _KNOWN[module] = (weights, _held(module))


def _remembered(module: nn.Module) -> str:
    weights, held = _KNOWN.get(module, ("", None))
    return weights if held == _held(module) else ""


def _held(module: nn.Module) -> list[int]:
    """Return numbers that a change of the model changes: of its parts, of writes to it, and sums.

    Torch counts what is written to a tensor, but not by way of its `data`. So the bytes of each
    block of memory are added up, too, as whole numbers of eight of them, which takes as long as one
    token. What changes places by way of `data` is not seen.
    """
    weights = [weight for weight in module.parameters() if not weight.is_meta]
    # Tensors of inference mode count no writes, and allow none.
    n_writes = sum(weight._version for weight in weights if not weight.is_inference())
    sums = [zlib.crc32(repr(_parts(module)).encode()), n_writes]
    blocks = {w.untyped_storage().data_ptr(): w.untyped_storage() for w in weights}
    for block in blocks.values():
        held = torch.empty(0, dtype=torch.uint8, device=block.device).set_(block)
        whole = len(held) // 8 * 8
        sums.append(int(held[:whole].view(torch.int64).sum()) + int(held[whole:].sum()))
    return sums


def _from_files(original: Any) -> str:
    """Return the fingerprint of the files that a model was loaded from, if it still holds them."""
    name = getattr(original, "name_or_path", "")
    if not name:
        return "from no folder that it names"
    try:
        source = locate(name, getattr(original.config, "_commit_hash", None))
        files = source.files()
        weights = fingerprint(read_config(source).to_dict(), files)
    except (ValueError, OSError) as error:
        return f"that cannot be read again ({str(error).splitlines()[0]})"
    as_built = _parts(original) == _parts(outline(source, "auto"))
    if not as_built or not _holds(original, source, files):
        return f"other than those in {name}"
    remember(original, weights)
    return weights


def _parts(module: nn.Module) -> tuple[list[tuple[str, str]], list[str]]:
    """Name what a model is built of; what is put around a layer may bring no weights."""
    parts = [(name, type(part).__name__) for name, part in module.named_modules()]
    return parts, sorted(module.state_dict())


def _holds(original: Any, source: Source, files: Sequence[Path]) -> bool:
    """Whether every tensor that the model shares with its files has their values."""
    same = [torch.equal(own, read.to(own)) for own, read in _tensors(original, source, files)]
    return bool(same) and all(same)


def _tensors(
    original: Any, source: Source, files: Sequence[Path]
) -> Iterator[tuple[Tensor, Tensor]]:
    from safetensors import safe_open

    held = {name: weight for name, weight in original.state_dict().items() if not weight.is_meta}
    if source.gguf is not None:  # whose tensors are stored in another form: it is loaded again
        read = read_model(source, original.dtype).state_dict()
        yield from ((own, read[name]) for name, own in held.items())
        return
    prefix = f"{original.base_model_prefix}."
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dict
                own = held.get(name, held.get(prefix + name))
                # One of another shape is stored in another form, or shared with another tensor.
                if own is not None and [*own.shape] == tensors.get_slice(name).get_shape():
                    yield own, tensors.get_tensor(name)
