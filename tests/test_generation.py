"""Replies: the same alone and in a batch, steered and not by the same random numbers."""

import io
import json
from dataclasses import replace

import pytest
import torch
from conftest import certified, make_task, random_probe

import mera_tl
from mera_tl import Additive, Steering, generate
from mera_tl.cli import carried
from mera_tl.inference import ReadSettings
from mera_tl.steering import Sampling, reply_to

PROMPTS = [example.prompt for example in make_task(6).examples]


@pytest.fixture(scope="module")
def steering(models):
    return Steering(random_probe(models["llama"], scale=3.0), positions="last").at(0.3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_gets_the_same_reply_alone_and_in_a_batch(models, steering, temperature):
    model, options = models["llama"], dict(max_new_tokens=8, temperature=temperature, seed=3)
    together = generate(model, PROMPTS, steering, **options)
    alone = [generate(model, [prompt], steering, **options)[0] for prompt in PROMPTS]
    small = generate(model, PROMPTS, steering, **options, settings=ReadSettings(batch_size=2))
    for replies in (alone, small):
        assert [r.tokens for r in replies] == [r.tokens for r in together]
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=1e-4, rtol=1e-4)
        assert one.trace.predicted_error == pytest.approx(
            other.trace.predicted_error, nan_ok=True, abs=1e-4
        )
    unsteered = generate(model, PROMPTS, **options)
    assert [r.tokens for r in unsteered] != [r.tokens for r in together]
    assert unsteered[0].trace is None


def test_draws_follow_the_seed_and_are_shared_by_steered_and_unsteered(models, steering):
    model, options = models["llama"], dict(max_new_tokens=8, temperature=1.0)
    nothing = replace(steering, rule=Additive(0.0))
    plain, other = (generate(model, PROMPTS, **options, seed=seed) for seed in (0, 1))
    shared = generate(model, PROMPTS, nothing, **options, seed=0)
    assert [r.tokens for r in shared] == [r.tokens for r in plain]
    assert [r.tokens for r in other] != [r.tokens for r in plain]
    twice = generate(model, PROMPTS[:1] * 4, **options, seed=0)
    assert twice[0].tokens == plain[0].tokens
    assert len({r.tokens for r in twice}) > 1  # a prompt that comes again gets another draw


@pytest.mark.parametrize("kept", [{"top_k": 3}, {"top_p": 0.2}])
def test_draws_among_the_likeliest_are_of_these_alone(models, kept):
    model = models["llama"]
    (prompt,) = model.tokenize(PROMPTS[:1])
    ids = torch.tensor([prompt])
    probs = model.next_token_logits(ids, torch.ones_like(ids)).softmax(-1)[0]
    order = probs.argsort(descending=True)
    n = kept.get("top_k") or int((probs[order].cumsum(0) < kept["top_p"]).sum()) + 1
    sampling = Sampling(1, 1.0, **kept)
    rows = reply_to(model, [prompt] * 600, [], sampling)
    first = torch.tensor([row.tokens[0] if row.tokens else model.eos_ids[0] for row in rows])
    share = torch.bincount(first, minlength=len(probs))[order[:n]] / 600
    assert share.sum() == 1 and n < len(probs) / 4
    expected = probs[order[:n]] / probs[order[:n]].sum()
    assert (share - expected).abs().max() < 4 * 0.5 / 600**0.5
    with pytest.raises(ValueError, match="top_p=0"):
        Sampling(top_p=0.0)


def test_draws_have_the_probabilities_of_the_model(models):
    model = models["llama"]
    (prompt,) = model.tokenize(PROMPTS[:1])
    ids = torch.tensor([prompt])
    expected = model.next_token_logits(ids, torch.ones_like(ids)).softmax(-1)[0]
    replies = generate(model, PROMPTS[:1] * 2000, max_new_tokens=1, temperature=1.0)
    first = torch.tensor([r.tokens[0] if r.tokens else 2 for r in replies])
    share = torch.bincount(first, minlength=len(expected)) / len(first)
    assert (share - expected).abs().max() < 0.05 > 4 * (0.25 / 2000) ** 0.5
    top = replies[int((first == expected.argmax()).nonzero()[0])]
    assert top.log_probs[0] == pytest.approx(expected.max().log().item(), abs=1e-4)


def test_the_trace_says_what_was_read_and_moved(models, steering):
    model = models["llama"]
    (reply,) = generate(model, PROMPTS[:1], steering, max_new_tokens=5)
    trace = reply.trace
    n = len(model.tokenize(PROMPTS[:1])[0])
    assert trace.n_prompt == n and len(trace.tokens) == n + len(reply.tokens)
    assert trace.predicted_error.shape == (3, len(trace.tokens))
    assert (trace.shift[:, : n - 1] == 0).all()  # from the final prompt token on, not before
    fed = trace.predicted_error[:, n - 1 : -1]
    assert ((trace.shift[:, n - 1 : -1] > 0) == (fed > 0.3)).all() and (fed > 0.3).any()
    # Where nothing moves the probe reads the unsteered model: its own limit is no matter.
    free = replace(steering, rule=mera_tl.Adaptive())
    (unsteered,) = generate(model, PROMPTS[:1], free, max_new_tokens=5)
    assert unsteered.tokens == generate(model, PROMPTS[:1], max_new_tokens=5)[0].tokens
    assert (unsteered.trace.shift[:, :-1] == 0).all()
    assert unsteered.trace.predicted_error[0, :n] == pytest.approx(trace.predicted_error[0, :n])


def test_what_cannot_be_generated_is_refused(models, steering):
    model = models["llama"]
    with pytest.raises(ValueError, match="exceed the 64 tokens"):
        generate(model, ["a " * 60], max_new_tokens=10)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        generate(model, ["a"], max_new_tokens=0)
    by_answer = replace(steering, direction=torch.randn(2, 3, 32))
    with pytest.raises(ValueError, match="knows of none; take one that was certified"):
        generate(model, ["a"], by_answer)


@pytest.fixture(scope="module")
def folder(models, steering, tmp_path_factory):
    decision = certified(models["llama"], make_task(12), steering)
    return decision.save(tmp_path_factory.mktemp("saved") / "steering")


def test_the_command_line_replies_side_by_side(models, checkpoints, folder, steering, mera):
    command = ["generate", PROMPTS[0], "--steering", folder, "--model", checkpoints["llama"]]
    command += ["--max-new-tokens", 6, "--device", "cpu"]
    (row,) = json.loads(mera(*command, "--json").out)
    for name, each in (("unsteered", None), ("steered", steering)):
        (reply,) = generate(models["llama"], PROMPTS[:1], each, max_new_tokens=6)
        assert tuple(row[name]["tokens"]) == reply.tokens and row[name]["text"] == reply.text
    assert max(map(max, (r[:-1] for r in row["steered"]["shift"]))) > 0
    out = mera(*command).out
    assert "unsteered" in out and "Moved 1 token of the prompt" in out and "STEER" in out


def test_a_reply_is_shown_whole_with_its_spaces(models, steering, capsys):
    (reply,) = generate(models["llama"], PROMPTS[:1], steering, max_new_tokens=20)
    text = models["llama"].tokenizer.decode(reply.tokens)
    said = reply.trace.tokens[reply.trace.n_prompt :]
    assert "".join(said).strip() == text and text.count(" ") > 5
    words = [word.strip() for word in said]  # a text without spaces is one long word
    shown = (*reply.trace.tokens[: reply.trace.n_prompt], *words)
    solid = replace(reply, trace=replace(reply.trace, tokens=shown))
    carried._print_replies([solid], [solid])
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert len(lines) > 1 and "".join(line[1].strip() for line in lines) == "".join(words)


def test_prompts_come_from_standard_input_or_a_file(
    checkpoints, folder, tmp_path, monkeypatch, mera
):
    command = ["generate", "--steering", folder, "--device", "cpu"]
    command += ["--model", checkpoints["llama"], "--max-new-tokens", 2]
    lines = "\n".join(PROMPTS[:3]) + "\n\n"
    (tmp_path / "prompts.txt").write_text(lines)
    told = []
    for more in ([], ["--file", tmp_path / "prompts.txt"], PROMPTS[:3]):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        told.append(json.loads(mera(*command, "--json", *more).out))
    assert [row["prompt"] for row in told[0]] == PROMPTS[:3]
    assert told[0] == told[1] == told[2]
    typed = io.StringIO(lines)
    typed.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", typed)
    shown = mera(*command).out  # to a person, without --json
    assert [shown.count(prompt) for prompt in PROMPTS[:3]] == [1, 1, 1] and "prompt>" in shown
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert "There is no prompt" in " ".join(mera(*command, code=2).err.split())
