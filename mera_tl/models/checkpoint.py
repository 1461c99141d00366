"""Checkpoints read strictly: a folder, a .gguf file or a hub name, or one sentence saying why not.

transformers fills a missing weight with random numbers, passes over an unknown one, unpickles and
can run code that a checkpoint brings. Here each of these is refused, before anything is run.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mera_tl import storage

logger = logging.getLogger(__name__)

_N_NAMED = 4
"""How many tensors or files a message names."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and how transformers is to be asked for it."""

    name: str
    """A folder or a hub name."""
    gguf: str | None = None
    """The file in that folder that holds the weights, where they are in one .gguf file."""
    revision: str | None = None

    @property
    def folder(self) -> Path | None:
        """The local folder, if it is one."""
        return Path(self.name) if Path(self.name).is_dir() else None

    @property
    def arguments(self) -> dict[str, Any]:
        """What every `from_pretrained` gets."""
        gguf = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {"revision": self.revision or "main", "trust_remote_code": False, **gguf}

    @property
    def is_embedded(self) -> bool:
        """Whether the folder holds a `HookedTransformer` itself, as the organism's does."""
        path = self.folder / "config.json" if self.folder else None
        if path is None or not path.is_file():
            return False
        return storage.read_json(path).get("original_architecture") == "HookedTransformer"

    def files(self) -> list[Path]:
        """Return the files of the weights.

        Raises:
            ValueError: if there are none, or only pickled ones, which could run code.
        """
        if self.folder is None:
            return self._cached_files()
        if self.gguf is not None:
            return [self.folder / self.gguf]
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(storage.read_json(index)["weight_map"].values()))
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                raise ValueError(f"{self.name} lacks {_some(missing)}, which {index.name} names.")
            return [self.folder / name for name in names]
        if (self.folder / "model.safetensors").is_file():
            return [self.folder / "model.safetensors"]
        pickled = sorted(
            p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")
        )
        if pickled:
            raise ValueError(
                f"{self.name} holds pickled weights ({_some(pickled)}), which can run code when "
                "they are read; convert them to safetensors."
            )
        raise ValueError(f"{self.name} holds no model.safetensors; put the weights there.")

    def _cached_files(self) -> list[Path]:
        """Return the files that transformers has just loaded from the hub's cache."""
        from transformers.utils.hub import cached_file

        revision = self.revision or "main"
        for name in ("model.safetensors.index.json", "model.safetensors"):
            path = cached_file(
                self.name, name, revision=revision, _raise_exceptions_for_missing_entries=False
            )
            if path is not None:
                return Source(str(Path(path).parent)).files()
        raise ValueError(f"{self.name} has no safetensors weights.")


def locate(name: str, revision: str | None = None) -> Source:
    """Find out what a name is: a folder, one with a .gguf file, such a file, or a hub name.

    Raises:
        ValueError: if it is a file of another kind, or a folder that holds no model.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{name} is a file, but no .gguf file; pass the model's folder.")
        return _require_gguf(Source(str(path.parent), path.name))
    if not path.exists():
        return Source(name, revision=revision)
    if (path / "adapter_config.json").is_file():  # transformers would load what that names
        raise ValueError(
            f"{name} holds an adapter (adapter_config.json), which is no model by itself; save the "
            "model that it was merged into (merge_and_unload of peft), and pass that folder."
        )
    if (path / "config.json").is_file():
        return Source(str(path))
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _require_gguf(Source(str(path), ggufs[0]))
    if ggufs:
        raise ValueError(f"{name} holds several .gguf files ({_some(ggufs)}); pass one of them.")
    raise ValueError(
        f"{name} holds no config.json and no .gguf file; pass the folder of a Hugging Face "
        "checkpoint (config.json, *.safetensors, tokenizer.json)."
    )


def read_config(source: Source) -> Any:
    """Read a checkpoint's configuration, which decides whether it can be loaded.

    Raises:
        ValueError: if there is none, or it asks for something that is refused.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    if source.is_embedded:
        from mera_tl.models.embedded import EmbeddedConfig

        return EmbeddedConfig.read(Path(source.name))
    _refuse_own_code(source)
    with _one_sentence(source, "is no checkpoint"):
        config = AutoConfig.from_pretrained(source.name, **source.arguments)
    # A config without a name of its own is read as the causal model of its type.
    architecture = (config.architectures or [CAUSAL.get(config.model_type, config.model_type)])[0]
    if architecture not in CAUSAL.values():
        raise ValueError(
            f"{source.name} is a {architecture}, which is no decoder-only causal language model "
            "that transformers knows; no other can be steered."
        )
    if source.gguf is None and getattr(config, "quantization_config", None):
        raise ValueError(
            f"{source.name} has quantised weights (quantization_config in config.json); load the "
            "original weights instead."
        )
    return config


def read_model(source: Source, dtype: torch.dtype | str) -> Any:
    """Read a model, every weight of it, as transformers runs it.

    Raises:
        ValueError: if weights are missing, unknown, misshapen or damaged.
    """
    from transformers import AutoModelForCausalLM

    if source.is_embedded:
        return _read_embedded(source, dtype)
    if source.folder is not None:
        source.files()  # says what is wrong with them
    with _one_sentence(source, "does not load"), _quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.name,
            dtype=dtype,
            use_safetensors=None if source.gguf else True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **source.arguments,
        )
    original, report = loaded
    _refuse_loose_ends(source, report)
    return original.eval().requires_grad_(False)


def outline(source: Source, dtype: torch.dtype | str) -> Any:
    """Build the model of a checkpoint with every shape and no weights."""
    from transformers import AutoModelForCausalLM

    config = read_config(source)
    dtype = (config.dtype or torch.float32) if dtype == "auto" else dtype
    with torch.device("meta"):
        if source.is_embedded:
            from mera_tl.models.embedded import EmbeddedForCausalLM

            embedded: Any = EmbeddedForCausalLM(config)
            return embedded.to(dtype)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()


def _read_embedded(source: Source, dtype: torch.dtype | str) -> Any:
    original = outline(source, torch.float32)
    weights = storage.load_tensors(Path(source.name) / "model.safetensors")
    wanted = original.state_dict()
    _refuse_loose_ends(
        source,
        {
            "missing_keys": set(wanted) - set(weights),
            "unexpected_keys": set(weights) - set(wanted),
            "mismatched_keys": {
                (name, tuple(value.shape), tuple(wanted[name].shape))
                for name, value in weights.items()
                if name in wanted and value.shape != wanted[name].shape
            },
        },
    )
    original.load_state_dict(weights, assign=True)
    dtype = torch.float32 if isinstance(dtype, str) else dtype
    return original.to(dtype).eval().requires_grad_(False)


def _refuse_own_code(source: Source) -> None:
    """Refuse a folder whose architecture is in Python files of its own."""
    from transformers import CONFIG_MAPPING

    path = source.folder / "config.json" if source.folder else None
    if path is None or source.gguf or not path.is_file():
        return
    config = storage.read_json(path)
    own = config.get("auto_map")
    if own and config.get("model_type") not in CONFIG_MAPPING:
        files = sorted({f"{str(name).split('--')[-1].split('.')[0]}.py" for name in own.values()})
        raise ValueError(
            f"{source.name} brings its own code ({_some(files)}), which is not run; only "
            "architectures that transformers itself has can be loaded."
        )
    if own:
        logger.info("%s brings its own code, which is not run: transformers' is.", source.name)


def _refuse_loose_ends(source: Source, report: dict[str, Any]) -> None:
    for key, what in (
        ("missing_keys", "lacks weights of the model, which would be random"),
        ("unexpected_keys", "holds weights that the model has no place for"),
    ):
        if names := sorted(report[key]):
            raise ValueError(f"{source.name} {what}: {_some(names)}.")
    if report["mismatched_keys"]:
        name, got, wanted = min(report["mismatched_keys"])
        raise ValueError(
            f"{source.name} holds {name} of shape {tuple(got)}, but its config.json wants "
            f"{tuple(wanted)}."
        )


def _require_gguf(source: Source) -> Source:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{source.gguf} needs the package gguf: pip install 'mera-tl[gguf]'."
        ) from None
    return source


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _N_NAMED} more" if len(names) > _N_NAMED else ""
    return ", ".join(names[:_N_NAMED]) + more


@contextlib.contextmanager
def _one_sentence(source: Source, what: str) -> Iterator[None]:
    """Turn whatever transformers and safetensors raise into one sentence."""
    try:
        yield
    except Exception as error:  # a damaged checkpoint raises anything, KeyError to SafetensorError
        first = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise ValueError(f"{source.name} {what} ({first.strip()}).") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and tables; what they say is said by errors."""
    from transformers.utils import logging as theirs

    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()
