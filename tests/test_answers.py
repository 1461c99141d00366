"""Readouts: each checked by slow and plain code, prompt by prompt, without a cache."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, SHARED, make_task, original, random_probe, talking_task
from jaxtyping import TypeCheckError

from mera_tl.inference import (
    Activations,
    Decoding,
    ReadSettings,
    answered_option,
    collect,
    evaluate,
    hooked_pass,
    is_no_answer,
    is_over,
    multiple_choice,
    option_tokens,
)
from mera_tl.models import Model, load_model, resid_post
from mera_tl.steering import Steering
from mera_tl.tasks import Example, Task

EXACT = ReadSettings("exact")
cached_task = cache(talking_task)


@pytest.fixture(scope="module")
def originals(checkpoints):
    torch.set_grad_enabled(False)
    yield {family: original(path) for family, path in checkpoints.items()}
    torch.set_grad_enabled(True)


# --- options: whole continuations -------------------------------------------------------------

PAIRS = {
    "single tokens": ("yes", "no"),
    "a shared first token": ("good film", "good bird"),
    "unequal lengths": ("red film", "very good film", "blue bird"),
}


def summed_by_hand(theirs, tokenizer, prompt: list[int], option: str) -> float:
    """Sum P(variant | prompt) over an option's variants with the original model, no cache."""
    forms = {option, option.lower(), option.upper(), option.capitalize()}
    texts = [space + form for form in forms for space in ("", " ")]
    total = 0.0
    for ids in {tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts}:
        if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids:
            logits = theirs(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            logs = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
            total += logs.sum().exp().item()
    return total


@pytest.mark.parametrize("options", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("family", FAMILIES)
def test_options_are_scored_as_hugging_face_scores_them(family, options, models, originals):
    model, task = models[family], make_task(10, options=options)
    together = evaluate(model, task)
    alone = evaluate(model, task, settings=ReadSettings(batch_size=1))
    assert (together.probs - alone.probs).abs().max() < 1e-5
    for i, example in enumerate(task.examples):
        prompt = model.tokenize([example.prompt])[0]
        sums = [summed_by_hand(originals[family], model.tokenizer, prompt, o) for o in options]
        assert (together.probs[i] - torch.tensor(sums) / sum(sums)).abs().max() < 1e-5
        assert together.predictions[i] == max(range(len(sums)), key=sums.__getitem__)
    assert together.answered.all() and together.probs.std(0).max() > 1e-3  # control: they differ


def test_variants_of_unequal_length_are_added_up(models, originals):
    model = models["llama"]
    prompt = model.tokenize(["yes no"])[0]
    with torch.inference_mode(), hooked_pass(model, ()):
        decoding = Decoding(model, [prompt], ())
        logits = decoding.prompt()
        variants = (((5,), (7, 8)), ((6,),))
        found = multiple_choice.option_log_probs(decoding, logits, variants, batch_tokens=100)

    def by_hand(*ids: int) -> float:
        logits = originals["llama"](torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().exp().item()

    wanted = [by_hand(5) + by_hand(7, 8), by_hand(6)]
    assert found.exp()[0].tolist() == pytest.approx(wanted, rel=1e-4)


def test_a_branch_is_not_run_where_it_cannot_change_the_likeliest_option(models, monkeypatch):
    model, fed, real = models["llama"], [], Decoding.next

    def counted(decoding, tokens):
        fed.append(len(tokens))
        return real(decoding, tokens)

    monkeypatch.setattr(Decoding, "next", counted)
    prompts = model.tokenize([example.prompt for example in make_task(60).examples])
    variants = (((7,), *((8, token) for token in range(64))), ((9,), (10, 11)))
    with torch.inference_mode(), hooked_pass(model, ()):
        decoding = Decoding(model, prompts, ())
        logits = decoding.prompt()
        whole, decided = (
            multiple_choice.option_log_probs(
                decoding, logits, variants, batch_tokens=500, decide=decide
            )
            for decide in (False, True)
        )
    assert fed[0] == 2 * len(prompts) and 0 < sum(fed[1:]) < fed[0]
    assert torch.equal(whole.argmax(-1), decided.argmax(-1))
    # Controls: both options are answers, and a branch decides some of them.
    single = logits[:, [7, 9]].argmax(-1)
    assert 0 < whole.argmax(-1).sum() < len(prompts) and (single != whole.argmax(-1)).any()


@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="sms-llama is not at hand")
def test_a_real_tokenizer_splits_variants_and_a_prompt_may_end_in_a_space():
    path = SHARED / "models" / "sms-llama"
    model, theirs = load_model(str(path)), original(path)
    for ending in ("Answer:", "Answer:\n "):
        texts = [
            f'This SMS: "{t}" is spam or ham? {ending}' for t in ("Win a prize!", "see u", "ok")
        ]
        examples = [Example(i, text, ("spam", "ham"), 0) for i, text in enumerate(texts)]
        task = Task("sms", tuple(examples), "all")
        lengths = {
            len(ids) for o in option_tokens(model, task, ReadSettings()).continuations for ids in o
        }
        assert lengths == {1, 2, 3}
        run = evaluate(model, task)
        for i, text in enumerate(texts):
            prompt = model.tokenize([text])[0]
            with torch.inference_mode():
                sums = [summed_by_hand(theirs, model.tokenizer, prompt, o) for o in task.options]
            assert (run.probs[i] - torch.tensor(sums) / sum(sums)).abs().max() < 2e-5


def n_passes(model: Model, task) -> int:
    calls = []
    evaluate(model, task, [(resid_post(0), lambda x, hook: calls.append(x.shape))])
    return len(calls)


def test_options_of_one_token_cost_no_further_pass_and_each_prefix_is_fed_once(models):
    model = models["llama"]
    passes = {name: n_passes(model, make_task(4, options=o)) for name, o in PAIRS.items()}
    assert passes == {"single tokens": 1, "a shared first token": 2, "unequal lengths": 3}


def test_what_hooks_do_to_option_tokens_counts_for_their_prompt(models):
    model, task = models["llama"], make_task(6, options=PAIRS["unequal lengths"])
    steering = Steering(random_probe(model), positions="generated").at(0.4)
    run = evaluate(model, task, steering.fwd_hooks())
    plain = evaluate(model, task)
    assert run.n_steered.sum() > 0 and (run.probs - plain.probs).abs().max() > 1e-3
    # Three prefixes of one token and one of two, in every layer.
    assert (run.n_steerable == 4 * model.n_layers).all()
    unreached = run.max_score <= 0
    assert torch.allclose(run.probs[unreached], plain.probs[unreached], atol=1e-6)


def test_options_that_share_a_variant_keep_their_own_spelling(models):
    model = models["gpt2"]
    task = make_task(4, options=("a", "A"))
    with pytest.raises(ValueError, match="'A' is not in the vocabulary"):
        option_tokens(model, task, ReadSettings())
    with pytest.raises(ValueError, match="cannot be told apart"):
        option_tokens(model, make_task(4, options=("red bird", "red  bird")), ReadSettings())


# --- replies ------------------------------------------------------------------------------------

REPLIES = [
    json.loads(line) for line in (Path(__file__).parent / "replies.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize("case", REPLIES, ids=lambda case: repr(case["reply"]))
def test_a_reply_is_an_answer_only_if_it_begins_with_the_option(case):
    said = answered_option(case["reply"], case["options"])
    assert (case["options"][said] if said >= 0 else None) == case["answer"], case["why"]


def test_a_reply_that_is_over_says_the_same_when_it_goes_on():
    stopped = 0
    for case in REPLIES:
        starts = [
            case["reply"][:n] for n in range(len(case["reply"])) if is_over(case["reply"][:n])
        ]
        for start in starts[:1]:
            stopped += 1
            said = answered_option(start, case["options"])
            assert (case["options"][said] if said >= 0 else None) == case["answer"]
    assert stopped >= 5  # control: some do stop before their end


def test_a_reply_that_can_be_no_answer_never_becomes_one():
    given_up = 0
    for case in REPLIES:
        starts = [case["reply"][:n] for n in range(len(case["reply"]) + 1)]
        no_answer = [is_no_answer(start, case["options"]) for start in starts]
        assert no_answer == sorted(no_answer)  # once for all
        if any(no_answer):
            given_up += 1
            assert case["answer"] is None
    assert given_up >= 10  # control
    assert not is_no_answer("New\n", ("New York", "Rome")) and is_no_answer("Newt", ("New York",))
    assert not is_no_answer("Sch\ufffd", ("Sch\u00f6n", "no"))  # half a character


@cache
def slow_replies(model: Model, task, n_new: int = 8):
    """Greedy decoding by hand, one prompt at a time, no cache, full logits every step."""
    replies = []
    for example in task.examples:
        prompt = model.tokenize([example.prompt])[0]
        tokens, logits = list(prompt), []
        while len(tokens) < len(prompt) + n_new and tokens[-1] not in model.eos_ids:
            ids = torch.tensor([tokens])
            logits.append(model.hooked(ids, attention_mask=torch.ones_like(ids))[0, -1])
            tokens.append(int(logits[-1].argmax()))
        replies.append((prompt, tokens, logits))
    return replies


def slow_answers(model: Model, task, readout: str):
    """Return, per example, answer, probabilities, tokens, and where the answer token is."""
    options = option_tokens(model, task, ReadSettings(readout))
    answers = []
    for prompt, tokens, logits in slow_replies(model, task):
        reply = tokens[len(prompt) :]
        if readout == "exact":
            text = model.tokenizer.decode(reply, skip_special_tokens=True)
            answer = answered_option(text, task.options)
            words = [model.tokenizer.decode([token]) for token in reply]
            step = words.index(task.options[answer]) if answer >= 0 else None
        else:
            said = [options.option_of(torch.tensor([t])).item() for t in reply]
            step = next((k for k, option in enumerate(said) if option >= 0), None)
            answer = -1 if step is None else said[step]
        if step is None:
            answers.append((-1, None, tokens, None))
            continue
        classes = torch.stack([logits[step][list(ids)].max() for ids in options.tokens])
        answers.append((answer, classes.softmax(0), tokens, len(prompt) + step))
    return answers


@pytest.mark.parametrize("readout", ["exact", "exact_anywhere"])
def test_replies_equal_decoding_by_hand(model, readout):
    task = cached_task(model)
    run = evaluate(model, task, settings=ReadSettings(readout))
    for i, (answer, probs, _, _) in enumerate(slow_answers(model, task, readout)):
        assert run.predictions[i] == answer
        assert run.replies[i] is not None
        if answer >= 0:
            assert (run.probs[i] - probs).abs().max() < 1e-4
            assert run.error[i].item() == pytest.approx(1 - probs[run.labels[i]].item(), abs=1e-4)
        else:
            assert run.error[i] == 1
            assert not run.correct[i]


@pytest.mark.parametrize("readout", ["exact", "exact_anywhere"])
def test_activations_are_the_residual_stream_at_last_and_at_the_answer(model, readout):
    task, settings = cached_task(model), ReadSettings(readout)
    activations = collect(model, task, settings=settings)
    plain = evaluate(model, task, settings=settings)
    assert torch.equal(activations.outcomes.predictions, plain.predictions)
    for i, (answer, _, tokens, where) in enumerate(slow_answers(model, task, readout)):
        ids = torch.tensor([tokens])
        _, cache = model.hooked.run_with_cache(ids, attention_mask=torch.ones_like(ids))
        n_prompt = len(model.tokenize([task.examples[i].prompt])[0])
        for layer in range(model.n_layers):
            stream = cache["resid_post", layer][0]
            last = activations.resid("last")[layer, i]
            assert (last - stream[n_prompt - 1]).abs().max() < 1e-4
            exact = activations.resid("exact")[layer, i]
            wanted = stream[where] if answer >= 0 else torch.zeros_like(exact)
            assert (exact - wanted).abs().max() < 1e-4


def test_the_answers_above_are_not_all_alike(models):
    """Positive control: over the four families rows answer at once, later, and never."""
    steps = set()
    for model in models.values():
        task = cached_task(model)
        lengths = [len(tokens) for tokens in model.tokenize([e.prompt for e in task.examples])]
        answers = slow_answers(model, task, "exact_anywhere")
        steps |= {w and min(w - n, 1) for (_, _, _, w), n in zip(answers, lengths, strict=True)}
    assert steps == {None, 0, 1}


def test_last_readout_needs_no_decoding(model, task):
    run = evaluate(model, task, settings=ReadSettings("last"))
    options = option_tokens(model, task, ReadSettings("last"))
    for i, example in enumerate(task.examples):
        ids = torch.tensor([model.tokenize([example.prompt])[0]])
        logits = model.hooked(ids, attention_mask=torch.ones_like(ids))[0, -1]
        classes = torch.stack([logits[list(ids)].max() for ids in options.tokens])
        assert (run.probs[i] - classes.softmax(0)).abs().max() < 1e-4
        assert run.predictions[i] == classes.argmax()
    assert run.answered.all()


def test_collect_to_a_folder_equals_collect_in_memory(model, task, tmp_path):
    in_memory = collect(model, task, settings=EXACT)
    on_disk = collect(model, task, settings=EXACT, out=tmp_path)
    for position in ("last", "exact"):
        assert torch.equal(on_disk.resid(position), in_memory.resid(position))
    assert torch.equal(on_disk.outcomes.probs, in_memory.outcomes.probs)
    again = Activations.load(tmp_path)
    assert torch.equal(again.outcomes.predictions, in_memory.outcomes.predictions)
    assert again.manifest["model_fingerprint"] == model.fingerprint
    assert again.texts == in_memory.texts == list(range(len(task)))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "activations.safetensors",
        "manifest.json",
        "outcomes.jsonl",
    ]


def test_collected_examples_know_whose_text_is_the_same(models, tmp_path):
    """Case and the width of white space make no other text."""
    texts = ("good film", "red tree", "Good  Film", "good film .", "good\tfilm")
    examples = [Example(7 + i, f"{t} answer :", ("yes", "no"), 0) for i, t in enumerate(texts)]
    task = Task("copies", tuple(examples), "all")
    collect(models["llama"], task, settings=EXACT, out=tmp_path)
    again = Activations.load(tmp_path)
    assert again.texts == [7, 8, 7, 10, 7]
    assert again.subset(torch.tensor([4, 3, 0])).texts == [7, 10, 7]


def test_a_failed_collection_leaves_nothing_behind(model, task, tmp_path, monkeypatch):
    import mera_tl.inference.activations

    def fail(*args, **kwargs):
        raise RuntimeError("power cut")

    monkeypatch.setattr(mera_tl.inference.activations, "read_batch", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        collect(model, task, out=tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    whole = collect(model, task.subset(range(8)), out=tmp_path)
    whole.save(tmp_path)  # control: a folder may be written again
    assert Activations.load(tmp_path).manifest == whole.manifest
    monkeypatch.setattr(mera_tl.inference.activations, "_save_rest", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        collect(model, task.subset(range(8, 16)), out=tmp_path)
    with pytest.raises(ValueError, match=r"There is no file .*manifest\.json"):
        Activations.load(tmp_path)  # not new activations beside what is said of the old ones


def test_values_that_are_not_finite_are_refused_and_looked_for_once(models, monkeypatch):
    activations = collect(models["llama"], make_task(4))
    looks, real = [], torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda x: looks.append(x.shape) or real(x))
    for _ in range(3):
        activations.resid()
        activations.subset(torch.tensor([1, 2])).resid()
    assert len(looks) == 1
    broken = {"last": activations.by_position["last"].clone()}
    broken["last"][2, 1, 0] = torch.nan
    with pytest.raises(ValueError, match="first in layer 1, example 2"):
        Activations(broken, activations.outcomes).resid()
    with pytest.raises(ValueError, match="first in layer 1, example 2"):
        replace(activations, by_position=broken).resid()  # others, such as latents of these


# --- one token per option -----------------------------------------------------------------------

LAST = ReadSettings("last")


def test_option_that_shares_its_tokens_is_refused(models):
    with pytest.raises(ValueError, match=r"cannot be told apart"):
        option_tokens(models["llama"], make_task(2, options=("yes", "Yes")), LAST)


def test_option_without_a_single_token_falls_back_to_its_first(models):
    tokens = option_tokens(models["llama"], make_task(2, options=("very good", "bad")), LAST).tokens
    encode = models["llama"].tokenizer.convert_tokens_to_ids
    assert tokens == ((encode("very"),), (encode("bad"),))
    with pytest.raises(ValueError, match="very"):
        option_tokens(models["llama"], make_task(2, options=("very good", "very bad")), LAST)


def test_an_unknown_readout_is_refused():
    with pytest.raises((ValueError, TypeCheckError), match="first"):
        ReadSettings(readout="first")
