"""Benchmarks of lm-evaluation-harness on a steered model: the same numbers in any batch."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import certified, make_task, random_probe

from mera_tl import Adaptive, Steering
from mera_tl.evals import Continuation, SteeredLM, compare_on_tasks, log_likelihoods
from mera_tl.inference import ReadSettings, option_tokens, read_batch
from mera_tl.steering import Additive, Sampling, reply_to

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402

PROMPTS = [example.prompt for example in make_task(8).examples]
POSITIONS = ("all", "last", "final", "generated")


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def steering_of(model, positions: str = "last", first_k: int | None = None) -> Steering:
    where: dict = {"positions": positions, "first_k": first_k}
    return Steering(random_probe(model, scale=3.0), **where).at(0.3)


@pytest.mark.parametrize("positions", POSITIONS)
def test_log_likelihoods_do_not_depend_on_the_batch(models, positions):
    model, arguments = (
        models["llama"],
        [(p, " red bird tree"[: 4 + 5 * (i % 3)]) for i, p in enumerate(PROMPTS)],
    )
    lms = [
        SteeredLM(model, steering_of(model, positions), settings=ReadSettings(batch_size=size))
        for size in (1, 3, 8)
    ]
    values = [
        lm.loglikelihood(requests("loglikelihood", arguments), disable_tqdm=True) for lm in lms
    ]
    for other in values[1:]:
        torch.testing.assert_close(
            *(torch.tensor([v for v, _ in x]) for x in (values[0], other)), atol=1e-4, rtol=0
        )
        assert [greedy for _, greedy in other] == [greedy for _, greedy in values[0]]
    plain = SteeredLM(model).loglikelihood(requests("loglikelihood", arguments), disable_tqdm=True)
    assert max(abs(a[0] - b[0]) for a, b in zip(plain, values[0], strict=True)) > 0.01
    endless = replace(steering_of(model, positions), rule=Additive(3e38))
    with pytest.raises(ValueError, match="log-likelihoods that are not finite"):
        SteeredLM(model, endless).loglikelihood(requests("loglikelihood", arguments))


@pytest.mark.parametrize(
    ("positions", "first_k"), [*((p, None) for p in POSITIONS), ("last", 2), ("all", 1)]
)
def test_a_continuation_is_scored_as_decoding_would_have_said_it(models, positions, first_k):
    model = models["qwen2"]
    hooks = steering_of(model, positions, first_k).fwd_hooks()
    prompts = model.tokenize(PROMPTS)
    rows = reply_to(model, prompts, hooks, Sampling(5))
    pairs = [Continuation(tuple(r.prompt), tuple(r.tokens)) for r in rows if r.tokens]
    scored = log_likelihoods(model, pairs, hooks)
    for (value, is_greedy), row in zip(scored, [r for r in rows if r.tokens], strict=True):
        assert is_greedy
        assert value == pytest.approx(sum(row.log_probs), abs=1e-3)


def test_long_texts_are_scored_in_windows(models):
    model = models["gemma2"]
    text = " ".join(PROMPTS)
    lm = SteeredLM(model, steering_of(model))
    (whole,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    ids = lm.tok_encode(text, add_special_tokens=False)
    assert len(ids) > model.n_ctx and -20 * len(ids) < whole < 0
    (short,) = SteeredLM(model).loglikelihood_rolling(
        requests("loglikelihood_rolling", [(PROMPTS[0],)])
    )
    ids = torch.tensor([[lm.prefix_token_id, *lm.tok_encode(PROMPTS[0], add_special_tokens=False)]])
    logits = model.hooked(ids, attention_mask=torch.ones_like(ids))[0, :-1]
    expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
    assert short == pytest.approx(expected.item(), abs=1e-3)


def test_replies_end_at_stop_texts_and_do_not_depend_on_the_batch(models):
    model = models["llama"]
    free = {"until": [], "max_gen_toks": 6, "do_sample": False}
    lm = SteeredLM(model, steering_of(model))
    replies = lm.generate_until(requests("generate_until", [(p, free) for p in PROMPTS]))
    one = SteeredLM(model, steering_of(model), settings=ReadSettings(batch_size=1))
    assert one.generate_until(requests("generate_until", [(p, free) for p in PROMPTS])) == replies
    word = replies[0].split()[2]
    stop = {**free, "until": [word, ""]}
    with pytest.raises(ValueError, match="with which every reply begins"):
        Sampling(stop=("",))
    (cut,) = lm.generate_until(requests("generate_until", [(PROMPTS[0], stop)]))
    assert cut == replies[0][: replies[0].index(word)]


def test_replies_are_drawn_as_a_task_asks_and_what_is_not_applied_is_said(models, caplog):
    lm = SteeredLM(models["llama"], steering_of(models["llama"]))

    def replies(**told):
        told = {"until": [], "max_gen_toks": 6, **told}
        return lm.generate_until(requests("generate_until", [(p, told) for p in PROMPTS]))

    hot = {"do_sample": True, "temperature": 2.0}
    assert replies(**hot, top_k=1) == replies(**hot, top_p=1e-6) == replies(do_sample=False)
    assert replies(**hot) != replies(do_sample=False) and not caplog.records
    replies(num_beams=4)
    assert "asks for num_beams, which is not applied" in caplog.text


def test_an_empty_context_is_replied_to_as_the_token_that_stands_for_it(models):
    """It was run as padding alone, or not at all."""
    lm = SteeredLM(models["llama"], steering_of(models["llama"]))
    told = {"until": [], "max_gen_toks": 6}
    arguments = [("", told), (PROMPTS[0], told), ("<bos>", told)]
    empty, _, written = lm.generate_until(requests("generate_until", arguments))
    assert lm.tok_encode("") == [] and lm.tok_encode("<bos>") == [lm.prefix_token_id]
    assert empty == written


def test_the_harness_keeps_requests_apart_by_model_template_and_steering(models):
    model, steering = models["llama"], steering_of(models["llama"])
    same_name = [replace(each, name="model") for each in (model, models["qwen2"])]
    told = [SteeredLM(each).tokenizer_name for each in same_name]
    told += [SteeredLM(same_name[0], s).tokenizer_name for s in (steering, steering.at(0.4))]
    assert len(set(told)) == 4
    assert SteeredLM(same_name[0], steering.at(0.3)).tokenizer_name == told[2]


def test_steering_by_the_answer_needs_its_options(models):
    model, task = models["llama"], make_task(4)
    steering = replace(steering_of(model), direction=torch.randn(2, 3, 32), rule=Adaptive(-3.0))
    with pytest.raises(ValueError, match="knows of none"):
        SteeredLM(model, steering)
    options = option_tokens(model, task, ReadSettings("last"))
    prompts = model.tokenize(PROMPTS)
    pairs = [Continuation(tuple(p), (5, 6)) for p in prompts]
    together = log_likelihoods(model, pairs, steering.fwd_hooks(), options=options)
    answers = read_batch(model, prompts, options, ReadSettings("last")).predictions
    for pair, (value, _), answer in zip(pairs, together, answers.tolist(), strict=True):
        single = replace(steering, direction=steering.direction[answer])
        ((own, _),) = log_likelihoods(model, [pair], single.fwd_hooks())
        assert value == pytest.approx(own, abs=1e-4)
    alone = [log_likelihoods(model, [p], steering.fwd_hooks(), options=options)[0] for p in pairs]
    torch.testing.assert_close(
        *(torch.tensor([v for v, _ in x]) for x in (together, alone)), atol=1e-4, rtol=0
    )


@pytest.fixture
def toy(tmp_path):
    """A task file, and its rows."""
    lines = [{"text": p, "label": i % 2} for i, p in enumerate(PROMPTS * 3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "toy.yaml").write_text(
        f"""task: toy_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path}/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: label
metric_list:
  - metric: acc
"""
    )
    return tmp_path / "toy.yaml", lines


def test_an_interval_does_not_hang_on_the_order_of_the_examples():
    """A data set may be sorted by class, and a steering help one class and harm the other."""
    from mera_tl.evals import comparing

    zeros, ones = np.zeros(150), np.ones(150)
    for before, after in ((np.r_[zeros, ones], np.r_[ones, zeros]), (np.r_[ones, zeros],) * 2):
        effect = comparing._effect("toy", "acc", before, after)
        assert effect.difference == 0 and effect.low <= 0 <= effect.high
    gain = comparing._effect("toy", "acc", np.r_[zeros, ones], np.r_[ones, ones])
    assert 0 < gain.low < 0.5 < gain.high  # the control


def test_local_tasks_are_compared_with_paired_intervals(models, toy):
    path, lines = toy
    model = models["llama"]
    (effect,) = compare_on_tasks(model, steering_of(model), [str(path)], limit=20)
    assert (effect.task, effect.metric, effect.n) == ("toy_choice", "acc", 20)
    assert effect.low <= effect.difference <= effect.high
    assert 0 < effect.unsteered < 1 and effect.n_changed <= 20
    lm = SteeredLM(model, steering_of(model))
    arguments = [(line["text"], f" {o}") for line in lines[:20] for o in ("yes", "no")]
    values = [
        v for v, _ in lm.loglikelihood(requests("loglikelihood", arguments), disable_tqdm=True)
    ]
    said = [int(values[2 * i + 1] > values[2 * i]) for i in range(20)]
    right = [answer == line["label"] for answer, line in zip(said, lines[:20], strict=True)]
    assert effect.steered == pytest.approx(sum(right) / 20)
    with pytest.raises(ValueError, match="no task file"):
        compare_on_tasks(model, steering_of(model), ["nowhere.yaml"])


def test_two_ways_of_reading_a_reply_are_not_twice_the_examples(models, toy):
    path, _ = toy
    lines = path.read_text().replace("multiple_choice", "generate_until").splitlines()
    kept = [line for line in lines if not line.startswith("doc_to_choice")]
    filters = [f"  - {{name: {n}, filter: [{{function: take_first}}]}}" for n in ("one", "two")]
    kept += ["generation_kwargs: {until: [], max_gen_toks: 4}", "filter_list:", *filters]
    wanted = "\n".join(kept).replace("metric: acc", "metric: exact_match")
    path.write_text(wanted.replace("doc_to_target: label", 'doc_to_target: "yes"'))
    model = models["llama"]
    effects = compare_on_tasks(model, steering_of(model), [str(path)], limit=10)
    assert [(e.metric, e.n) for e in effects] == [("exact_match,one", 10), ("exact_match,two", 10)]
    assert effects[0].low == effects[1].low


def test_the_command_line_shows_side_effects(models, checkpoints, toy, tmp_path, mera):
    model = models["llama"]
    folder = certified(model, make_task(12), steering_of(model)).save(tmp_path / "steering")
    command = ["eval", "--steering", folder, "--model", checkpoints["llama"], "--tasks"]
    (effect,) = compare_on_tasks(model, steering_of(model), [str(toy[0])], limit=20)
    (row,) = json.loads(mera(*command, toy[0], "--limit", 20, "--json").out)
    assert row == pytest.approx(asdict(effect) | {"difference": effect.difference})
    said = mera(*command, "nowhere.yaml", code=2).err
    assert "There is no task file nowhere.yaml" in " ".join(said.split())
