"""Batches and prompts: nothing depends on how a task is cut up."""

from dataclasses import replace

import pytest
import torch
from conftest import make_task, random_probe, talking_task

from mera_tl.inference import (
    Activations,
    ReadSettings,
    by_length,
    collect,
    evaluate,
    free_text,
    tokenize_task,
)
from mera_tl.probes import LinearProbe, fit_error_probe
from mera_tl.steering import Steering, explain, generate


@pytest.mark.parametrize("changes", [{"batch_tokens": 30}, {"batch_size": 5}, {"batch_size": 1}])
def test_answers_do_not_depend_on_the_batching(changes, model):
    task = talking_task(model)
    wide = evaluate(model, task)
    run = evaluate(model, task, settings=ReadSettings(**changes))
    assert torch.equal(run.predictions, wide.predictions)
    assert (run.probs - wide.probs).abs().max() < 1e-5


def test_a_prompt_without_a_token_is_refused_and_one_with_half_a_character(model):
    """The engines make different answers of padding alone."""
    assert model.tokenize(["a"])
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        generate(model, ["red bird", ""])
    with pytest.raises(ValueError, match="Prompt 0, .* half a character"):
        generate(model, ["red \ud83d"])


def test_activations_know_in_how_many_tokens_there_was_an_answer(models):
    model, task = models["llama"], talking_task(models["llama"])
    collected = collect(model, task, settings=ReadSettings("exact", max_new_tokens=6))
    collected.check(model, ReadSettings("exact", max_new_tokens=6))
    with pytest.raises(ValueError, match="n_new 6, but now .* has 2"):
        collected.check(model, ReadSettings("exact", max_new_tokens=2))


def test_what_a_damaged_folder_holds_is_said_in_a_sentence(models, tmp_path):
    collected = collect(models["llama"], make_task(12))
    fit_error_probe(collected).save(tmp_path / "probe")
    collected.save(tmp_path)
    for path, load in (("manifest.json", Activations), ("probe/probe.json", LinearProbe)):
        folder = (tmp_path / path).parent
        load.load(folder)
        (tmp_path / path).write_text("{}", "utf-8")
        with pytest.raises(ValueError, match="is damaged .KeyError"):
            load.load(folder)


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

    settings = ReadSettings(batch_size=16)
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
        evaluate(models["llama"], task)


def long_task(models, n_words: int, options=("yes", "no")):
    task = make_task(6, options=options)
    text = " ".join(["red"] * n_words)
    example = replace(task.examples[2], prompt=f"question : {text} ? answer :", text=text)
    return replace(task, examples=(*task.examples[:2], example, *task.examples[3:]))


def test_too_long_a_prompt_names_its_row_and_truncation_spares_the_question(models):
    model = models["gpt2"]
    task = long_task(models, 100)
    with pytest.raises(ValueError, match=r"row 2\).*--truncate"):
        evaluate(model, task)
    run = evaluate(model, task, settings=ReadSettings(truncate=True))
    assert len(run) == 6

    for readout, n_after in (("exact", ReadSettings().max_new_tokens), ("options", 0), ("last", 0)):
        settings = ReadSettings(truncate=True, readout=readout)
        tokens = tokenize_task(model, task, settings)[2]
        assert len(tokens) == model.n_ctx - n_after
        assert model.tokenizer.decode(tokens).endswith("? answer :")
    # Whatever else looks at an example has it as it is answered.
    probe = random_probe(model)
    ledger = explain(model, task.examples[2], Steering(probe).at(0.3), settings=settings)
    assert ledger.n_prompt == model.n_ctx and ledger.probs[0] == pytest.approx(
        evaluate(model, task, settings=settings).probs[2].tolist(), abs=1e-5
    )
    assert free_text.free_text(model, task, n_new=2, settings=settings).n_tokens <= 12
    with pytest.raises(ValueError, match="row 2"):
        explain(model, task.examples[2], Steering(probe).at(0.3))
    two = long_task(models, 100, options=("good film", "bad film"))
    assert len(tokenize_task(model, two, replace(settings, readout="options"))[2]) < model.n_ctx
