"""What do the main jobs cost on a GPU, at the sizes people use? One command, random weights.

    python -m experiments.gpu_table

Models of the size of Llama-3.2-1B, Qwen2.5-3B and Gemma-2-2B with random weights, so that nothing
is downloaded, and SmolLM2 itself if its folder is given. For each: tokens/s of collecting, steered
and unsteered generation against plain Hugging Face (sdpa) at batch 64, a search, probe fits, peak
memory. Without a GPU it says so and runs the same on a tiny model, which shows only that it runs.

Expected: collecting >= .9 of the tokens/s of a plain forward pass; steered generation <= 1.05 of
unsteered; under eight minutes in all. Wall seconds, the device synchronised around each.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

import mera_tl
from mera_tl import storage
from mera_tl.inference import ReadSettings, tokenize_task
from mera_tl.methods import search
from mera_tl.organism import FOLDER as ORGANISM

SIZES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "kind": "Llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "Qwen2.5-3B": {
        "kind": "Qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
    },
    "Gemma-2-2B": {
        "kind": "Gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
    },
}  # fmt: skip
TINY: dict[str, Any] = {
    "kind": "Llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    smollm2: str | None = None
    """Local Hugging Face folder; left out if not given."""
    n: int = 2000
    """Prompts that are collected; a tenth of them on a CPU."""
    batch: int = 64
    new_tokens: int = 64
    batch_tokens: int = 32768
    dtype: str = "bfloat16"
    out: Path = Path("experiments/results/gpu_table.jsonl")


def write_random(folder: Path, shape: dict[str, Any], dtype: str, device: str) -> None:
    """Write a checkpoint of this shape with random weights."""
    import transformers

    shape = dict(shape)
    kind = shape.pop("kind")
    config = getattr(transformers, f"{kind}Config")(
        **shape, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    # The organism's tokenizer is at hand; its ids are within every vocabulary.
    transformers.AutoTokenizer.from_pretrained(ORGANISM).save_pretrained(folder)


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of some work, once warm."""
    work()
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(folder: str, config: Config, dtype: Any, n: int) -> Iterator[dict[str, Any]]:
    model = mera_tl.load_model(folder, dtype=dtype)
    whole = mera_tl.load_task("spam_cue")
    read: Any = ReadSettings(batch_tokens=config.batch_tokens, progress=False)
    task = whole.subset([i % len(whole) for i in range(n)])
    prompts = tokenize_task(model, task, read)
    n_tokens = sum(map(len, prompts))
    collecting = seconds(lambda: mera_tl.collect(model, task, settings=read))
    yield {"what": "collect", "n": n, "s": collecting, "tokens_per_s": n_tokens / collecting}
    activations = mera_tl.collect(model, task, settings=read)
    fitting = seconds(lambda: mera_tl.fit_error_probe(activations))
    yield {"what": "ridge probes of all layers", "n": n, "s": fitting}
    train = whole.split(0, train=min(300, n), calibration=50, test=50).train
    yield {"what": "search", "n": len(train), "s": seconds(lambda: search(model, train))}
    steering = mera_tl.Steering(mera_tl.fit_error_probe(activations)).at(0.5)
    yield from generating(folder, steering, prompts[: config.batch], config, dtype)


def generating(
    folder: str,
    steering: mera_tl.Steering,
    prompts: list[list[int]],
    config: Config,
    dtype: str,
) -> Iterator[dict[str, Any]]:
    """Generate the same number of tokens with plain Hugging Face, and with it steered."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    original = original.to(device).eval()
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    options = {"max_new_tokens": config.new_tokens, "min_new_tokens": config.new_tokens}

    def generate() -> None:
        original.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **options)

    def steered() -> None:
        with steering.attach(original):
            generate()

    plain = seconds(generate)
    yield {"what": "generate, plain Hugging Face", "n": len(prompts), "s": plain}
    took = seconds(steered)
    yield {"what": "generate, steered", "n": len(prompts), "s": took, "of_plain": took / plain}


def main(config: Config) -> None:
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    machine = torch.cuda.get_device_name() if on_gpu else "no GPU: a tiny model on a CPU"
    print(machine, flush=True)
    shapes = SIZES if on_gpu else {"tiny": TINY}
    dtype, n = (config.dtype, config.n) if on_gpu else ("float32", config.n // 10)
    rows = []
    for name in [*shapes, *([config.smollm2] if config.smollm2 else [])]:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(name)
            if name in shapes:
                folder = Path(temporary) / name
                write_random(folder, shapes[name], dtype, device)
            for row in measured(str(folder), config, dtype, n):
                peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
                about = {"model": folder.name, "machine": machine, "peak_gib": round(peak, 2)}
                rows.append(about | row)
                print(rows[-1], flush=True)
                storage.write_records(config.out, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
