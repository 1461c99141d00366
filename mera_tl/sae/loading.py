"""Load sparse autoencoders for a model, and refuse those that do not fit it.

A source is "organism" (the embedded ones), a folder of `layer_{l}` subfolders as `mera sae train`
writes them, or an official release and the pattern of its ids, separated by a colon:
`gemma-scope-2b-pt-res-canonical:layer_{layer}/width_16k/canonical`.

The only module, with `training`, that imports sae-lens, and only when something is loaded.
"""

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from mera_tl.inference.evaluation import check_model
from mera_tl.models.model import Model, resid_post
from mera_tl.organism import FOLDER as ORGANISM_FOLDER
from mera_tl.steering.spaces import SAESpace

logger = logging.getLogger(__name__)

ARCHITECTURES = ("standard", "jumprelu", "topk")
"""Non-negative latents, one encoder, an affine decoder; a BatchTopK is saved as a JumpReLU."""
SIBLING_ENDINGS = ("-it", "-instruct", "-chat")

Layers = Literal["all", "best"] | tuple[int, ...]


def load_saes(
    source: str | Path,
    layers: Layers,
    model: Model,
    *,
    sibling: bool = False,
    correction: Literal["none", "gain"] = "none",
) -> SAESpace:
    """Load the SAEs of some layers, in float32 on the model's device.

    `sibling` allows the SAEs of a base model on its instruction-tuned sibling, whose activations
    they reconstruct less well: look at `reconstruction` first.

    Raises:
        ValueError: if sae-lens is not installed, the layers are none, the source or a layer of it
            is not there, or an SAE does not fit the model.
    """
    check_model(model)
    sae_class = require_sae_lens().SAE
    if layers not in ("all", "best") and not isinstance(layers, tuple):
        raise ValueError(f'layers={layers!r} is not "all" or a tuple of layer numbers, as (1, 2).')
    folder = ORGANISM_FOLDER / "saes" if str(source) == "organism" else Path(source)
    if folder.is_dir():
        wanted = _layers_of(folder, layers)
        saes = {
            layer: sae_class.load_from_disk(folder / f"layer_{layer}", dtype="float32")
            for layer in wanted
        }
    elif ":" in str(source):
        saes = _load_release(sae_class, str(source), layers)
    else:
        raise ValueError(
            f"There are no SAEs at {str(source)!r}; pass a folder of layer_0, layer_1, ... (`mera "
            "sae train` writes one), or an official release as RELEASE:layer_{layer}/ID."
        )
    for layer, sae in saes.items():
        sae.to(model.device).requires_grad_(False)
        check(sae, layer, model, sibling=sibling)
    return SAESpace(saes, correction)


def require_sae_lens() -> Any:
    """Return the package sae-lens.

    Raises:
        ValueError: naming the extra, if it is not installed.
    """
    try:
        import sae_lens
    except ImportError:
        raise ValueError(
            "SAE space needs sae-lens, which is not installed, and transformer-lens 3 beneath it; "
            "run `pip install mera-tl[sae]`."
        ) from None
    return sae_lens


def starts_with_bos(model: Model) -> bool:
    """Whether the model's prompts begin with a BOS token."""
    bos = getattr(model.tokenizer, "bos_token_id", None)
    return bos is not None and model.tokenize(["a"])[0][:1] == [bos]


def default_source(model_name: str) -> str:
    """Return where the SAEs of a model are looked for, and trained to, if no place is named."""
    return "organism" if model_name == "organism" else str(Path("saes") / Path(model_name).name)


# --- sources ------------------------------------------------------------------------------------


def _layers_of(folder: Path, layers: Layers) -> tuple[int, ...]:
    found = sorted(
        int(path.parent.name.removeprefix("layer_"))
        for path in folder.glob("layer_*/cfg.json")
        if path.parent.name.removeprefix("layer_").isdigit()
    )
    if not found:
        raise ValueError(
            f"{folder} holds no SAE; pass a folder of layer_0, layer_1, ... as `mera sae train` "
            "writes it."
        )
    if not isinstance(layers, tuple):
        return tuple(found)
    missing = sorted(set(layers) - set(found))
    if missing:
        raise ValueError(
            f"{folder} has SAEs of layer{'s' * (len(found) > 1)} {', '.join(map(str, found))} but "
            f"none of layer {missing[0]}; choose among them, or train one with `mera sae train`."
        )
    return tuple(sorted(set(layers)))


def _load_release(sae_class: Any, source: str, layers: Layers) -> Mapping[int, Any]:
    release, _, pattern = source.partition(":")
    if not isinstance(layers, tuple):
        raise ValueError(
            f"Of the release {release} every layer is a download of its own; name those to load, "
            "as layers 12 or 10-14."
        )
    if "{layer}" not in pattern:
        raise ValueError(
            f"The id {pattern!r} of release {release} does not say where the layer goes; pass it "
            "as layer_{layer}/width_16k/canonical."
        )
    known = _release_ids(release)
    saes = {}
    for layer in sorted(set(layers)):
        name = pattern.replace("{layer}", str(layer))
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
            raise ValueError(
                f"Release {release} has no SAE {name!r}; nearest: {', '.join(near) or 'none'}."
            )
        try:
            saes[layer] = sae_class.from_pretrained(release, name, dtype="float32")
        except Exception as error:
            raise ValueError(
                f"The SAE {name} of {release} could not be fetched "
                f"({str(error).splitlines()[0]}); connect to the hub once, or pass a local folder."
            ) from None
    return saes


def _release_ids(release: str) -> list[str]:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release not in directory:
        near = difflib.get_close_matches(release, directory, n=3, cutoff=0.4)
        raise ValueError(
            f"sae-lens knows no release {release!r}; nearest: {', '.join(near) or 'none'}."
        )
    return list(directory[release].saes_map)


# --- what fits ----------------------------------------------------------------------------------


def check(sae: Any, layer: int, model: Model, *, sibling: bool = False) -> None:
    """Refuse an SAE that cannot be read and written right in this layer of this model.

    Raises:
        ValueError: saying what does not fit, in one sentence.
    """
    cfg, metadata, which = sae.cfg, sae.cfg.metadata, f"The SAE of layer {layer}"
    if cfg.architecture() not in ARCHITECTURES:
        raise ValueError(
            f"{which} is a {cfg.architecture()} SAE; pass one of {', '.join(ARCHITECTURES)}."
        )
    if cfg.normalize_activations != "none":
        raise ValueError(
            f"{which} normalises its input ({cfg.normalize_activations}), so that a change of its "
            "latents has no fixed size in the stream; pass one with normalize_activations='none'."
        )
    if cfg.reshape_activations != "none":
        raise ValueError(
            f"{which} reads reshaped activations ({cfg.reshape_activations}); pass one of "
            f"{resid_post(layer)}."
        )
    if metadata.get("hook_name") != resid_post(layer):
        raise ValueError(
            f"{which} was trained on {metadata.get('hook_name')!r}; pass one of "
            f"{resid_post(layer)!r}."
        )
    if cfg.d_in != model.d_model:
        raise ValueError(
            f"{which} reads activations of width {cfg.d_in}, but those of {model.name} have "
            f"{model.d_model}; pass an SAE of this model."
        )
    _check_model(metadata, which, model, sibling)
    _check_bos(metadata, which, model)
    _check_decoder(sae, layer, which)


def _check_model(metadata: Any, which: str, model: Model, sibling: bool) -> None:
    fitted = metadata.get("model_fingerprint")
    if fitted is not None and fitted != model.fingerprint:
        raise ValueError(
            f"{which} was trained on other weights than those of {model.name} (fingerprint "
            f"{fitted}, not {model.fingerprint}); train one with `mera sae train`."
        )
    trained_on = Path(str(metadata.get("model_name"))).name.lower()
    name = Path(model.name).name.lower()
    if trained_on == name or fitted is not None:
        return
    if _base(trained_on) == _base(name):
        if not sibling:
            raise ValueError(
                f"{which} was trained on {trained_on}, the sibling of {model.name}, and "
                "reconstructs it less well; ask for it with sibling (--sae-sibling), and look at "
                "`mera sae report` first."
            )
        return
    logger.warning("%s was trained on %s and is used on %s.", which, trained_on, model.name)


def _base(name: str) -> str:
    for ending in SIBLING_ENDINGS:
        name = name.removesuffix(ending)
    return name


def _check_bos(metadata: Any, which: str, model: Model) -> None:
    expected = metadata.get("prepend_bos")
    given = starts_with_bos(model)
    if expected is not None and bool(expected) != given:
        has, runs = ("with", "without") if expected else ("without", "with")
        raise ValueError(
            f"{which} was trained {has} a BOS token before every text, but {model.name} is run "
            f"{runs} one; train an SAE on this model with `mera sae train`."
        )


@torch.no_grad()
def _check_decoder(sae: Any, layer: int, which: str) -> None:
    """Hold the SAE to what `write` rests on: a change of latents decodes by the rows it uses."""
    # Near zero everything is affine: a few latents of the size that activations give them.
    generator = torch.Generator().manual_seed(0)
    latents = torch.rand(4, sae.cfg.d_sae, generator=generator).to(sae.W_dec)
    decoded = (sae.decode(latents) - sae.decode(torch.zeros_like(latents))).float()
    written = SAESpace({layer: sae}).decode(latents, layer)
    if not torch.allclose(decoded, written, rtol=1e-3, atol=1e-3 * float(decoded.abs().max())):
        raise ValueError(
            f"{which} does not decode by adding up the rows of W_dec; it cannot be steered."
        )
