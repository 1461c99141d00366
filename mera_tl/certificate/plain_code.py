"""How to apply a saved steering without mera_tl: a few lines of torch and transformers."""

from mera_tl.steering.rules import Adaptive
from mera_tl.steering.spaces import ResidualSpace
from mera_tl.steering.steering import Steering

COLUMNS = {
    "all": "slice(None)",
    "last": "slice(-1, None)  # from the final prompt token on: the last of every pass",
    "final": "slice(-1, None) if h.shape[1] > 1 else slice(0)  # the final prompt token",
    "generated": "slice(None) if h.shape[1] == 1 else slice(0)  # generated tokens",
}
"""Columns of a pass with a cache, whose prompts are padded on the left."""

CODE = """\
import json, torch
from functools import partial
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

certificate, t = json.load(open("steering.json")), load_file("steering.safetensors")
s = certificate["evidence"][certificate["chosen"]]["steering"]
model = AutoModelForCausalLM.from_pretrained("MODEL", dtype={dtype})
tokenizer = AutoTokenizer.from_pretrained("MODEL", padding_side="left")

def steer(layer, module, args, output):
    h = output[0] if isinstance(output, tuple) else output
    w, d = t["probe.weights"][layer], t.get("direction", t["probe.weights"])[layer]
    columns = {columns}
    excess = h[:, columns].float() @ w + t["probe.bias"][layer] - s["limit"]
    if w @ d > 0:  # otherwise no shift along d lowers the predicted error
        shifted = h[:, columns].float() - excess.clamp(min=0)[..., None] * d / (w @ d)
        h[:, columns] = shifted.to(h.dtype)

layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
for n in s["layers"]:
    layers[n].register_forward_hook(partial(steer, n))
tokens = tokenizer(["PROMPT"], return_tensors="pt", padding=True)
judged = dict(do_sample=False, repetition_penalty=1.0)  # whatever its generation_config says
print(tokenizer.batch_decode(model.generate(**tokens, max_new_tokens=20, **judged)))
"""


def plain_code(steering: Steering, *, dtype: str = "float32") -> str | None:
    """Return the lines that apply a steering, from the files beside them; None if they cannot.

    They are enough for MERA's rule in the residual stream, with one probe and one direction.
    """
    is_plain = isinstance(steering.rule, Adaptive) and isinstance(steering.space, ResidualSpace)
    vectors = steering.direction if steering.direction is not None else steering.probe.weights
    counts = steering.first_k is not None
    if not is_plain or counts or steering.probe.per_answer or vectors.ndim > 2:
        return None
    return CODE.format(dtype=repr(dtype), columns=COLUMNS[steering.positions])
