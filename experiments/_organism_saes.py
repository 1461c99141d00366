"""Train sparse autoencoders on the organism's residual stream, with sae-lens and offline."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from tokenizers import Tokenizer
from torch import Tensor
from transformer_lens import HookedTransformer

from experiments import _organism_training as training
from mera_tl.organism import TASKS, generate

LAYERS = (1, 2)
D_SAE, L1_COEFFICIENT, BATCH, N_STEPS = 384, 4.0, 1024, 1200


def train_all(model: HookedTransformer, tokenizer: Tokenizer, out: Path) -> dict[str, dict]:
    """Train and save one SAE a layer; return what each explains and how sparsely."""
    return {str(layer): _train(model, tokenizer, layer, out / f"layer_{layer}") for layer in LAYERS}


def _train(model: HookedTransformer, tokenizer: Tokenizer, layer: int, folder: Path) -> dict:
    torch.manual_seed(layer)
    rng = random.Random(f"saes/{layer}")
    texts = [training.training_texts(training.PLANTED, rng)[0] for _ in range(6000)]
    resid = _resid_post(model, tokenizer, layer, texts)
    config = StandardTrainingSAEConfig(
        d_in=model.cfg.d_model, d_sae=D_SAE, l1_coefficient=L1_COEFFICIENT
    )
    config.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    config.metadata.model_name = "organism"
    config.metadata.prepend_bos = True
    sae = StandardTrainingSAE(config)
    trainer_config = SAETrainerConfig(
        total_training_samples=BATCH * N_STEPS,
        train_batch_size_samples=BATCH,
        lr=3e-3,
        lr_end=3e-4,
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(cfg=trainer_config, sae=sae, data_provider=_shuffled(resid)).fit()
    sae.save_inference_model(folder)
    rows = [row for name in TASKS for row in generate(name, 200, seed=54321)]
    fresh = _resid_post(model, tokenizer, layer, [row.prompt for row in rows])
    return _quality(SAE.load_from_disk(folder), fresh)


def _shuffled(
    resid: Float[Tensor, "token d_model"],
) -> Iterator[Float[Tensor, "batch d_model"]]:
    while True:
        yield from resid[torch.randperm(len(resid))].split(BATCH)[:-1]


@torch.no_grad()
def _resid_post(
    model: HookedTransformer, tokenizer: Tokenizer, layer: int, texts: list[str]
) -> Float[Tensor, "token d_model"]:
    """Collect every token but <bos>, whose activation never varies."""
    name = f"blocks.{layer}.hook_resid_post"
    rows = []
    for start in range(0, len(texts), 500):
        encoded = [e.ids for e in tokenizer.encode_batch(texts[start : start + 500])]
        tokens = training.collate([training.Sequence(ids, []) for ids in encoded]).tokens
        _, cache = model.run_with_cache(tokens, names_filter=name, stop_at_layer=layer + 1)
        is_word = (tokens != 0) & (tokens != 1)
        rows.append(cache[name][is_word])
    return torch.cat(rows)


@torch.no_grad()
def _quality(sae: SAE, resid: Float[Tensor, "token d_model"]) -> dict[str, float]:
    latents = sae.encode(resid)
    residue = (resid - sae.decode(latents)).square().sum()
    total = (resid - resid.mean(0)).square().sum()
    return {
        "explained_variance": round(1 - (residue / total).item(), 4),
        "l0": round((latents > 0).float().sum(-1).mean().item(), 2),
        "dead": round((latents <= 0).all(0).float().mean().item(), 4),
        "n_tokens": len(resid),
    }
