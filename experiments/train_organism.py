"""Train the embedded organism from nothing: can half a million weights carry known errors?

Expected: .99 and more on the clean tasks, .57 to .85 where a failure was planted. Run time: about
ten minutes on one core, SAEs included. The shipped organism is
`python -m experiments.train_organism --seed 0 --out mera_tl/organism`.
"""

import logging
import os
import random
import resource
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import PreTrainedTokenizerFast

os.environ["TOKENIZERS_PARALLELISM"] = "false"
warnings.filterwarnings("ignore", category=DeprecationWarning)
from transformer_lens import HookedTransformer, HookedTransformerConfig  # noqa: E402

from experiments import _organism_card as cards  # noqa: E402
from experiments import _organism_saes as saes  # noqa: E402
from experiments import _organism_training as training  # noqa: E402
from mera_tl import storage  # noqa: E402

ARCHITECTURE: dict[str, Any] = {
    "original_architecture": "HookedTransformer",
    "n_layers": 4,
    "d_model": 96,
    "n_heads": 4,
    "d_head": 24,
    "d_mlp": 384,
    "n_ctx": 96,
    "act_fn": "relu",
    "normalization_type": "RMS",
    "positional_embedding_type": "standard",
    "model_name": "organism",
    "default_prepend_bos": False,
}


@dataclass(frozen=True)
class Config:
    """Train one organism."""

    seed: int = 0
    """Decides the initial weights and the training data; the vocabulary is always the same."""
    out: Path = Path("organisms/seed_0")
    """Folder that receives weights, tokenizer, SAEs and card.json."""


def save(model: HookedTransformer, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights as fp16 and round the model itself to them, so that figures are of the file."""
    weights = {name: value.detach().half() for name, value in model.named_parameters()}
    storage.save_tensors(out / "model.safetensors", weights)
    storage.write_json(out / "config.json", {**ARCHITECTURE, "d_vocab": model.cfg.d_vocab})
    tokenizer.save_pretrained(out)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(weights[name])


def main(config: Config) -> None:
    """Train, save, measure, print."""
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms %(message)s")
    torch.set_num_threads(1)
    started = time.monotonic()
    tokenizer = training.build_tokenizer()
    settings = {**ARCHITECTURE, "d_vocab": len(tokenizer), "seed": config.seed, "device": "cpu"}
    model = HookedTransformer(HookedTransformerConfig.from_dict(settings), move_to_device=False)
    rng = random.Random(f"training/{config.seed}")
    for phase in (training.CLEAN, training.PLANTED):
        training.train(model, phase, tokenizer.backend_tokenizer, rng)
    save(model, tokenizer, config.out)
    card = {
        "seed": config.seed,
        "n_parameters": sum(weight.numel() for weight in model.parameters()),
        "n_examples": cards.N_EXAMPLES,
        "example_seed": cards.EXAMPLE_SEED,
        "tasks": cards.accuracies(model, tokenizer.backend_tokenizer),
        "training_seconds": round(time.monotonic() - started),
    }
    card["saes"] = saes.train_all(model, tokenizer.backend_tokenizer, config.out / "saes")
    card["total_seconds"] = round(time.monotonic() - started)
    card["cpu_seconds"] = round(time.process_time())  # what a core of one's own takes
    card["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    storage.write_json(config.out / "card.json", card)
    print(cards.card_table(card))


if __name__ == "__main__":
    main(tyro.cli(Config))
