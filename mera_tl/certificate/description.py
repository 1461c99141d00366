"""A steering in plain values and hashes: what a certificate says was certified.

Tensors are named by hashes of their bytes, so two descriptions are equal where the steerings are,
bit for bit. Together with the tensors a description is the steering: `rebuild` gives it back.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mera_tl.probes.probe import LinearProbe
from mera_tl.steering import rules
from mera_tl.steering.spaces import OWN, ResidualSpace, SAESpace, Space
from mera_tl.steering.steering import Steering


def tensor_hash(*tensors: Tensor) -> str:
    """Return 16 hex digits of the SHA-256 of shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def describe(steerings: Sequence[Steering]) -> list[dict[str, Any]]:
    """Return each rule, scope and space as plain values, probe and direction as hashes."""
    known: dict[int, Any] = {}

    def once(part: Any, describe_part: Callable[[Any], Any]) -> Any:
        # Candidates share probes and SAEs, which may be gigabytes.
        if id(part) not in known:
            known[id(part)] = describe_part(part)
        return known[id(part)]

    return [_describe(steering, once) for steering in steerings]


def _describe(steering: Steering, once: Callable[..., Any]) -> dict[str, Any]:
    rule, probe, direction = steering.rule, steering.probe, steering.direction
    described: dict[str, Any] = {"rule": type(rule).__name__, **asdict(rule)}  # pyright: ignore[reportArgumentType]
    if "limit" in described:
        threshold = torch.tensor(rule.limit, dtype=torch.float64).sigmoid()  # pyright: ignore[reportAttributeAccessIssue]
        described["threshold"] = float(f"{threshold.item():.6g}")
    return described | {
        "layers": list(steering.layer_numbers),
        "positions": steering.positions,
        "first_k": steering.first_k,
        "space": once(steering.space, describe_space),
        "probe": once(probe, lambda p: tensor_hash(p.weights, p.bias, p.resid_norm)),
        "direction": None if direction is None else once(direction, tensor_hash),
    }


def describe_reader(steering: Steering) -> dict[str, Any]:
    """Return what reads the predicted error at the final prompt token, for what moves nothing."""
    (about,) = describe([replace(steering, positions="final")])
    return {name: about[name] for name in ("probe", "layers", "positions", "space")}


def is_about(descriptions: Sequence[Mapping[str, Any]], steerings: Sequence[Steering]) -> bool:
    """Whether descriptions that were read from a file may be of these steerings.

    By rule, scope and probe: a direction that is computed again elsewhere may differ in its last
    digits, and hashing SAEs takes long.
    """
    raw = [
        replace(each, space=ResidualSpace(), layers=each.layer_numbers, direction=None)
        for each in steerings
    ]
    both = ([*descriptions], json.loads(json.dumps(describe(raw))))
    told, asked = (
        [{k: v for k, v in each.items() if k not in ("space", "direction")} for each in some]
        for some in both
    )
    return told == asked


def describe_space(space: Space) -> dict[str, Any]:
    """Return the name of a space, and hashes of what it is made of."""
    described: dict[str, Any] = {"name": space.name}
    if space.name in OWN:
        parts = _parts(space).items()
        described |= {n: tensor_hash(x) if isinstance(x, Tensor) else x for n, x in parts}
    if isinstance(space, SAESpace):
        described["correction"] = space.correction
        described["saes"] = {
            str(layer): tensor_hash(*(t for _, t in sorted(sae.state_dict().items())))
            for layer, sae in sorted(space.saes.items())
        }
    return described


def names_of(descriptions: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Name each candidate by what tells it from the others; a single one by its rule's number."""
    first, *others = descriptions
    keys = [
        key
        for key in dict.fromkeys(key for each in descriptions for key in each)
        if key != "limit" and any(each.get(key) != first.get(key) for each in others)
    ]
    keys = keys or [key for key in ("name", "threshold", "strength") if key in first][:1]
    names = tuple(
        ", ".join(_named(key, each) for key in keys if key in each) for each in descriptions
    )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"The candidate {twice or 'given'} is there more than once; pass each steering once, "
            "since every candidate costs confidence."
        )
    return names


def _named(key: str, description: Mapping[str, Any]) -> str:
    value = description[key]
    if key == "name":
        return str(value)
    if isinstance(value, float):
        return f"{key} {value:.4g}"
    if isinstance(value, list):
        return f"{key} {'-'.join(map(str, value))}"
    return f"{key} {value[:6] if key in ('probe', 'direction') and value else value}"


def tensors_of(steering: Steering) -> dict[str, Tensor]:
    """Return the tensors that a description names by hash."""
    parts = {f"probe.{name}": value for name, value in _parts(steering.probe).items()}
    if steering.space.name in OWN:
        parts |= {f"space.{name}": value for name, value in _parts(steering.space).items()}
    parts["direction"] = steering.direction
    return {name: value for name, value in parts.items() if isinstance(value, Tensor)}


def probe_values(probe: LinearProbe) -> dict[str, Any]:
    """Return what is plain of a probe."""
    return {n: value for n, value in _parts(probe).items() if not isinstance(value, Tensor)}


def _parts(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass; its tensors are not copied, as by `asdict`."""
    return {each.name: getattr(value, each.name) for each in fields(value)}


def rebuild(
    described: Mapping[str, Any],
    probe: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    space: Space,
) -> Steering:
    """Return the steering of a description, from its tensors.

    Raises:
        ValueError: if tensors or space are not those described.
    """
    parts = {n.removeprefix("probe."): t for n, t in tensors.items() if n.startswith("probe.")}
    kind = getattr(rules, str(described["rule"]), None)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise ValueError(
            f"There is no rule {described['rule']!r} in this version of mera_tl; use the version "
            "that saved the steering."
        )
    about = dict(described["space"])
    if (own := OWN.get(about.pop("name"))) is not None:
        about |= {n.removeprefix("space."): t for n, t in tensors.items() if n.startswith("space.")}
        space = own(**about)
    steering = Steering(
        LinearProbe(**parts, **{**probe, "metrics": tuple(probe["metrics"])}),
        tensors.get("direction"),
        kind(**{f.name: described[f.name] for f in fields(kind)}),  # pyright: ignore[reportArgumentType]
        space,
        tuple(described["layers"]),
        described["positions"],
        described.get("first_k"),  # steerings saved before there was one have none
    )
    wanted, got = (json.loads(json.dumps(each)) for each in (described, *describe([steering])))
    differ = [key for key in wanted if wanted[key] != got.get(key)]
    if differ:
        raise ValueError(
            f"The {differ[0]} of this steering is not the one that was saved "
            f"({wanted[differ[0]]}, got {got.get(differ[0])}); "
            + (
                "pass the SAEs it was made with as `space`."
                if differ[0] == "space"
                else "its files were changed: save it again."
            )
        )
    return steering
