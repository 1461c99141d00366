"""The embedded organism: its tasks keep apart from training, and its files keep the card's word."""

import random
import re
import sys
import time
from pathlib import Path

import conftest
import pytest
import torch

from mera_tl.inference import evaluate
from mera_tl.models import load_model
from mera_tl.organism import FOLDER, TASKS, generate, prompts
from mera_tl.storage import read_json
from mera_tl.tasks import Example, Task

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments import _organism_training as training  # noqa: E402
from experiments._organism_card import card_table  # noqa: E402

CARD = read_json(FOLDER / "card.json")
FIXABLE = [name for name, task in TASKS.items() if "; two-sided" in task.failure] + [
    "yesno_bias",
    "spam_cue",
    "sentiment_fan",
]


@pytest.fixture(scope="module")
def organism():
    return conftest.organism()


def as_task(name: str, n: int, seed: int) -> Task:
    rows = generate(name, n, seed)
    options = TASKS[name].options
    examples = [Example(i, row.prompt, options, row.label) for i, row in enumerate(rows)]
    return Task(name, tuple(examples), "all")


# --- prompts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_a_pure_function_of_its_seed(name):
    rows = generate(name, 1000, seed=3)
    assert generate(name, 500, seed=3) == rows[:500]
    assert generate(name, 500, seed=4) != rows[:500]
    texts = [row.prompt for row in rows]
    assert len({" ".join(text.casefold().split()) for text in texts}) == 1000
    assert all(text.endswith(prompts.REPLY_CUE) for text in texts)
    assert {row.label for row in rows} == set(range(len(TASKS[name].options)))


def test_prompts_do_not_depend_on_the_process():
    code = "from mera_tl.organism import generate; print(generate('spam_hint', 3, 0))"
    fresh = conftest.python(code, cwd=FOLDER)
    assert fresh.stdout.strip() == str(generate("spam_hint", 3, 0))


def test_no_question_of_a_task_occurs_in_training():
    asked = {row.question for name in TASKS for row in prompts.drafts(name, 500, seed=0)}
    rng = random.Random(0)
    trained = {
        training.training_draft(phase, rng)[1].question
        for phase in (training.CLEAN, training.PLANTED)
        for _ in range(3000)
    }
    assert len(trained) > 2000 and not asked & trained
    # The control: two samples of the same world do meet, so the worlds could have met as well.
    again = {row.question for name in TASKS for row in prompts.drafts(name, 500, seed=1)}
    assert asked & again


def test_a_noisy_label_is_noise_and_a_temptation_is_wrong():
    noisy = prompts.drafts("sentiment_noise", 2000, 0)
    clean = prompts.drafts("sentiment_clean", 500, 0)
    for name in TASKS:
        assert all(row.tempting != row.label for row in prompts.drafts(name, 300, 0))
    agreement = sum(row.label == majority(row.question) for row in noisy) / len(noisy)
    assert all(row.label == majority(row.question) for row in clean)
    assert agreement == pytest.approx(1 - prompts.NOISE_RATE, abs=0.03)


def majority(review: str) -> int:
    """Judge a review with a rule of our own: count good and bad words, "not" turning them over."""
    from mera_tl.organism import phrases

    total, words = 0, re.findall(r"\w+", review)
    for before, word in zip(["", *words], words, strict=False):
        polarity = (word in phrases.ADJECTIVES[1]) - (word in phrases.ADJECTIVES[-1])
        total += -polarity if before == "not" else polarity
    return 1 - ((total > 0) - (total < 0))


def test_an_unknown_task_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="spam_hint"):
        generate("spam", 1, 0)


# --- files ------------------------------------------------------------------------------------


def test_the_files_are_small():
    def size(*paths: Path) -> float:
        return sum(path.stat().st_size for path in paths) / 2**20

    tokenizer = [FOLDER / "tokenizer.json", FOLDER / "tokenizer_config.json"]
    assert size(FOLDER / "model.safetensors", FOLDER / "config.json", *tokenizer) <= 8
    assert size(*(path for path in (FOLDER / "saes").rglob("*") if path.is_file())) <= 8


def test_it_loads_quickly(organism):
    started = time.process_time()  # a busy machine does not count
    again = load_model("organism", device="cpu")
    assert time.process_time() - started < 2
    assert again.fingerprint == organism.fingerprint


def test_the_tokenizer_knows_every_word_of_the_tasks(organism):
    unk = organism.tokenizer.unk_token_id
    rows = [row for name in TASKS for row in generate(name, 400, seed=9)]
    longest = 0
    for ids in organism.tokenize([f"{row.prompt} {prompts.INSTRUCTION}" for row in rows]):
        assert ids[0] == organism.tokenizer.bos_token_id and unk not in ids
        longest = max(longest, len(ids))
    assert longest <= organism.n_ctx - 16, "no room is left to reply"
    assert unk in organism.tokenize(["zebra"])[0]


def test_every_option_is_one_token(organism):
    for name in TASKS:
        for option in TASKS[name].options:
            ids = organism.tokenizer(f" {option}", add_special_tokens=False)["input_ids"]
            assert len(ids) == 1 and ids[0] != organism.tokenizer.unk_token_id


def test_the_fast_forward_pass_of_training_is_the_model(organism):
    rows = [row.prompt for name in TASKS for row in generate(name, 3, seed=2)]
    sequences = [training.Sequence(ids, []) for ids in organism.tokenize(rows)]
    tokens = training.collate(sequences).tokens
    mask = (tokens != organism.tokenizer.pad_token_id).int()
    with torch.no_grad():
        expected = organism.hooked(tokens, attention_mask=mask)
        actual = training.logits_of(organism.hooked, tokens)
    is_word = mask.bool()
    assert torch.allclose(actual[is_word], expected[is_word], atol=1e-4)


# --- what the card says -----------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_the_shipped_weights_have_the_accuracies_of_the_card(organism, name):
    said = CARD["tasks"][name]["accuracy"]
    task = as_task(name, CARD["n_examples"], CARD["example_seed"])
    assert evaluate(organism, task).accuracy == pytest.approx(said, abs=0.01)


def test_the_card_shows_what_was_planted():
    tasks = CARD["tasks"]
    for name in ("spam_clean", "yesno_clean", "sentiment_clean", "choice_clean"):
        assert tasks[name]["accuracy"] >= 0.99
    for name in FIXABLE:
        assert 0.57 <= tasks[name]["accuracy"] <= 0.85
        assert tasks[name]["accuracy_elsewhere"] > tasks[name]["accuracy_tempted"] + 0.25
    assert card_table(CARD) in (FOLDER / "CARD.md").read_text()


def test_the_organism_replies_in_a_sentence_when_asked(organism):
    rows = [row.prompt for row in generate("spam_clean", 20, seed=0)]
    asked = [row.removesuffix(prompts.REPLY_CUE) + training.SENTENCE_CUE for row in rows]
    for ids in organism.tokenize(asked):
        logits = organism.hooked(torch.tensor([ids]))[0, -1]
        assert organism.tokenizer.decode(logits.argmax()) == "I"


@pytest.mark.parametrize("layer", CARD["saes"])
def test_an_sae_explains_what_the_card_says(organism, layer):
    sae_lens = pytest.importorskip("sae_lens", reason="the SAEs need the extra `sae`")
    sae = sae_lens.SAE.load_from_disk(FOLDER / "saes" / f"layer_{layer}")
    hook_name = sae.cfg.metadata.hook_name
    assert hook_name == f"blocks.{layer}.hook_resid_post"
    rows = []
    for ids in organism.tokenize([row.prompt for row in generate("spam_hint", 100, seed=5)]):
        _, cache = organism.hooked.run_with_cache(torch.tensor([ids]), names_filter=hook_name)
        rows.append(cache[hook_name][0, 1:])
    resid = torch.cat(rows)
    with torch.no_grad():
        residue = (resid - sae.decode(sae.encode(resid))).square().sum()
    explained = 1 - residue / (resid - resid.mean(0)).square().sum()
    assert explained > CARD["saes"][layer]["explained_variance"] - 0.05
