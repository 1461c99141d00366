"""Which model this is, whatever kind of object holds it.

A `Model` knows from loading. A model of transformers says where it was loaded from: that is hashed
as `load_model` would (once: hashes are kept), and every tensor is compared with the file, so that a
model trained, merged or ablated since is another one.
"""

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mera_tl import storage
from mera_tl.models.checkpoint import locate, read_config
from mera_tl.models.fingerprints import fingerprint
from mera_tl.models.hugging_face import decoder_layers
from mera_tl.models.model import Model

_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[str, int]] = weakref.WeakKeyDictionary()
"""Fingerprints of modules whose weights are known, and how often these had been written to."""


def manifest_of(model: Any) -> dict[str, Any]:
    """Return what identifies a model: of a `Model` its manifest, of others what can be told.

    Weights that cannot be told are described in words, and so differ from every fingerprint.
    """
    if isinstance(model, Model):
        return model.manifest
    inner = getattr(model, "original", None) or vars(model).get("original_model") or model
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
    """Keep the fingerprint of a module, for as long as nothing writes to its weights."""
    _KNOWN[module] = (weights, _n_writes(module))


def _remembered(module: nn.Module) -> str:
    weights, n_writes = _KNOWN.get(module, ("", -1))
    return weights if n_writes == _n_writes(module) else ""


def _n_writes(module: nn.Module) -> int:
    # Tensors of inference mode count no writes, and allow none.
    return sum(0 if w.is_inference() else w._version for w in module.parameters())


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
    if source.gguf is None and not _holds(original, files):
        return f"other than those in {name}"
    remember(original, weights)
    return weights


def _holds(original: Any, files: Sequence[Path]) -> bool:
    """Whether every tensor that the model shares with its files has their values."""
    same = [torch.equal(own, read.to(own)) for own, read in _tensors(original, files)]
    return bool(same) and all(same)


def _tensors(original: Any, files: Sequence[Path]) -> Iterator[tuple[Tensor, Tensor]]:
    from safetensors import safe_open

    held = {name: weight for name, weight in original.state_dict().items() if not weight.is_meta}
    prefix = f"{original.base_model_prefix}."
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dict
                own = held.get(name, held.get(prefix + name))
                # One of another shape is stored in another form, or shared with another tensor.
                if own is not None and [*own.shape] == tensors.get_slice(name).get_shape():
                    yield own, tensors.get_tensor(name)
