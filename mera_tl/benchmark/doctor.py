"""What works on this machine, and what to do about the rest.

Each check is a small function that never raises: it returns what it found and, where something is
missing, one sentence of advice.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

NEEDED = ("torch", "transformer-lens", "transformers", "safetensors", "plotly", "datasets")
EXTRAS = {
    "sae-lens": "steering in SAE space: pip install 'mera-tl[sae]'",
    "ray": "grids over several machines: pip install 'mera-tl[cluster]'",
    "kaleido": "SVG files beside a report: pip install 'mera-tl[images]'",
    "dash": "`mera explore`: pip install 'mera-tl[explore]'",
    "ipywidgets": "the panel in a notebook: pip install 'mera-tl[explore]'",
    "lm-eval": "`mera eval`: pip install 'mera-tl[evals]'",
    "gguf": "`mera export`: pip install 'mera-tl[gguf]'",
}
HUB = ("huggingface.co", 443)
PATIENCE = 3.0
"""Seconds to wait for the hub."""


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    works: bool | None
    """None for what is optional and absent."""
    found: str
    advice: str = ""

    def __str__(self) -> str:
        mark = {True: "ok", False: "NO", None: "--"}[self.works]
        lines = [
            f"{mark}  {self.name}: {self.found}",
            *([f"      {self.advice}"] * bool(self.advice)),
        ]
        wrap = textwrap.TextWrapper(width=80, subsequent_indent=" " * 6)
        return "\n".join(map(wrap.fill, lines))


def examine() -> list[Check]:
    """Run every check; one that breaks is reported, not raised."""
    checks: list[Callable[[], list[Check]]] = [
        _python,
        _packages,
        _extras,
        _device,
        _model,
        _hub,
        _browser,
    ]
    found: list[Check] = []
    for check in checks:
        try:
            found += check()
        except Exception as error:  # a doctor reports whatever is wrong
            name = check.__name__.strip("_")
            found.append(Check(name, False, f"{type(error).__name__}: {error}"))
    return found


def _python() -> list[Check]:
    enough = sys.version_info >= (3, 11)
    advice = "" if enough else "mera_tl needs Python 3.11 or newer; make a new environment with it."
    return [Check("python", enough, f"{platform.python_version()} on {platform.system()}", advice)]


def _packages() -> list[Check]:
    checks = []
    for name in NEEDED:
        try:
            checks.append(Check(name, True, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, False, "missing", "Install the package again: pip install ."))
    return checks


def _extras() -> list[Check]:
    checks = []
    for name, use in EXTRAS.items():
        there = importlib.util.find_spec(name.replace("-", "_")) is not None
        found = importlib.metadata.version(name) if there else "not installed"
        checks.append(Check(name, True if there else None, found, "" if there else f"For {use}."))
    return checks


def _device() -> list[Check]:
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        return [Check("device", True, f"cuda: {name}, {free:.0f} of {total:.0f} GiB free")]
    n = torch.get_num_threads()
    found = f"cpu, {n} thread{'s' * (n != 1)} of {os.cpu_count()} cores"
    advice = "No GPU: small models only; a 2B model answers a few prompts a second at best."
    return [Check("device", True, found, advice)]


def _model() -> list[Check]:
    from mera_tl.inference.answers import ReadSettings
    from mera_tl.inference.evaluation import evaluate
    from mera_tl.models.loading import load_model
    from mera_tl.tasks.loading import load_task

    model = load_model("organism")
    loaded = Check("model", True, f"the organism loads on {model.device} ({model.fingerprint})")
    task = load_task("yesno_bias").subset(range(12))
    runs = [
        evaluate(model, task, settings=ReadSettings(batch_size=size, progress=False))
        for size in (1, 12)
    ]
    gap = (runs[0].probs - runs[1].probs).abs().max().item()
    same = gap < 1e-4 and runs[0].predictions.equal(runs[1].predictions)
    advice = "" if same else "Batches change answers here; use batch_size=1 and report this."
    found = f"alone and in a batch, probabilities differ by {gap:.0e} at most"
    return [loaded, Check("batching", same, found, advice)]


def _hub() -> list[Check]:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        advice = "HF_HUB_OFFLINE is set: models and data come from the cache or from folders."
        return [Check("hub", None, "not asked", advice)]
    try:
        socket.create_connection(HUB, timeout=PATIENCE).close()
    except OSError as error:
        advice = "Pass local folders (--model path, --data-dir path); the organism needs no hub."
        return [Check("hub", None, f"{HUB[0]} is out of reach ({error})", advice)]
    return [Check("hub", True, f"{HUB[0]} answers")]


def _browser() -> list[Check]:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next((name for name in names if shutil.which(name)), None)
    advice = "" if path else "Only for PNGs of the gallery and the browser tests."
    return [Check("browser", True if path else None, path or "none found", advice)]
