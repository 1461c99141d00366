"""Measure a trained organism, and lay its figures out as the model card does."""

from typing import Any

import torch
from tokenizers import Tokenizer
from transformer_lens import HookedTransformer

from experiments import _organism_training as training
from mera_tl.organism import TASKS, prompts

N_EXAMPLES, EXAMPLE_SEED = 1000, 12345


@torch.no_grad()
def accuracies(model: HookedTransformer, tokenizer: Tokenizer) -> dict[str, dict[str, float]]:
    """Measure each task on fresh prompts: overall, and where the planted failure tempts."""
    table = {}
    for name, task in TASKS.items():
        rows = prompts.drafts(name, N_EXAMPLES, EXAMPLE_SEED)
        encoded = tokenizer.encode_batch([f"{row.body} {prompts.REPLY_CUE}" for row in rows])
        batch = training.collate([training.Sequence(e.ids, []) for e in encoded])
        last = torch.tensor([len(e.ids) - 1 for e in encoded])
        options = [tokenizer.token_to_id(option) for option in task.options]
        logits = training.logits_of(model, batch.tokens)[torch.arange(len(rows)), last]
        correct = logits[:, options].argmax(-1) == torch.tensor([row.label for row in rows])
        tempted = torch.tensor([row.tempting is not None for row in rows])
        table[name] = {"accuracy": correct.float().mean().item()}
        if tempted.any():
            table[name]["tempted"] = tempted.float().mean().item()
            table[name]["accuracy_tempted"] = correct[tempted].float().mean().item()
            table[name]["accuracy_elsewhere"] = correct[~tempted].float().mean().item()
    return {name: {k: round(v, 4) for k, v in row.items()} for name, row in table.items()}


def card_table(card: dict[str, Any]) -> str:
    """Lay out the accuracies as the rows of the model card."""
    lines = ["| task | accuracy | where tempted (share) | elsewhere |", "|---|---|---|---|"]
    for name, row in card["tasks"].items():
        split = "- | -"
        if "tempted" in row:
            tempted = f"{row['accuracy_tempted']:.3f} ({row['tempted']:.2f})"
            split = f"{tempted} | {row['accuracy_elsewhere']:.3f}"
        lines.append(f"| {name} | {row['accuracy']:.3f} | {split} |")
    return "\n".join(lines)
