"""The folder of a decision: steering.json, steering.safetensors and a model card, README.md.

The JSON holds the certificate and what is plain of the steering, under one hash; the tensors are
named in it by theirs. Nothing is pickled, nothing is executed, and a folder is whole or absent.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mera_tl import storage
from mera_tl.certificate.description import probe_values, rebuild, tensors_of
from mera_tl.certificate.plain_code import plain_code
from mera_tl.steering.spaces import OWN, ResidualSpace, Space
from mera_tl.steering.steering import Steering

FORMAT = 1
"""Of the folder; raised when a file changes its meaning."""
FILES = ("steering.json", "steering.safetensors", "README.md")
_AROUND = ("*", "certificates/*", "*/certificates/*")
"""Where certificates lie below a folder that holds some: their own, a run's, one of runs."""


def write_folder(
    folder: Path, certificate: Mapping[str, Any], steering: Steering | None, sentence: str
) -> Path:
    """Write a decision, whole or not at all, in place of an earlier one.

    Raises:
        ValueError: if the folder holds other files, or is none.
    """
    storage.require_folder(folder)
    _settle(folder)
    strangers = {path.name for path in folder.iterdir()} - {*FILES} if folder.exists() else set()
    if strangers:
        raise ValueError(
            f"{folder} holds other files ({sorted(strangers)[0]}); choose a folder of its own."
        )
    content = {"format": FORMAT, **certificate}
    if steering is not None:
        content["probe"] = probe_values(steering.probe)
    folder.parent.mkdir(parents=True, exist_ok=True)
    parts = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        new = parts / "new"
        new.mkdir()
        if steering is not None:
            storage.save_tensors(new / "steering.safetensors", tensors_of(steering))
        storage.write_text(new / "README.md", _card(folder.name, content, sentence, steering))
        storage.write_json(new / "steering.json", {**content, "seal": storage.fingerprint(content)})
        if folder.exists():
            os.replace(folder, _aside(folder))
        os.replace(new, folder)
    finally:
        _settle(folder)
        shutil.rmtree(parts)
    return folder


def _aside(folder: Path) -> Path:
    """Return where an earlier decision lies for the instant in which it is replaced."""
    return folder.parent / f".{folder.name}.old"


def _settle(folder: Path) -> None:
    """Put back what a writer that was stopped had put aside, or remove it where a new one is in."""
    if _aside(folder).exists() and not folder.exists():
        os.replace(_aside(folder), folder)
    shutil.rmtree(_aside(folder), ignore_errors=True)


def place_of(folder: Path) -> Path:
    """Return where a decision lies: in its folder, unless a writer was killed replacing it."""
    return _aside(folder) if not folder.exists() and _aside(folder).exists() else folder


def read_folder(folder: Path) -> dict[str, Any]:
    """Read what is plain of a decision.

    Raises:
        ValueError: if the file is missing, damaged, of another format or was changed.
    """
    path = folder / "steering.json"
    found = [p.parent for each in _AROUND for p in sorted(folder.glob(f"{each}/steering.json"))]
    inside = [each for each in found if not each.name.startswith(".")]  # which wait beside
    if inside and not path.exists():
        steer = [str(each) for each in inside if (each / "steering.safetensors").exists()]
        advice = f"; pass one that steers: {', '.join(steer)}" if steer else ", and none steers"
        raise ValueError(f"{folder} holds certificates of several methods or runs{advice}.")
    content = storage.read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not of format {FORMAT}; it was saved by another version of mera_tl, or is "
            "no steering: save it again."
        )
    seal = content.pop("seal", None)
    if seal != storage.fingerprint(content):
        raise ValueError(
            f"{path} was changed after it was saved: its content does not match its hash; save it "
            "again."
        )
    return content


def read_steering(
    folder: Path, content: Mapping[str, Any], space: Space | None
) -> dict[int, Steering] | None:
    """Read the steering that is certified, by its number; None where there is none to read.

    There is none in an abstention, a certificate made from gains alone, or SAE space without SAEs.

    Raises:
        ValueError: if the tensors or SAEs are not those certified.
    """
    if content["chosen"] is None or "probe" not in content:
        return None
    described = content["evidence"][content["chosen"]]["steering"]
    if space is None and described["space"]["name"] not in (ResidualSpace.name, *OWN):
        return None
    tensors = storage.load_tensors(folder / "steering.safetensors")
    steering = rebuild(described, content["probe"], tensors, space or ResidualSpace())
    return {content["chosen"]: steering}


def _card(name: str, content: Mapping[str, Any], sentence: str, certified: Steering | None) -> str:
    """Write the model card: what it does, numbers, promise, limits."""
    setup, first, terms = content["setup"], *sentence.split("\n")
    head = ["---", "library_name: mera_tl", "tags: [steering, activation-engineering]", "---"]
    lines = [*head, f"# {name}", "", f"**{first}**", "", terms, ""]
    if setup:
        lines += [
            f"Model: `{setup['model']}` (weights `{setup['model_fingerprint']}`); task: "
            f"`{setup['task']}` (options {', '.join(setup['options'])}); answers read by "
            f"`{setup['readout']['readout']}`.",
            "",
        ]
    if certified is None:
        return "\n".join([*lines, "This folder holds no steering."]) + "\n"
    table = [
        f"| {row['candidate']} | {row['recoveries']} | {row['regressions']} | {row['gain']:+.3f} "
        f"| {row['lower']:+.3f} |"
        for row in content["evidence"]
    ]
    steering = content["evidence"][content["chosen"]]["steering"]
    lines += ["## What it does", "", _what_it_does(steering), "", "## Evidence", "", _HEAD, *table]
    lines += ["", _LIMITS_AND_USE.format(name=name)]
    if (code := plain_code(certified, dtype=setup.get("dtype", "float32"))) is not None:
        lines += ["", "Without `mera_tl`, in this folder:", "", "```python", code + "```"]
    return "\n".join(lines) + "\n"


_HEAD = "| candidate | better | worse | gain | at least |\n|---|---|---|---|---|"
_LIMITS_AND_USE = """## Limits

The promise is about the average over data drawn as the calibration examples were, with this \
model, tokenizer, template and readout. It says nothing about subgroups, other prompts, other \
tasks or side effects; `mera_tl` refuses another model. The hashes find accidents and careless \
edits, they are no signature.

## Use

```python
import mera_tl

model = mera_tl.load_model("...")  # the model named above
steering = mera_tl.load_steering("{name}", model=model)
outcomes = mera_tl.evaluate(model, task, steering.fwd_hooks())
```

With `steering.attach(model)` it acts on any model object of transformers."""


def _what_it_does(steering: Mapping[str, Any]) -> str:
    """Say in a sentence what a described steering reads and moves."""
    number = ", ".join(f"{k} {steering[k]:g}" for k in ("threshold", "strength") if k in steering)
    layers = ", ".join(map(str, steering["layers"]))
    layers = f"layer{'s' * (', ' in layers)} {layers}"
    k = steering.get("first_k")
    first = "" if k is None else f", of generated tokens the first {k}"
    return (
        f"It reads the model's own error by a linear probe of `resid_post` in {layers} "
        f"(positions: {steering['positions']}{first}; space: {steering['space']['name']}) and "
        f"moves the activation by the rule `{steering['rule']}` ({number})."
    )
