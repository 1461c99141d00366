"""How fast are steered generation and collecting activations, beside the packages people know?

The same prompts (SMS spam, as the tokenizer's chat template puts them), the same model and tokens,
batches of eight, one thread, one process: plain Hugging Face, mera_tl, steering-vectors, repeng,
nnsight, and a loop over TransformerLens's `run_with_cache`. Steering adds one vector to one layer's
output at every token; every package must generate the same tokens, and collect the same vectors.
Packages that are not installed are left out. They ask for older versions of what they share:

    python -m venv --system-site-packages others
    others/bin/pip install --no-deps steering-vectors repeng nnsight
    others/bin/pip install greenlet websocket-client zstandard gguf
    others/bin/python -m experiments.beside_other_packages --model M --data-dir D

Expected: mera_tl ahead of each package; steered generation <= 1.05 of plain Hugging Face. Each
figure is the least of `repeats`. About four minutes.
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro

import mera_tl
from experiments.speed import processor
from mera_tl import storage
from mera_tl.inference import ReadSettings
from mera_tl.steering import Additive

PACKAGES = {"steering_vectors": "steering-vectors", "repeng": "repeng", "nnsight": "nnsight"}


@dataclass(frozen=True)
class Config:
    model: str
    """A local Hugging Face folder of a chat model of the Llama family."""
    data_dir: str
    n_generate: int = 8
    n_collect: int = 24
    new_tokens: int = 16
    strength: float = 0.2
    repeats: int = 2
    out: Path = Path("experiments/results/beside_other_packages.jsonl")


class Work:
    """What every package is to do, and with what."""

    def __init__(self, config: Config) -> None:
        from transformers import AutoModelForCausalLM

        self.config = config
        self.model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
        self.mera = mera_tl.load_model(config.model, device="cpu")
        task = mera_tl.load_task("sms_spam", data_dir=config.data_dir)
        self.task = task.subset(range(config.n_collect))
        self.tokenizer = self.mera.tokenizer
        self.tokenizer.padding_side = "left"
        self.texts = [self._chat(example.prompt) for example in self.task.examples]
        self.batch = self.encode(self.texts[: config.n_generate])
        self.layer = self.mera.n_layers // 2
        activations = mera_tl.collect(self.mera, self.task, settings=self.read)
        probe = mera_tl.fit_error_probe(activations)
        rule = Additive(config.strength)
        self.steering = mera_tl.Steering(probe, layers=(self.layer,), rule=rule)
        hook = self.steering.hook(self.layer)
        self.vector = hook.rule.amount(torch.zeros(1)) * hook.step

    read = ReadSettings(readout="last", progress=False, batch_size=8)

    def _chat(self, prompt: str) -> str:
        turn = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def encode(self, texts: list[str]) -> Any:
        return self.tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)

    @property
    def options(self) -> dict[str, Any]:
        n = self.config.new_tokens  # neither more nor fewer: the same work for all
        return {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}

    @property
    def batches(self) -> list[Any]:
        return [self.encode(self.texts[i : i + 8]) for i in range(0, len(self.texts), 8)]


# --- steered generation -------------------------------------------------------------------------


def plain_generate(work: Work) -> Any:
    return work.model.generate(**work.batch, **work.options)


def mera_generate(work: Work) -> Any:
    with work.steering.attach(work.model):
        return work.model.generate(**work.batch, **work.options)


def steering_vectors_generate(work: Work) -> Any:
    from steering_vectors import SteeringVector  # pyright: ignore[reportMissingImports]

    with SteeringVector({work.layer: work.vector}).apply(work.model):
        return work.model.generate(**work.batch, **work.options)


def _let_repeng_import() -> None:
    """Give NumPy a name back that it dropped in 2.0 and repeng 0.4.0 has in its annotations."""
    import numpy as np

    if not hasattr(np, "float_"):
        np.float_ = np.float64  # pyright: ignore[reportAttributeAccessIssue]


def repeng_generate(work: Work) -> Any:
    _let_repeng_import()
    from repeng import ControlModel, ControlVector  # pyright: ignore[reportMissingImports]

    control = ControlModel(work.model, [work.layer])
    vector = ControlVector(model_type="llama", directions={work.layer: work.vector.numpy()})
    try:
        control.set_control(vector)
        return control.generate(**work.batch, **work.options)
    finally:
        control.unwrap()


def nnsight_generate(work: Work) -> Any:
    import nnsight  # pyright: ignore[reportMissingImports]

    model = nnsight.LanguageModel(work.model, tokenizer=work.tokenizer)
    n = work.config.new_tokens
    with model.generate(dict(work.batch), **work.options) as tracer:
        for _ in tracer.iter[:n]:
            model.model.layers[work.layer].output += work.vector
        tokens = tracer.result.save()
    return tokens  # noqa: RET504  it has a value once the block has ended


# --- collecting the last token of all layers ----------------------------------------------------


@torch.inference_mode()
def plain_collect(work: Work) -> Any:
    """Run the prompts and throw away all but the last token of the last layer: the floor."""
    return [work.model.model(**batch).last_hidden_state[:, -1] for batch in work.batches]


def mera_collect(work: Work) -> Any:
    return mera_tl.collect(work.mera, work.task, settings=work.read).resid()


@torch.inference_mode()
def steering_vectors_collect(work: Work) -> Any:
    from steering_vectors import record_activations  # pyright: ignore[reportMissingImports]

    found = []
    for batch in work.batches:
        with record_activations(work.model) as recorded:
            work.model(**batch, logits_to_keep=1)
        found.append(torch.stack([recorded[layer][0][:, -1] for layer in sorted(recorded)]))
    return torch.cat(found, dim=1)


def repeng_collect(work: Work) -> Any:
    _let_repeng_import()
    from repeng.extract import batched_get_hiddens  # pyright: ignore[reportMissingImports]

    layers = list(range(work.mera.n_layers - 1))  # the last of these is normalised, and left out
    found = batched_get_hiddens(work.model, work.tokenizer, work.texts, layers, 8)
    return torch.stack([torch.tensor(found[layer]) for layer in layers])


@torch.inference_mode()
def nnsight_collect(work: Work) -> Any:
    import nnsight  # pyright: ignore[reportMissingImports]

    model, found = nnsight.LanguageModel(work.model, tokenizer=work.tokenizer), []
    for batch in work.batches:
        with model.trace(dict(batch)):
            kept = nnsight.save([layer.output[:, -1] for layer in model.model.layers])
        found.append(torch.stack(list(kept)))
    return torch.cat(found, dim=1)


@torch.inference_mode()
def transformer_lens_collect(work: Work) -> Any:
    found, hooked = [], work.mera.hooked
    for batch in work.batches:
        _, cache = hooked.run_with_cache(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            names_filter=lambda name: name.endswith("hook_resid_post"),
        )
        found.append(
            torch.stack([cache["resid_post", i][:, -1] for i in range(len(hooked.blocks))])
        )
    return torch.cat(found, dim=1)


GENERATE = {
    "plain Hugging Face, unsteered": plain_generate,
    "mera_tl": mera_generate,
    "steering_vectors": steering_vectors_generate,
    "repeng": repeng_generate,
    "nnsight": nnsight_generate,
}
COLLECT = {
    "plain Hugging Face, nothing kept": plain_collect,
    "mera_tl": mera_collect,
    "steering_vectors": steering_vectors_collect,
    "repeng": repeng_collect,
    "nnsight": nnsight_collect,
    "TransformerLens run_with_cache": transformer_lens_collect,
}


def timed(work: Work, run: Callable[[Work], Any]) -> tuple[float, Any]:
    """Return the least CPU time of a few repeats, and what came out."""
    times, found = [], None
    for _ in range(work.config.repeats):
        start = time.process_time()
        found = run(work)
        times.append(time.process_time() - start)
    return min(times), found


def differs(name: str, one: Any, other: Any) -> float:
    """Return the share of tokens, or the greatest number, in which two results differ."""
    if name == "generate":
        return (one != other).double().mean().item()
    n = min(len(one), len(other))
    return (one[:n] - other[:n]).abs().max().item()


def main(config: Config) -> None:
    torch.set_num_threads(1)
    work, rows = Work(config), []
    for what, table in (("generate", GENERATE), ("collect", COLLECT)):
        base, ours = 0.0, None
        for name, run in table.items():
            if name in PACKAGES and not importlib.util.find_spec(name):
                continue
            seconds, found = timed(work, run)
            base = base or seconds
            ours = found if name == "mera_tl" else ours
            row = {"what": what, "package": name, "cpu_s": round(seconds, 2)}
            row |= {"of_hugging_face": round(seconds / base, 3)}
            if name in PACKAGES:
                row["version"] = version(PACKAGES[name])
            if ours is not None:
                row["differs"] = differs(what, found, ours)
            n = config.n_generate if what == "generate" else config.n_collect
            rows.append(row | {"n": n, "machine": processor(), "threads": 1})
            print(rows[-1], flush=True)
            storage.write_records(config.out, rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
