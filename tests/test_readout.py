"""Options as tokens, answers, and outcomes: the definitions, checked by slow and plain code."""

from dataclasses import replace

import pytest
import torch
from conftest import make_task, talking_task

from mera_tl.inference import (
    Activations,
    Outcomes,
    ReadSettings,
    accuracy_interval,
    by_length,
    collect,
    evaluate,
    option_tokens,
    paired_p_value,
    spi,
    spi_interval,
)
from mera_tl.models import Model

QUIET = ReadSettings(progress=False)


def slow_answers(model: Model, task, n_new: int = 8):
    """Greedy decoding by hand, one prompt at a time, no cache, full logits every step."""
    options = option_tokens(model, task.options)
    answers = []
    for example in task.examples:
        tokens, answer, probs, where = model.tokenize([example.prompt])[0], -1, None, None
        for _ in range(n_new):
            ids = torch.tensor([tokens])
            logits = model.hooked(ids, attention_mask=torch.ones_like(ids))[0, -1]
            emitted = int(logits.argmax())
            tokens = [*tokens, emitted]
            hit = [o for o, ids in enumerate(options.tokens) if emitted in ids]
            if hit:
                classes = torch.stack([logits[list(ids)].max() for ids in options.tokens])
                answer, probs, where = hit[0], classes.softmax(0), len(tokens) - 1
                break
            if emitted in model.eos_ids:
                break
        answers.append((answer, probs, tokens, where))
    return answers


def test_exact_readout_equals_decoding_by_hand(model):
    task = talking_task(model)
    run = evaluate(model, task, settings=QUIET)
    for i, (answer, probs, _, _) in enumerate(slow_answers(model, task)):
        assert run.predictions[i] == answer
        if answer >= 0:
            assert (run.probs[i] - probs).abs().max() < 1e-4
            assert run.error[i].item() == pytest.approx(1 - probs[run.labels[i]].item(), abs=1e-4)
        else:
            assert run.error[i] == 1
            assert not run.correct[i]


def test_activations_are_the_residual_stream_at_last_and_at_the_answer(model):
    task = talking_task(model)
    activations = collect(model, task, settings=QUIET)
    plain = evaluate(model, task, settings=QUIET)
    assert torch.equal(activations.outcomes.predictions, plain.predictions)
    for i, (answer, _, tokens, where) in enumerate(slow_answers(model, task)):
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
        task = talking_task(model)
        lengths = [len(tokens) for tokens in model.tokenize([e.prompt for e in task.examples])]
        answers = slow_answers(model, task)
        steps |= {w and min(w - n, 1) for (_, _, _, w), n in zip(answers, lengths, strict=True)}
    assert steps == {None, 0, 1}


def test_last_readout_needs_no_decoding(model, task):
    run = evaluate(model, task, settings=replace(QUIET, readout="last"))
    options = option_tokens(model, task.options)
    for i, example in enumerate(task.examples):
        ids = torch.tensor([model.tokenize([example.prompt])[0]])
        logits = model.hooked(ids, attention_mask=torch.ones_like(ids))[0, -1]
        classes = torch.stack([logits[list(ids)].max() for ids in options.tokens])
        assert (run.probs[i] - classes.softmax(0)).abs().max() < 1e-4
        assert run.predictions[i] == classes.argmax()
    assert run.answered.all()


def test_collect_to_a_folder_equals_collect_in_memory(model, task, tmp_path):
    in_memory = collect(model, task, settings=QUIET)
    on_disk = collect(model, task, settings=QUIET, out=tmp_path)
    for position in ("last", "exact"):
        assert torch.equal(on_disk.resid(position), in_memory.resid(position))
    assert torch.equal(on_disk.outcomes.probs, in_memory.outcomes.probs)
    again = Activations.load(tmp_path)
    assert torch.equal(again.outcomes.predictions, in_memory.outcomes.predictions)
    assert again.manifest["model_fingerprint"] == model.fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "activations.safetensors",
        "manifest.json",
        "outcomes.jsonl",
    ]


def test_a_failed_collection_leaves_nothing_behind(model, task, tmp_path, monkeypatch):
    import mera_tl.inference.activations

    def fail(*args, **kwargs):
        raise RuntimeError("power cut")

    monkeypatch.setattr(mera_tl.inference.activations, "read_batch", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        collect(model, task, settings=QUIET, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"batch_tokens": 30}, {"batch_size": 5}, {"batch_size": 1}])
def test_answers_do_not_depend_on_the_batching(changes, model):
    task = talking_task(model)
    wide = evaluate(model, task, settings=QUIET)
    run = evaluate(model, task, settings=replace(QUIET, **changes))
    assert torch.equal(run.predictions, wide.predictions)
    assert (run.probs - wide.probs).abs().max() < 1e-5


def test_batches_hold_every_prompt_once_and_no_more_tokens_than_allowed():
    generator = torch.Generator().manual_seed(0)
    prompts = [[0] * int(n) for n in torch.randint(1, 60, (200,), generator=generator)]
    for budget in (1, 50, 100, 500, 1000):
        batches = list(by_length(prompts, ReadSettings(batch_tokens=budget)))
        rows = torch.tensor([len(batch) for batch in batches])
        longest = torch.tensor([max(len(prompts[i]) for i in batch) for batch in batches])
        assert sorted(i for batch in batches for i in batch) == list(range(len(prompts)))
        assert torch.equal(longest, longest.sort(descending=True).values)

        def fits(rows, longest=longest, budget=budget):
            """Tokens within the budget, and pairs of tokens within a sixteenth of its square."""
            return (rows * longest <= budget) & (16 * rows * longest**2 <= budget**2)

        assert (fits(rows) | (rows == 1)).all()
        # Full: one more row would not have fitted, rounding aside, but for the last batch.
        assert (
            not fits(rows + 2)[:-1].any() and not fits(rows + 1)[longest <= budget / 16][:-1].any()
        )
    assert (longest > 1000 / 16).sum() == 0 < (longest > 500 / 16).sum()  # both kinds were there
    rows = [len(batch) for batch in by_length(prompts, ReadSettings(batch_size=16))]
    assert rows == [16] * 12 + [8]  # positive control: an explicit size counts rows, not tokens


def test_batch_halves_itself_when_memory_runs_out(models, task, monkeypatch, caplog):
    import mera_tl.inference.evaluation

    model, sizes, real = models["llama"], [], mera_tl.inference.evaluation.read_batch

    def small_machine(model, prompts, *args, **kwargs):
        sizes.append(len(prompts))
        if len(prompts) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, prompts, *args, **kwargs)

    settings = replace(QUIET, batch_size=16)
    wanted = evaluate(model, task, settings=settings)
    monkeypatch.setattr(mera_tl.inference.evaluation, "read_batch", small_machine)
    run = evaluate(model, task, settings=settings)
    assert sizes[:3] == [16, 8, 4]
    assert max(sizes[2:]) == 4
    assert (run.probs - wanted.probs).abs().max() < 1e-5
    assert "out of memory" in caplog.text


def test_other_errors_are_not_taken_for_a_lack_of_memory(models, task, monkeypatch):
    import mera_tl.inference.evaluation

    def fail(*args, **kwargs):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(mera_tl.inference.evaluation, "read_batch", fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        evaluate(models["llama"], task, settings=QUIET)


# --- options ------------------------------------------------------------------------------------


def test_option_that_shares_its_tokens_is_refused(models):
    with pytest.raises(ValueError, match=r"cannot be told apart"):
        option_tokens(models["llama"], ("yes", "Yes"))


def test_option_without_a_single_token_falls_back_to_its_first(models):
    tokens = option_tokens(models["llama"], ("very good", "bad")).tokens
    encode = models["llama"].tokenizer.convert_tokens_to_ids
    assert tokens == ((encode("very"),), (encode("bad"),))
    with pytest.raises(ValueError, match="very"):
        option_tokens(models["llama"], ("very good", "very bad"))


# --- prompts ------------------------------------------------------------------------------------


def long_task(models, n_words: int):
    task = make_task(6)
    text = " ".join(["red"] * n_words)
    example = replace(task.examples[2], prompt=f"question : {text} ? answer :", text=text)
    return replace(task, examples=(*task.examples[:2], example, *task.examples[3:]))


def test_too_long_a_prompt_names_its_row_and_truncation_spares_the_question(models):
    model = models["gpt2"]
    task = long_task(models, 100)
    with pytest.raises(ValueError, match=r"rows 2\).*--truncate"):
        evaluate(model, task, settings=QUIET)
    run = evaluate(model, task, settings=replace(QUIET, truncate=True))
    assert len(run) == 6
    from mera_tl.inference import tokenize_task

    tokens = tokenize_task(model, task, replace(QUIET, truncate=True))[2]
    assert len(tokens) == model.n_ctx - QUIET.max_new_tokens
    assert model.tokenizer.decode(tokens).endswith("? answer :")


# --- outcomes -----------------------------------------------------------------------------------


def outcomes(labels, predictions, n_options=3):
    labels, predictions = torch.tensor(labels), torch.tensor(predictions)
    probs = torch.full((len(labels), n_options), 0.1)
    for i, p in enumerate(predictions):
        probs[i] = 0.0 if p < 0 else probs[i]
        if p >= 0:
            probs[i, p] = 0.8
    zeros = torch.zeros(len(labels), dtype=torch.long)
    rows = torch.arange(len(labels))
    peak = torch.full((len(labels),), -torch.inf)
    options = tuple("abc"[:n_options])
    return Outcomes(options, rows, labels, predictions, probs, *[zeros] * 4, zeros.float(), peak)


def test_weighted_scores_agree_with_scikit_learn():
    from sklearn.metrics import precision_recall_fscore_support

    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (80,), generator=generator).tolist()
    predictions = torch.randint(-1, 3, (80,), generator=generator).tolist()
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predictions, labels=[0, 1, 2], average="weighted", zero_division=0
    )
    scores = outcomes(labels, predictions).weighted_scores()
    assert scores == pytest.approx({"precision": precision, "recall": recall, "f1": f1})


def test_transitions_and_gains():
    base = outcomes([0, 0, 1, 1], [0, 1, 1, -1])
    after = outcomes([0, 0, 1, 1], [1, 0, 1, 1])
    assert after.transitions(base) == {"0->0": 0, "0->1": 2, "1->0": 1, "1->1": 1}
    assert after.gain(base).tolist() == [-1, 1, 0, 1]
    assert after.gain(base, "error")[3].item() == pytest.approx(0.8)
    with pytest.raises(ValueError, match="different rows"):
        after.gain(base.subset(torch.tensor([0])))


def test_spi_is_the_share_of_what_could_be_won_or_lost():
    assert spi(0.9, 0.8) == pytest.approx(0.5)
    assert spi(0.6, 0.8) == pytest.approx(-0.25)
    assert spi(0.8, 0.8) == 0
    assert spi(1.0, 0.0) == 1
    assert spi(0.0, 1.0) == -1


def test_intervals_and_paired_test_agree_with_brute_force():
    from math import comb

    base = outcomes([0] * 40, [0] * 25 + [1] * 15, 2)
    after = outcomes([0] * 40, [0] * 23 + [1] * 2 + [0] * 9 + [1] * 6, 2)
    assert after.transitions(base) == {"0->0": 6, "0->1": 9, "1->0": 2, "1->1": 23}
    tail = sum(comb(11, k) for k in (0, 1, 2, 9, 10, 11)) / 2**11
    assert paired_p_value(after, base) == pytest.approx(tail)
    low, high = accuracy_interval(after)
    beyond = sum(comb(40, k) * low**k * (1 - low) ** (40 - k) for k in range(32, 41))
    assert beyond == pytest.approx(0.025)
    assert low < after.accuracy < high
    generator, draws = torch.Generator().manual_seed(1), []
    for _ in range(2000):
        rows = torch.randint(0, 40, (40,), generator=generator)
        hits = [run.correct[rows].double().mean().item() for run in (after, base)]
        draws.append(spi(*hits))
    wanted = torch.tensor(draws).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert spi_interval(after, base) == pytest.approx(wanted, abs=0.04)
    assert paired_p_value(base, base) == 1


def test_outcomes_survive_a_file():
    run = outcomes([0, 2, 1], [0, -1, 1])
    again = Outcomes.from_records(run.to_records(), run.options)
    for name in ("rows", "labels", "predictions", "probs", "peak", "n_steered", "shift"):
        assert torch.equal(getattr(again, name), getattr(run, name))
