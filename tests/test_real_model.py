"""What is carried to a real chat model, where one is at hand: SmolLM2, as the wheels have it."""

import os
from pathlib import Path

import pytest
import torch
from conftest import padded, random_probe

from mera_tl import Additive, Steering, evaluate, generate, load_model
from mera_tl.inference import ReadSettings
from mera_tl.models import cache_folder
from mera_tl.tasks import Example, Task

FOLDER = Path(os.environ.get("MERA_SMOLLM2") or cache_folder() / "real_models" / "smollm2")
if not (FOLDER / "config.json").is_file():
    pytest.skip(
        "SmolLM2 is not here: `python -m experiments.fetch_models` fetches it, or MERA_SMOLLM2 "
        "names its folder",
        allow_module_level=True,
    )
TEXTS = ("Win a prize now, call 0800!", "See you at nine?", "Are you home yet, or still at work?")
N_NEW = 4


@pytest.fixture(scope="module")
def model():
    return load_model(str(FOLDER), device="cpu")


@pytest.fixture(scope="module")
def original():
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    loaded.generation_config.eos_token_id = None
    return loaded


@pytest.fixture(scope="module")
def steering(model):
    """One that moves most tokens in two layers, far enough to change what is said."""
    return Steering(random_probe(model), rule=Additive(8.0), layers=(9, 20), positions="last")


@pytest.fixture(scope="module")
def task():
    prompts = [f"Is this message spam or ham? {text}" for text in TEXTS]
    options = ("ham", "spam")
    examples = [Example(i, p, options, int(i == 0)) for i, p in enumerate(prompts)]
    return Task("three", tuple(examples), "all")


def greedy(original, model, prompts, **options) -> list[list[int]]:
    ids, mask = padded(prompts)
    plain = {"max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": 0}
    out = original.generate(ids, attention_mask=mask, **plain, **options)
    return out[:, ids.shape[1] :].tolist()


def test_generate_of_transformers_says_what_ours_does_in_any_batch(model, original, steering, task):
    prompts = model.tokenize([example.prompt for example in task.examples])
    unsteered = greedy(original, model, prompts)
    with steering.attach(original) as attached:
        together = greedy(original, model, prompts)
        assert attached.n_calls == 2 * N_NEW  # two layers, the prompt and the tokens fed back
        assert [greedy(original, model, [p])[0] for p in prompts] == together
        assert greedy(original, model, prompts[:1], use_cache=False)[0] == together[0]
    assert together != unsteered == greedy(original, model, prompts)
    texts = [example.prompt for example in task.examples]
    replies = generate(model, texts, steering, max_new_tokens=N_NEW)
    for reply, tokens in zip(replies, together, strict=True):
        assert reply.text == model.tokenizer.decode(
            tokens[: len(reply.tokens)], skip_special_tokens=True
        )


def test_answers_do_not_depend_on_the_batch(model, steering, task):
    runs = [
        evaluate(model, task, steering.fwd_hooks(), settings=ReadSettings(batch_size=n))
        for n in (1, 3)
    ]
    torch.testing.assert_close(runs[0].probs, runs[1].probs, atol=1e-4, rtol=0)
    plain = evaluate(model, task)
    assert (plain.probs - runs[0].probs).abs().max() > 1e-3


def test_the_harness_reads_it_alike_in_any_batch(model, steering):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from mera_tl.evals import SteeredLM

    asked = [Instance("loglikelihood", {}, (text, " home"), i) for i, text in enumerate(TEXTS)]
    values = [
        SteeredLM(model, steering, settings=ReadSettings(batch_size=n))
        .loglikelihood(asked, disable_tqdm=True)
        for n in (1, 3)
    ]  # fmt: skip
    for (one, _), (batched, _) in zip(*values, strict=True):
        assert one == pytest.approx(batched, abs=1e-4)
