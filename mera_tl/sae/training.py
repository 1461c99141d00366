"""Train sparse autoencoders on what a model makes of a task, with sae-lens and offline.

An SAE sees every token of the training prompts but the BOS, whose activation never varies. Inputs
are scaled to a norm of sqrt(d_model) on average while training; the scale is folded back, so that
latents are read from raw activations.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mera_tl import storage
from mera_tl.inference.answers import ReadSettings
from mera_tl.inference.decoding import left_pad
from mera_tl.inference.evaluation import run_batches, tokenize_task
from mera_tl.models.model import Model, resid_post
from mera_tl.sae.loading import Layers, require_sae_lens, starts_with_bos
from mera_tl.sae.options import TrainOptions
from mera_tl.tasks.task import Task


def train_saes(
    model: Model,
    task: Task[Any],
    layers: Layers,
    out: str | Path,
    *,
    options: TrainOptions | None = None,
    settings: ReadSettings | None = None,
) -> list[Path]:
    """Train one SAE per layer; write each into `out/layer_{l}`, where `load_saes` finds them.

    Raises:
        ValueError: if sae-lens is not installed, a layer is not there, a prompt is too long, or
            there are fewer tokens than in one step.
    """
    require_sae_lens()
    options, settings = options or TrainOptions(), settings or ReadSettings()
    layers = layers if isinstance(layers, tuple) else tuple(range(model.n_layers))
    wrong = [layer for layer in layers if not 0 <= layer < model.n_layers]
    if wrong or not layers:
        raise ValueError(
            f"layers={layers} but {model.name} has {model.n_layers} layers, numbered 0 to "
            f"{model.n_layers - 1}; choose among them."
        )
    storage.require_folder(storage.path_of(out))
    prompts = tokenize_task(model, task, settings)
    paths = []
    for layer in layers:
        resid = _read_tokens(model, prompts, layer, options, settings)
        if len(resid) < options.step_tokens:
            raise ValueError(
                f"{task.name} has {len(resid)} tokens to learn from, fewer than one step of "
                f"{options.step_tokens}; pass more examples."
            )
        path = Path(out) / f"layer_{layer}"
        # A copy: the trainer takes a generator of its own from the global one.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed * 1000 + layer)
            sae = _train(model, resid, layer, options)
        _save(sae, path)
        paths.append(path)
    return paths


def _save(sae: Any, path: Path) -> None:
    """Write an SAE whole or not at all, in the place of an earlier one."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".", suffix=".tmp") as scratch:
        sae.save_inference_model(scratch)
        storage.reopen(path / "cfg.json")
        storage.link(Path(scratch), path, "cfg.json")


def hold_out(task: Task[Any]) -> tuple[Task[Any], Task[Any]]:
    """Return the examples to train on, and the last tenth to judge by."""
    n = len(task) - max(1, len(task) // 10)
    return task.subset(range(n)), task.subset(range(n, len(task)))


@torch.no_grad()
def _read_tokens(
    model: Model,
    prompts: Sequence[Sequence[int]],
    layer: int,
    options: TrainOptions,
    settings: ReadSettings,
) -> Float[Tensor, "token d_model"]:
    n_tokens, chosen = 0, []
    for prompt in prompts:
        if n_tokens >= options.max_tokens:
            break
        chosen.append(list(prompt))
        n_tokens += len(prompt)
    has_bos = starts_with_bos(model)

    def run(batch: list[int]) -> Float[Tensor, "some d_model"]:
        tokens, mask = left_pad([chosen[i] for i in batch], model.device)
        resid: Any = model.hooked(tokens, attention_mask=mask, stop_at_layer=layer + 1)
        words = mask.bool() & ~((mask.cumsum(-1) == 1) & has_bos)
        return resid[words].float()

    return torch.cat([rows for _, rows in run_batches(chosen, run, settings, f"layer {layer}")])


def _train(
    model: Model, resid: Float[Tensor, "token d_model"], layer: int, options: TrainOptions
) -> Any:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = _new_sae(model, layer, options)
    config = SAETrainerConfig(
        total_training_samples=options.step_tokens * options.n_steps,
        train_batch_size_samples=options.step_tokens,
        lr=3e-3,
        lr_end=3e-4,
        lr_scheduler_name="cosineannealing",
        device=str(model.device),
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=10,
    )
    return SAETrainer(
        cfg=config, sae=sae, data_provider=_shuffled(resid, options.step_tokens)
    ).fit()


def _new_sae(model: Model, layer: int, options: TrainOptions) -> Any:
    sae_lens = require_sae_lens()
    name, own = {
        "standard": ("Standard", {"l1_coefficient": options.sparsity}),
        "jumprelu": ("JumpReLU", {"l0_coefficient": options.sparsity}),
        "topk": ("TopK", {"k": options.k}),
        "batchtopk": ("BatchTopK", {"k": options.k}),
    }[options.architecture]
    sae_class = getattr(sae_lens, f"{name}TrainingSAE")
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=model.d_model,
        d_sae=options.expansion * model.d_model,
        normalize_activations="expected_average_only_in",
        device=str(model.device),
        **own,
    )
    config.metadata.hook_name = resid_post(layer)
    config.metadata.model_name = model.name
    config.metadata.model_fingerprint = model.fingerprint
    config.metadata.prepend_bos = starts_with_bos(model)
    return sae_class(config)


def _shuffled(
    resid: Float[Tensor, "token d_model"], batch: int
) -> Iterator[Float[Tensor, "batch d_model"]]:
    while True:
        order = torch.randperm(len(resid))
        for start in range(0, len(resid) - batch + 1, batch):
            yield resid[order[start : start + batch]]
