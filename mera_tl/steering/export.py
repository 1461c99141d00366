"""A steering of fixed strength as a control vector that llama.cpp adds to its residual stream.

`llama-cli --control-vector FILE` adds the tensor `direction.N` to the output of layer N at every
token. So what can be exported is a steering whose shift is the same at every token and needs no
probe; the first layer, which llama.cpp cannot steer, is refused.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float

from mera_tl import storage
from mera_tl.steering.rules import Additive
from mera_tl.steering.spaces import ResidualSpace
from mera_tl.steering.steering import Steering


def export_control_vector(
    steering: Steering, path: str | Path, *, architecture: str = "llama"
) -> Path:
    """Write a GGUF file of one shift per steered layer, whole or not at all; return its path.

    `architecture` is llama.cpp's name of the model's family, a hint that it does not check.

    Raises:
        ValueError: if llama.cpp cannot apply the steering, or the file cannot be written.
        ImportError: if the package `gguf` is missing.
    """
    path = storage.path_of(path)
    vectors = control_vectors(steering)
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise ImportError(
            "Control vectors need the package gguf: pip install 'mera-tl[gguf]'."
        ) from None
    with storage.replacing(path) as temporary:
        writer = GGUFWriter(str(temporary), "controlvector")
        writer.add_string("controlvector.model_hint", architecture)
        writer.add_uint32("controlvector.layer_count", max(vectors))
        for layer, vector in vectors.items():
            writer.add_tensor(f"direction.{layer}", vector)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def control_vectors(steering: Steering) -> dict[int, Float[np.ndarray, " d_model"]]:
    """Return the shift that every token gets, by layer.

    Raises:
        ValueError: if the shift depends on the token, or the first layer is steered.
    """
    rule = steering.rule
    if not isinstance(rule, Additive):
        reason = (
            f"{type(rule).__name__} moves each token as far as its score asks, and a control "
            "vector is the same for all; export one with rule=Additive(strength)"
        )
    elif not isinstance(steering.space, ResidualSpace):
        reason = "it steers latents of an SAE, whose shift depends on the token"
    elif steering.positions != "all":
        reason = f"llama.cpp adds a control vector to every token, not only {steering.positions!r}"
    elif steering.first_k is not None:
        reason = "llama.cpp cannot stop a control vector after so many generated tokens"
    elif steering.per_answer:
        reason = "its direction depends on the answer that the model is about to give"
    elif 0 in steering.layer_numbers:
        reason = "llama.cpp cannot steer layer 0; leave it out of `layers`"
    else:
        return {h.layer: (rule.strength * h.step).numpy() for _, h in steering.fwd_hooks()}
    raise ValueError(f"This steering is no control vector: {reason}.")
