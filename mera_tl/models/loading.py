"""From a name to a `Model`: read the checkpoint, choose the engine, check what it computes."""

import difflib
import logging
import re
import warnings
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mera_tl import storage
from mera_tl.models import families
from mera_tl.models.chat import Turn
from mera_tl.models.check import difference
from mera_tl.models.checkpoint import Source, locate, outline, read_config, read_model
from mera_tl.models.fingerprints import fingerprint, recall
from mera_tl.models.hugging_face import HookedCausalLM
from mera_tl.models.identity import remember
from mera_tl.models.listing import model_names
from mera_tl.models.model import Engine, Model
from mera_tl.organism import FOLDER as ORGANISM_FOLDER

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
"""Of the weights and the forward passes; "auto" is the checkpoint's own."""


def load_model(
    name: str,
    *,
    dtype: Dtype = "float32",
    device: str | torch.device | None = None,
    chat: bool | None = None,
    system: str | None = None,
    n_devices: int = 1,
    engine: Engine | Literal["auto"] = "auto",
    revision: str | None = None,
    check: bool = True,
) -> Model:
    """Load any decoder-only causal language model that transformers runs, unprocessed.

    `name` is "organism" (the embedded model), a Hugging Face folder, a .gguf file or a folder with
    one, or a name on the Hugging Face hub (of which `revision` picks a version). Folders are read
    by their own config.json, never by their names, and without network.

    The `engine` "transformer_lens" has every hook point of a `HookedTransformer` and may use
    several GPUs, but knows few families; "hugging_face" runs any model, decodes faster, and has the
    hooks `resid_post` only. "auto" takes the first where it knows the family and passes the check:
    one small batch, once per model, must give the original's numbers. `check=False` skips it.

    Prompts go into the tokenizer's chat template where it has one, in which control tokens that are
    typed in them are text; `chat=False` takes prompts as they are written, typed control tokens
    included. `system` is the system prompt. On the device "meta" a model has shapes and no weights.

    Raises:
        ValueError: if there is no such model, a weight of it is missing, unknown, misshapen or not
            finite, it is quantised, pickled or brings its own code, the engine does not compute
            what the original does, or there are fewer devices.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise ValueError(
            f'{name!r:.60} is no name of a model; pass one, as load_model("organism"), or the '
            "path of a folder."
        )
    if engine not in ("auto", *get_args(Engine)):
        wanted = ", ".join(get_args(Engine))
        raise ValueError(f"engine={engine!r} is none of auto, {wanted}; choose one of them.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = default if device is None else str(device)
    require_devices(device, n_devices)
    original = _load_original(str(name), revision, dtype, device, chat, system)
    model = _on_engine(original, engine, n_devices, check=check and device != "meta")
    remember(getattr(model.hooked, "original", model.hooked), model.fingerprint)
    return model


def _load_original(
    name: str,
    revision: str | None,
    dtype: Dtype,
    device: str,
    chat: bool | None,
    system: str | None,
) -> Model:
    """Load the model that transformers runs, hooks around it, with its tokenizer."""
    source = locate(str(ORGANISM_FOLDER) if name == "organism" else name, revision)
    config = _config_of(source)
    # A tokenizer that cannot be read is said before gigabytes of weights are.
    tokenizer = _load_tokenizer(source)
    chat = _whether_to_chat(tokenizer, name, chat, system)
    if device == "meta":
        original = outline(source, _torch_dtype(dtype))
    else:
        original = read_model(source, _torch_dtype(dtype)).to(device)
    is_real = source.folder is not None and name != "organism"
    return Model(
        HookedCausalLM(original),
        tokenizer,
        Path(name).resolve().name if is_real else name,
        _end_tokens(original, tokenizer),
        chat,
        system,
        "" if device == "meta" else fingerprint(config.to_dict(), source.files()),
    )


def _on_engine(
    model: Model, engine: Engine | Literal["auto"], n_devices: int, *, check: bool
) -> Model:
    """Give a loaded original the engine that was asked for, or the best that passes the check."""
    assert isinstance(model.hooked, HookedCausalLM)
    original = model.hooked.original
    architecture = (original.config.architectures or [type(original).__name__])[0]
    reason = families.why_not(architecture)
    if engine == "transformer_lens" or n_devices > 1 or (engine == "auto" and not reason):
        if n_devices > 1 and (engine == "hugging_face" or reason):
            raise ValueError(
                f"The engine 'hugging_face' runs on one device; pass n_devices=1. {reason}".strip()
            )
        try:
            return _on_transformer_lens(model, original, n_devices, check=check)
        except ValueError as error:
            if engine == "transformer_lens" or n_devices > 1:
                raise
            reason = str(error)
    if check and (wrong := _checked(model, original)):
        raise ValueError(f"{model.name} cannot be run here: {wrong}.")
    logger.info("%s runs on the engine hugging_face. %s", model.name, reason)
    return model


def _on_transformer_lens(model: Model, original: Any, n_devices: int, *, check: bool) -> Model:
    with warnings.catch_warnings():
        # TransformerLens announces HookedTransformer's end in 4.0 at every construction.
        warnings.simplefilter("ignore", DeprecationWarning)
        found = replace(model, hooked=families.build(original, n_devices))
    if check and (wrong := _checked(found, original)):
        raise ValueError(
            f"With the engine 'transformer_lens', {model.name} is not the original model: {wrong}; "
            "try engine='hugging_face'."
        )
    logger.info("%s runs on the engine transformer_lens.", model.name)
    return found


def _checked(model: Model, original: Any) -> str:
    """Compare an engine with the original, once per model, engine, devices and versions."""
    key = [model.fingerprint, model.engine, model.manifest["dtype"], model.device.type]
    key.append(getattr(model.hooked.cfg, "n_devices", 1))
    for package in ("torch", "transformers", "transformer-lens"):
        try:
            key.append(version(package))
        except PackageNotFoundError:
            key.append("")
    return recall("checks", key, lambda: difference(model, original))


def _config_of(source: Source) -> Any:
    try:
        return read_config(source)
    except ValueError as error:
        if source.folder is not None:
            raise
        known = model_names()
        near = difflib.get_close_matches(source.name, known, n=3, cutoff=0.4)
        nearest = f"; nearest names: {', '.join(near)}" if near else ""
        if source.name in known:
            raise ValueError(
                f"{source.name} could not be fetched; connect to the hub once, or pass a local "
                f"folder with its files. {error}"
            ) from None
        raise ValueError(
            f"{source.name!r} is neither a folder nor a model that can be fetched from the hub"
            f"{nearest} (`mera models` lists many). {error}"
        ) from None


def require_devices(device: str, n_devices: int) -> None:
    """Refuse devices that are not there.

    Raises:
        ValueError: saying which are.
    """
    if not isinstance(n_devices, Integral):
        raise ValueError(f"n_devices={n_devices!r} is no number of devices; pass one, as 1.")
    if device == "meta":  # which is as many as one likes
        return
    if not re.fullmatch(r"(cpu|mps|cuda)(:\d+)?", device):
        raise ValueError(f"There is no device {device!r}; pass cpu, mps, cuda or cuda:N.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"There is no GPU here for device={device!r}; pass device='cpu'.")
    there = torch.cuda.device_count() if device.startswith("cuda") else 1
    if not 1 <= n_devices <= there:
        raise ValueError(
            f"n_devices={n_devices}, but there {'is' if there == 1 else 'are'} {there} of the kind "
            f"{device!r}; pass n_devices={there}, or run where there are more GPUs."
        )


def _torch_dtype(dtype: str) -> torch.dtype | str:
    if dtype not in ("float32", "bfloat16", "float16", "auto"):
        raise ValueError(
            f"dtype {dtype!r} is not float32, bfloat16, float16 or auto; choose one of them."
        )
    return dtype if dtype == "auto" else getattr(torch, dtype)


def _end_tokens(original: Any, tokenizer: Any) -> tuple[int, ...]:
    generation = getattr(original, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    eos = tokenizer.eos_token_id if eos is None else eos
    return tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))


def _whether_to_chat(tokenizer: Any, name: str, chat: bool | None, system: str | None) -> bool:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ValueError(f"The tokenizer of {name!r} has no chat template; leave chat off.")
    chat = has_template if chat is None else chat
    if system is not None and not chat:
        raise ValueError(f"A system prompt needs a chat template, which {name!r} does not use.")
    if chat:
        Turn.of(tokenizer, system)  # says at once what is wrong with the template
    return chat


def _load_tokenizer(source: Source) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        settings = Path(source.name) / "tokenizer_config.json"
        if settings.is_file():
            kind = storage.read_json(settings).get("tokenizer_class")
            if kind in ("PreTrainedTokenizerFast", "TokenizersBackend"):
                # AutoTokenizer would go by the model's family and rebuild another tokenizer.
                return PreTrainedTokenizerFast.from_pretrained(source.name)
        return AutoTokenizer.from_pretrained(source.name, **source.arguments)
    except Exception as error:  # a damaged tokenizer raises anything
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{source.name} has no tokenizer that transformers can read ({first}); "
            "put its tokenizer.json and tokenizer_config.json beside the weights."
        ) from None
