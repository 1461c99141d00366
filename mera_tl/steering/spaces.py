"""Where a probe reads and a rule writes: the residual stream itself, or the latents of an SAE.

A space turns `resid_post` into features and writes a shift of features back. `ResidualSpace` is
the identity. Three others are ways of steering of their own: `UnitSpace` reads directions and turns
them, `TransportSpace` maps one cloud of activations onto another, `ClassSpace` reads which class a
linear classifier predicts and moves there. `SAESpace` reads `a = encode(h)` and writes

    h + (a' - a) W_dec,   a' = max(0, a + shift),

which keeps what the SAE does not explain of `h` and, where nothing shifts, `h` itself.

**What holds in latents and what does not.** The rule's arithmetic is exact in `a + shift`. Keeping
latents at zero or above takes back the part of a shift that would switch off what is off already,
so the score of `a'` can stay above the limit. And an encoder is not its decoder's inverse:
`encode(h')` is not `a'`. So nothing promises that the probe predicts at most the threshold
afterwards; `latents.predictions` measures all three, and a certificate rests on answers alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, final

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

Resid = Float[Tensor, "*rows d_model"]
Features = Float[Tensor, "*rows d"]

SURE = 30.0
"""Log-odds of a class are no further from zero than this."""
MIN_GAIN = 0.1
"""A shift that re-encodes to less than this share of itself is not stretched any further."""


class Space(ABC):
    """Features of one layer's residual stream; unless a space says otherwise, of every layer.

    A space of its own says what it reads and, where that is not the stream itself, how it writes.
    """

    name: str

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The layers it has features of, in order; None for all."""
        return None

    @abstractmethod
    def read(self, resid: Resid, layer: int) -> Features:
        """Return the features of an activation, in float32."""

    def target(self, features: Features, shift: Features, layer: int) -> Features:  # noqa: ARG002
        """Return the features that a shift aims at, among those that are possible: the sum."""
        return features + shift

    def write(self, resid: Resid, features: Features, shift: Features, layer: int) -> Resid:
        """Return the activation whose features have moved by `shift`, in the dtype of `resid`.

        Where features are the stream, that is the target, cast once at the end.
        """
        # A float32 shift added to a bfloat16 stream would promote everything after it.
        return self.target(features, shift, layer).to(resid.dtype)

    def stretch(
        self,
        direction: Float[Tensor, "*option d"],
        layer: int,  # noqa: ARG002
    ) -> Float[Tensor, "*option"]:
        """Return how long a move along `direction` is in features, if of length one in `resid`.

        One where features are the stream, or have a length of their own.
        """
        return torch.ones(direction.shape[:-1])


@final
@dataclass(frozen=True)
class ResidualSpace(Space):
    """The residual stream as it is."""

    name = "raw"

    def read(self, resid: Resid, layer: int) -> Features:  # noqa: ARG002
        """Return the activation in float32."""
        return resid.float()


@final
@dataclass(frozen=True)
class UnitSpace(Space):
    """Activations by direction alone: features are `h / |h|`, so a linear score is a cosine.

    A shift is in units of `|h|`. With `turns` the result gets the length that `h` had: it rotates
    in its plane with the shift (spherical steering, arXiv 2602.08169). Without, the shift is added,
    which leaves a condition on a cosine (CAST, arXiv 2409.05907).
    """

    name = "unit"

    turns: bool = False
    """Whether the length of the activation is kept."""

    def read(self, resid: Resid, layer: int) -> Features:  # noqa: ARG002
        """Return the activation over its length; zero for zero."""
        return torch.nn.functional.normalize(resid.float(), dim=-1)

    def target(self, features: Features, shift: Features, layer: int) -> Features:  # noqa: ARG002
        """Return the sum, of length one where it turns."""
        moved = features + shift
        return torch.nn.functional.normalize(moved, dim=-1) if self.turns else moved

    def write(self, resid: Resid, features: Features, shift: Features, layer: int) -> Resid:
        """Return the target at the length that the activation had."""
        length = resid.float().norm(dim=-1, keepdim=True)
        return (length * self.target(features, shift, layer)).to(resid.dtype)


@final
@dataclass(frozen=True, eq=False)
class TransportSpace(Space):
    """The residual stream, where a move from one mean to another also changes the spread.

    `T(h) = to + ratio (h - start)` per unit is the optimal transport between two Gaussians
    (Linear-AcT, arXiv 2410.23054). A shift of `to - start` writes `T(h)`, a share of it goes so far
    on the way: a `Gated` rule of that strength along `start - to`.
    """

    name = "transport"

    start: Float[Tensor, "layer d_model"] = field(repr=False)
    """Mean of the activations to move."""
    to: Float[Tensor, "layer d_model"] = field(repr=False)
    """Mean of those they should be like."""
    ratio: Float[Tensor, "layer d_model"] = field(repr=False)
    """Standard deviation of the second over that of the first."""

    def read(self, resid: Resid, layer: int) -> Features:  # noqa: ARG002
        """Return the activation in float32."""
        return resid.float()

    def target(self, features: Features, shift: Features, layer: int) -> Features:
        """Return the activation on its way to `T(h)`."""
        start, to, ratio = (x[layer].to(features) for x in (self.start, self.to, self.ratio))
        way = to - start
        # How far, as a share of the way between the means; the spread changes by the same share.
        share = einsum(shift, way, "... d, d -> ...") / way.square().sum().clamp(min=1e-12)
        return features + share[..., None] * (to + ratio * (features - start) - features)


@final
@dataclass(frozen=True, eq=False)
class ClassSpace(Space):
    """What a linear classifier reads: features are the log-odds of every class.

    A shift of -1 along class a moves an activation from the mean of a to the mean of the class that
    the classifier predicts, whichever that is; nothing moves where it predicts a.
    """

    name = "class"

    weights: Float[Tensor, "layer option d_model"] = field(repr=False)
    bias: Float[Tensor, "layer option"] = field(repr=False)
    means: Float[Tensor, "layer option d_model"] = field(repr=False)
    """Where the activations of each class lie."""

    def read(self, resid: Resid, layer: int) -> Features:
        """Return log P(class) / (1 - P(class)) for every class."""
        weights, bias = self.weights[layer].to(resid.device), self.bias[layer].to(resid.device)
        scores = einsum(resid.float(), weights, "... d, option d -> ... option") + bias
        # Not from a probability that rounds to one: log P - log of the sum over the others.
        others = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
        rest = scores[..., None, :].masked_fill(others, -torch.inf).logsumexp(-1)
        return (scores - rest).clamp(-SURE, SURE)

    def write(self, resid: Resid, features: Features, shift: Features, layer: int) -> Resid:
        """Return the activation, moved from the classes of the shift to the predicted one."""
        predicted = torch.nn.functional.one_hot(features.argmax(-1), features.shape[-1])
        moved = shift - shift.sum(-1, keepdim=True) * predicted
        way = einsum(moved, self.means[layer].to(moved), "... option, option d -> ... d")
        return (resid.float() + way).to(resid.dtype)


OWN: Mapping[str, type[Space]] = {
    space.name: space for space in (UnitSpace, TransportSpace, ClassSpace)
}
"""Spaces that are small enough to be saved with their steering, by name."""


@final
@dataclass(frozen=True, eq=False)
class SAESpace(Space):
    """Latents of sparse autoencoders, one for each of some layers; see `sae.load_saes`.

    Raises:
        ValueError: if there is no SAE, their widths differ, or there is no such correction.
    """

    name = "sae"

    saes: Mapping[int, Any] = field(repr=False)
    """sae-lens SAEs by layer: standard, JumpReLU or TopK, without normalisation of their input."""
    correction: Literal["none", "gain"] = "none"
    """`gain` stretches a shift so that, to first order, it is found again after re-encoding: up to
    ten times where it is spread over many latents. Fixed strengths are then that much longer."""

    def __post_init__(self) -> None:
        if not isinstance(self.saes, Mapping) or not self.saes:
            raise ValueError("An SAE space needs at least one SAE; pass {layer: sae}.")
        if self.correction not in ("none", "gain"):
            raise ValueError(f'correction={self.correction!r} is neither "none" nor "gain".')
        widths = {layer: sae.cfg.d_sae for layer, sae in self.saes.items()}
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"The SAEs have different numbers of latents ({widths} by layer); "
                "pass SAEs of one width."
            )

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return f"SAESpace(layers {layers}, {self.d_sae} latents, correction {self.correction})"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have an SAE."""
        return tuple(sorted(self.saes))

    @property
    def d_sae(self) -> int:
        """Number of latents in a layer."""
        return next(iter(self.saes.values())).cfg.d_sae

    @torch.no_grad()
    def read(self, resid: Resid, layer: int) -> Features:
        """Return the latents."""
        return self.saes[layer].encode(resid.float()).float()

    @torch.no_grad()
    def reconstruct(self, resid: Resid, layer: int) -> Resid:
        """Return what the SAE makes of an activation."""
        sae = self.saes[layer]
        return sae.decode(sae.encode(resid.float())).to(resid.dtype)

    def target(self, features: Features, shift: Features, layer: int) -> Features:
        """Return the shifted latents, none below zero; a TopK keeps the latents that are on."""
        moved = (features + shift).clamp(min=0)
        return torch.where(features > 0, moved, features) if self.keeps_support(layer) else moved

    def write(self, resid: Resid, features: Features, shift: Features, layer: int) -> Resid:
        """Return the activation plus the decoded change of its latents."""
        change = self.target(features, shift, layer) - features
        touched = change.flatten(0, -2).any(0).nonzero()[:, 0]
        decoder, encoder = self._matrices[layer]
        # A probe of few latents touches few: then only their rows of the decoder are read.
        if len(touched) < change.shape[-1] // 4:
            change, decoder, encoder = change[..., touched], decoder[touched], encoder[touched]
        moved = change @ decoder
        if self.correction == "gain":
            found = (einsum(moved, encoder, "... d_model, d d_model -> ... d") * change).sum(-1)
            asked = change.square().sum(-1).clamp(min=torch.finfo(change.dtype).tiny)
            moved = moved / (found / asked).clamp(min=MIN_GAIN)[..., None]
        return (resid.float() + moved).to(resid.dtype)

    def stretch(
        self, direction: Float[Tensor, "*option d"], layer: int
    ) -> Float[Tensor, "*option"]:
        """Return the length of a direction over the length of what it decodes to."""
        decoder, _ = self._matrices[layer]
        length = (direction.to(decoder) @ decoder).norm(dim=-1).to(direction.device)
        return torch.where(length > 0, direction.norm(dim=-1) / length, 0.0)

    def decode(self, direction: Float[Tensor, "*option d"], layer: int) -> Tensor:
        """Return the direction in the residual stream that a direction of latents decodes to."""
        decoder, _ = self._matrices[layer]
        return direction.to(decoder) @ decoder

    def keeps_support(self, layer: int) -> bool:
        """Whether only latents that are on may move: the k largest are on, and no others."""
        cfg = self.saes[layer].cfg
        # A BatchTopK is saved as the JumpReLU that it amounts to, with what it was trained as.
        kinds = {cfg.architecture(), cfg.metadata.get("training_architecture")}
        return bool(kinds & {"topk", "batchtopk"})

    @cached_property
    def _matrices(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Rows, "d_sae d_model", that latents add to the stream, and along which they are read."""
        matrices = {}
        for layer, sae in self.saes.items():
            decoder, encoder = sae.W_dec.detach().float(), sae.W_enc.detach().float().T
            if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
                scale = decoder.norm(dim=-1, keepdim=True)  # such an SAE counts in unit rows
                decoder, encoder = decoder / scale, encoder * scale
            matrices[layer] = (decoder, encoder)
        return matrices
