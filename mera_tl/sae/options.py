"""What SAEs are trained with: plain values, which the command line takes as they are."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What to train, and for how long."""

    architecture: Literal["standard", "jumprelu", "topk", "batchtopk"] = "standard"
    """SAE architecture to train; a batchtopk is saved as the jumprelu that it amounts to."""
    expansion: int = 4
    """Latents per dimension of the residual stream."""
    sparsity: float = 2.0
    """Weight of the sparsity penalty, L1 for standard, L0 for jumprelu."""
    k: int = 16
    """Active latents per token, for topk and batchtopk."""
    n_steps: int = 1500
    """Training steps."""
    step_tokens: int = 1024
    """Tokens per training step."""
    max_tokens: int = 200_000
    """Most tokens to learn from; prompts are taken in order."""
    seed: int = 0
    """Random seed of the initial weights and the order of the tokens."""
