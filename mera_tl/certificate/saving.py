"""Load a steering that a decision saved, for the model it was certified on and no other."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mera_tl.certificate.certificate import Calibration
from mera_tl.certificate.folder import FILES, place_of
from mera_tl.models.identity import identity_of
from mera_tl.steering.spaces import Space
from mera_tl.steering.steering import Steering


@dataclass(frozen=True)
class NoCertificate:
    """Stands where a certificate was left behind, and says why."""

    reason: str
    setup: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What the certificate was about, as far as it is so of the model, too."""

    def check(self, model: Any) -> None:
        """Accept any model: nothing is promised."""

    def __str__(self) -> str:
        return f"NOT CERTIFIED: loaded anyway. {self.reason}"


def load_steering(
    source: str | Path, *, model: Any = None, space: Space | None = None, anyway: bool = False
) -> Steering:
    """Return the steering that `Calibration.save` wrote, with its certificate.

    `source` is a folder, or an id on the Hugging Face hub as "org/name", of which nothing but the
    three files of a steering is fetched. `model`, of any kind that can be steered, is checked
    against the certificate here; `steering.check(model)` does so later. A steering in SAE space
    needs its `space`. With `anyway` the steering comes without its certificate, as its repr says.

    Raises:
        ValueError: if a file is missing, damaged or was changed, the decision was to abstain, or
            model, tokenizer, template or SAEs are not those certified.
    """
    if not isinstance(source, str | Path):
        raise ValueError(
            f"{source!r:.60} is no folder; pass the one that decision.save(...) wrote. A decision "
            "at hand has its steering: decision.steering."
        )
    folder = place_of(Path(source))
    decision = Calibration.load(folder if folder.exists() else _fetch(str(source)), space=space)
    if decision.abstained:
        raise ValueError(
            f"{source} holds no steering, since the decision was to abstain; take one that steers "
            "(`mera table RUN` lists the decisions of a run)."
        )
    if not decision.steerings and "rule" not in decision.best.steering:
        raise ValueError(
            f"{source} certifies what moves no activations, such as the method flip, or gains "
            "alone: there is no steering in it; take one that steers (`mera table RUN` lists the "
            "decisions of a run)."
        )
    if not decision.steerings and "sae" in str(decision.best.steering.get("space")):
        raise ValueError(
            f"{source} steers in SAE space; pass space=load_saes(...), the SAEs it was made with, "
            "in Python: no command takes it along."
        )
    steering = decision.steering
    assert steering is not None
    reason, setup = "No model was named.", decision.setup
    if model is not None:
        got = identity_of(model)
        try:
            decision.check(model)
            reason = f"It fits {got['model']}."
        except ValueError as error:
            width = steering.probe.manifest.get("d_model", got["d_model"])
            if not anyway or (steering.probe.n_layers, width) != (got["n_layers"], got["d_model"]):
                raise
            reason = str(error).split(";")[0] + "."
            if got.get("tokenizer") != setup.get("tokenizer"):
                setup = {}  # its options may be other tokens
    return steering.with_certificate(NoCertificate(reason, setup)) if anyway else steering


def _fetch(name: str) -> Path:
    """Fetch the files of a steering from the hub."""
    from huggingface_hub import snapshot_download

    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):  # no name that the hub could have
        raise ValueError(
            f"There is no folder {name}; pass the one that decision.save(...) wrote, or one in a "
            "run's certificates/."
        )
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # whatever its network library raises
        raise ValueError(
            f"{name} is neither a folder nor a steering that could be fetched from the hub "
            f"({str(error).splitlines()[0]}); check the name or the connection."
        ) from None
