"""Do latents help because steering happens in them, or because of the direction they give?

Four ways with logistic probes on the same examples: the raw probe along itself; the raw probe along
the decoded latent direction, writing to the stream as always; the latent probe in latents; and that
with the gain correction. At the same fixed lengths, and by MERA's rule with a certificate. Five
minutes on one core.

Found: the direction. Written to the stream as always, the decoded direction does on yesno_bias and
spam_cue at every length what latents do, and far more than the raw probe's own; on choice_hint both
do less than it. The correction mostly makes shifts longer, up to its bound of ten times: a strength
of .1 then does what 1 does without.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from mera_tl import storage
from mera_tl.certificate import calibrate
from mera_tl.inference import ReadSettings, collect, evaluate
from mera_tl.models import Model, load_model
from mera_tl.probes import fit_error_probe
from mera_tl.sae import fit_latent_probe, load_saes
from mera_tl.steering import Additive, SAESpace, Steering
from mera_tl.tasks import load_task

RESULTS = Path(__file__).parent / "results" / Path(__file__).stem
SETTINGS = ReadSettings(batch_size=100)


@dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = ("yesno_bias", "spam_cue", "choice_hint", "sentiment_noise")
    layer: int = 1
    strengths: tuple[float, ...] = (0.1, 0.3, 1.0)
    train: str = "1000"
    calibration: str = "400"
    test: str = "500"
    seed: int = 0


def main(config: Config) -> None:
    model, rows = load_model("organism"), []
    path = RESULTS / f"{storage.fingerprint(asdict(config))}.jsonl"
    for task in config.tasks:
        rows += compare(config, model, task)
        storage.write_records(path, rows)


def compare(config: Config, model: Model, name: str) -> list[dict[str, Any]]:
    sizes = {k: getattr(config, k) for k in ("train", "calibration", "test")}
    splits = load_task(name).split(config.seed, **sizes)
    base = evaluate(model, splits.test, settings=SETTINGS)
    rows = []

    def note(way: str, rule: str, hooks: Any, **more: Any) -> None:
        after = evaluate(model, splits.test, hooks, settings=SETTINGS) if hooks else base
        changed = after.transitions(base)
        row = {"task": name, "layer": config.layer, "way": way, "rule": rule, "n": len(base)}
        row |= {"base": base.accuracy, "accuracy": after.accuracy, **more}
        rows.append(row | {k: changed[k] for k in ("0->1", "1->0")})
        print(rows[-1], flush=True)

    for way, steering in ways(config, model, splits.train).items():
        for strength in config.strengths:
            hooks = replace(steering, rule=Additive(strength)).fwd_hooks()
            note(way, f"strength {strength:g}", hooks)
        decision = calibrate(model, splits.calibration, steering, settings=SETTINGS)
        chosen = {"decision": decision.decision.value, "threshold": decision.threshold}
        note(way, "MERA", decision.fwd_hooks(), **chosen)
    return rows


def ways(config: Config, model: Model, train: Any) -> dict[str, Steering]:
    activations = collect(model, train, settings=SETTINGS)
    space, layer = load_saes("organism", (config.layer,), model), config.layer
    raw = fit_error_probe(activations, kind="logistic", seed=config.seed)
    latent = fit_latent_probe(activations, space, kind="logistic", seed=config.seed)
    decoded = torch.zeros_like(raw.weights)
    decoded[layer] = space.decode(latent.weights[layer], layer)
    gain = SAESpace(space.saes, "gain")
    where = {"layers": (layer,), "positions": "last"}
    return {
        "raw": Steering(raw, **where),
        "raw, decoded direction": Steering(raw, decoded, **where),
        "latents": Steering(latent, space=space, **where),
        "latents, gain": Steering(latent, space=gain, **where),
    }


if __name__ == "__main__":
    main(tyro.cli(Config))
