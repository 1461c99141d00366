"""mera_tl steers a language model away from its own errors, only when that can be shown to help.

One idea: steering = probe x direction x rule x space, and it is nothing but a list of
TransformerLens hooks. A linear probe reads the model's own error off `resid_post`; a rule says
how far to move an activation so that the probe predicts at most `threshold`; a calibration decides
on held-out data whether that helps, and otherwise abstains.

Axis names, the same in every signature and every einops string:
`example`, `option`, `layer`, `batch`, `pos`, `d_model`, `d_vocab`, `threshold`, `penalty`, `fold`.

Reference: Hedström et al., "To Steer or Not to Steer? Mechanistic Error Reduction with Abstention
for Language Models", ICML 2025, arXiv 2510.13290.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mera_tl.activations import Activations as Activations
    from mera_tl.activations import collect as collect
    from mera_tl.calibration import certify as certify
    from mera_tl.certificate import Calibration as Calibration
    from mera_tl.evaluation import evaluate as evaluate
    from mera_tl.gains import calibrate as calibrate
    from mera_tl.ledger import explain as explain
    from mera_tl.models import Model as Model
    from mera_tl.models import load_model as load_model
    from mera_tl.monitor import Monitor as Monitor
    from mera_tl.outcomes import Outcomes as Outcomes
    from mera_tl.probes import LinearProbe as LinearProbe
    from mera_tl.probes import fit_error_probe as fit_error_probe
    from mera_tl.protocol import Protocol as Protocol
    from mera_tl.rules import Adaptive as Adaptive
    from mera_tl.rules import Additive as Additive
    from mera_tl.steering import Steering as Steering
    from mera_tl.tasks import Task as Task
    from mera_tl.tasks import load_task as load_task

_HOME = {
    "Activations": "activations",
    "Adaptive": "rules",
    "Additive": "rules",
    "Calibration": "certificate",
    "LinearProbe": "probes",
    "Model": "models",
    "Monitor": "monitor",
    "Outcomes": "outcomes",
    "Protocol": "protocol",
    "Steering": "steering",
    "Task": "tasks",
    "calibrate": "gains",
    "certify": "calibration",
    "collect": "activations",
    "evaluate": "evaluation",
    "explain": "ledger",
    "fit_error_probe": "probes",
    "load_model": "models",
    "load_task": "tasks",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import a public name on first use: `import mera_tl` itself must not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'mera_tl' has no attribute {name!r}")
    return getattr(import_module(f"mera_tl.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
