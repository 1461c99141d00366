"""Which models there are: the embedded one, those on this machine, and many on the hub."""

import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mera_tl.models import families

PAPER_MODELS = {
    "google/gemma-2-2b": "Gemma2ForCausalLM",
    "google/gemma-2-2b-it": "Gemma2ForCausalLM",
    "Qwen/Qwen2.5-3B": "Qwen2ForCausalLM",
    "Qwen/Qwen2.5-3B-Instruct": "Qwen2ForCausalLM",
    "meta-llama/Llama-3.2-1B": "LlamaForCausalLM",
    "meta-llama/Llama-3.2-1B-Instruct": "LlamaForCausalLM",
}


_QUANTISED = re.compile(
    r"(?<!un)quanti[sz]ed|(?<![0-9.])[1-8][-_]?bits?(?![a-z])|(?<![a-z])(int|fp|q)[248](?![.\d])"
    r"|w\d+a\d+|(?<![a-z])(awq|gptq|gguf|ggml|aqlm|bnb|exl2|nf4|mxfp[48]|nvfp4|autoround)(?![a-z])",
    re.IGNORECASE,
)
"""Names of what is refused when it is loaded: its weights are not numbers but codes."""


def model_names() -> list[str]:
    """Return the names of causal language models, the embedded and the paper's first."""
    return list(_families())


def describe_models(search: str = "") -> list[dict[str, Any]]:
    """Describe the models whose name or family contains `search`, in any case.

    Each has `name`, `family` (the architecture), `size` (parameters as its name says, or ""),
    `engine` (what "auto" tries first) and `offline` (whether its weights are on this machine).
    """
    here, word = _cached_on_disk(), search.lower()
    return [
        {
            "name": name,
            "family": family,
            "size": _size(name),
            "engine": "hugging_face" if families.why_not(family) else "transformer_lens",
            "offline": name in here or name == "organism",
        }
        for name, family in _families().items()
        if word in name.lower() or word in family.lower()
    ]


@cache
def _families() -> dict[str, str]:
    """Return architectures by name, from the registry that TransformerLens ships.

    Without quantised models, as far as their names tell: they are refused.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = {"organism": "HookedTransformer", **PAPER_MODELS}
    spec = find_spec("transformer_lens")  # whose import would take ten seconds
    for place in (spec and spec.submodule_search_locations) or ():
        path = Path(place) / "tools/model_registry/data/supported_models.json"
        if path.is_file():
            listed = json.loads(path.read_text(encoding="utf-8"))["models"]
            found |= {entry["model_id"]: entry["architecture_id"] for entry in listed}
    causal = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), "HookedTransformer"}
    return {
        name: family
        for name, family in found.items()
        if family in causal and not family.endswith("ForConditionalGeneration")
        if not _QUANTISED.search(name.rpartition("/")[2])
    }


def _size(name: str) -> str:
    sizes = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", name.lower())
    return f"{sizes[-1][0]}{sizes[-1][1].upper()}" if sizes else ""


def _cached_on_disk() -> set[str]:
    """Return the names whose weights lie in the hub's cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return set()
    return {
        repo.repo_id
        for repo in repos
        if any(file.file_name.endswith(".safetensors") for r in repo.revisions for file in r.files)
    }
