"""Where a probe reads and a rule writes: the residual stream itself, or another set of features.

A space turns `resid_post` into features and writes a shift of features back. `ResidualSpace` is
the identity.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor


class Space(ABC):
    """Features of one layer's residual stream."""

    name: str

    @abstractmethod
    def read(self, resid: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows d"]:
        """Return the features of an activation, in float32."""

    @abstractmethod
    def write(
        self,
        resid: Float[Tensor, "*rows d_model"],
        features: Float[Tensor, "*rows d"],
        shift: Float[Tensor, "*rows d"],
        layer: int,
    ) -> Float[Tensor, "*rows d_model"]:
        """Return the activation whose features have moved by `shift`, in the dtype of `resid`."""


@final
@dataclass(frozen=True)
class ResidualSpace(Space):
    """The residual stream as it is."""

    name = "raw"

    def read(self, resid: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows d"]:  # noqa: ARG002
        """Return the activation in float32."""
        return resid.float()

    def write(
        self,
        resid: Float[Tensor, "*rows d_model"],
        features: Float[Tensor, "*rows d"],
        shift: Float[Tensor, "*rows d"],
        layer: int,  # noqa: ARG002  the same in every layer
    ) -> Float[Tensor, "*rows d_model"]:
        """Return the shifted activation, cast once at the end."""
        # A float32 shift added to a bfloat16 stream would promote everything after it.
        return (features + shift).to(resid.dtype)
