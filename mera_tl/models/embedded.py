"""A `HookedTransformer` checkpoint as a Hugging Face model: the organism, without TransformerLens.

Its architecture is one that Hugging Face does not have: RMS norms, learned positions, a plain MLP
with ReLU. Names and shapes of the weights are TransformerLens's, so one file serves both engines.
"""

from pathlib import Path
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mera_tl import storage

_Stream = Float[Tensor, "batch pos d_model"]
_Sees = Bool[Tensor, "batch 1 pos all"]
_WANTED = {"act_fn": "relu", "normalization_type": "RMS", "positional_embedding_type": "standard"}
_NAMES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "head_dim": "d_head",
    "intermediate_size": "d_mlp",
    "max_position_embeddings": "n_ctx",
    "vocab_size": "d_vocab",
}


class EmbeddedConfig(PreTrainedConfig):
    """The sizes of an embedded model."""

    model_type = "mera_embedded"

    @classmethod
    def read(cls, folder: Path) -> "EmbeddedConfig":
        """Read the config.json of a `HookedTransformer`.

        Raises:
            ValueError: if it is of another kind than the organism.
        """
        settings = storage.read_json(folder / "config.json")
        for name, value in _WANTED.items():
            if settings.get(name) != value:
                raise ValueError(
                    f"{folder}/config.json has {name}={settings.get(name)!r}; a HookedTransformer "
                    f"that is loaded here has {name}={value!r}."
                )
        config: Any = cls(architectures=["HookedTransformer"])
        for theirs, ours in _NAMES.items():
            setattr(config, theirs, settings[ours])
        config.eps = settings.get("eps", 1e-5)
        return config


class _Norm(nn.Module):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.w, self.eps = nn.Parameter(torch.empty(cfg.hidden_size)), cfg.eps

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        scale = (x.float().pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return (x / scale).to(x.dtype) * self.w


class _Attention(nn.Module):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        n, d, h = cfg.num_attention_heads, cfg.hidden_size, cfg.head_dim
        for name in "QKV":
            self.register_parameter(f"W_{name}", nn.Parameter(torch.empty(n, d, h)))
            self.register_parameter(f"b_{name}", nn.Parameter(torch.empty(n, h)))
        self.W_O, self.b_O = nn.Parameter(torch.empty(n, h, d)), nn.Parameter(torch.empty(d))

    def forward(self, x: _Stream, sees: _Sees, past: Any, layer: int) -> _Stream:
        q, k, v = (
            einsum(x, getattr(self, f"W_{name}"), "b pos d, n d h -> b n pos h")
            + getattr(self, f"b_{name}")[:, None]
            for name in "QKV"
        )
        if past is not None:
            k, v = past.update(k, v, layer)
        z = scaled_dot_product_attention(q, k, v, attn_mask=sees)
        return einsum(z, self.W_O, "b n pos h, n h d -> b pos d") + self.b_O


class _Mlp(nn.Module):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        d, inner = cfg.hidden_size, cfg.intermediate_size
        self.W_in, self.b_in = nn.Parameter(torch.empty(d, inner)), nn.Parameter(torch.empty(inner))
        self.W_out, self.b_out = nn.Parameter(torch.empty(inner, d)), nn.Parameter(torch.empty(d))

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return (x @ self.W_in + self.b_in).relu() @ self.W_out + self.b_out


class _Block(nn.Module):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.ln1, self.attn, self.ln2, self.mlp = _Norm(cfg), _Attention(cfg), _Norm(cfg), _Mlp(cfg)

    def forward(self, x: _Stream, sees: _Sees, past: Any, layer: int) -> _Stream:
        x = x + self.attn(self.ln1(x), sees, past, layer)
        return x + self.mlp(self.ln2(x))


class _Table(nn.Module):
    def __init__(self, name: str, n: int, width: int) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.empty(n, width)))
        self.name = name

    @property
    def weight(self) -> Tensor:
        return getattr(self, self.name)

    def forward(self, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return self.weight[ids]


class _Unembed(nn.Module):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.W_U = nn.Parameter(torch.empty(cfg.hidden_size, cfg.vocab_size))
        self.b_U = nn.Parameter(torch.empty(cfg.vocab_size))

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        return x @ self.W_U + self.b_U


class EmbeddedForCausalLM(PreTrainedModel, GenerationMixin):
    """The organism's architecture."""

    config_class = EmbeddedConfig
    main_input_name = "input_ids"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        d_model = config.hidden_size
        self.embed = _Table("W_E", config.vocab_size, d_model)
        self.pos_embed = _Table("W_pos", config.max_position_embeddings, d_model)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))
        self.ln_final, self.unembed = _Norm(config), _Unembed(config)

    def get_input_embeddings(self) -> Any:
        """Return the embedding."""
        return self.embed

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch all"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> Any:
        """Return logits as Hugging Face's models do."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        n_new = input_ids.shape[1]
        n_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        mask = attention_mask
        if mask is None:
            mask = torch.ones(len(input_ids), n_past + n_new).to(input_ids)
        if position_ids is None:
            position_ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, -n_new:]
        columns = torch.arange(n_past + n_new, device=mask.device)
        own = columns[n_past:, None]
        # A padding token sees itself: a softmax over nothing is NaN, and NaN spreads.
        sees = (columns <= own) & mask.bool()[:, None, None] | (columns == own)
        x = self.embed(input_ids) + self.pos_embed(position_ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, sees, past_key_values, layer)
        logits = self.unembed(self.ln_final(x[:, -logits_to_keep:]))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
