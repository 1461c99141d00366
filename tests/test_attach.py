"""A steering on the user's own model does what it does in `evaluate`."""

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    FAMILIES,
    make_task,
    mixed_options,
    original,
    padded,
    random_probe,
    save_random_checkpoint,
    talking_task,
)

from mera_tl import Adaptive, Additive, Steering, calibrate, evaluate, generate, load_model
from mera_tl.inference import Decoding, ReadSettings, hooked_pass, option_tokens, read_batch
from mera_tl.models import resid_post
from mera_tl.steering import attach_hooks

N_NEW = 6
PROMPTS = [
    "the film is not good question : answer :",
    "red bird tree",
    "spam ham yes no positive negative question answer : ? one two three",
    "it was very blue",
    "a",
    "seven eight nine ten question : good bad ?",
    "film film film film answer :",
    "one two",
]


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Families that the engine hugging_face alone runs."""
    from transformers import GPTNeoXConfig, OPTConfig

    shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=64)
    configs = {
        "gpt_neox": GPTNeoXConfig(**shape, **ends, intermediate_size=48),
        "opt": OPTConfig(**shape, **ends, ffn_dim=48, word_embed_proj_dim=32),
    }
    base = tmp_path_factory.mktemp("others")
    return {name: save_random_checkpoint(c, base / name) for name, c in configs.items()}


@pytest.fixture(scope="module")
def every(models, others):
    return models | {name: load_model(str(path), device="cpu") for name, path in others.items()}


@pytest.fixture(scope="module")
def originals(checkpoints, others):
    """The same checkpoints as a user of transformers has them, and their ends never sampled."""
    loaded = {family: original(path) for family, path in (checkpoints | others).items()}
    for model in loaded.values():
        model.generation_config.eos_token_id = None
    return loaded


def ours(model, prompts, steering) -> torch.Tensor:
    """Greedy tokens of our own decoding."""
    hooks = steering.fwd_hooks()
    with torch.inference_mode(), hooked_pass(model, hooks):
        decoding = Decoding(model, prompts, hooks)
        logits, out = decoding.prompt(), []
        for _ in range(N_NEW):
            out.append(logits.argmax(-1))
            logits = decoding.next(out[-1])
    return torch.stack(out, 1)


def theirs(hf, prompts, steering, **options) -> torch.Tensor:
    ids, mask = padded(prompts)
    with steering.attach(hf):
        out = hf.generate(
            ids, attention_mask=mask, max_new_tokens=N_NEW, do_sample=False, **options
        )
    return out[:, ids.shape[1] :]


def steering_for(
    model, positions: str = "all", *, threshold: float = 0.5, first_k: int | None = None
) -> Steering:
    probe = random_probe(model, scale=3.0)
    direction = torch.randn(probe.weights.shape, generator=torch.Generator().manual_seed(1))
    direction = (
        torch.where((direction * probe.weights).sum(-1, keepdim=True) > 0, 1, -1) * direction
    )
    where: dict = {"positions": positions, "first_k": first_k}
    return Steering(probe, direction, **where).at(threshold)


@pytest.mark.parametrize("positions", ["all", "last", "final", "generated"])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt_neox", "opt"])
def test_generate_of_hugging_face_says_the_tokens_of_our_own_decoding(
    every, originals, family, positions
):
    model, hf = every[family], originals[family]
    steering = steering_for(model, positions)
    prompts = model.tokenize(PROMPTS)
    expected = ours(model, prompts, steering)
    for cache in (True, False):
        assert torch.equal(theirs(hf, prompts, steering, use_cache=cache), expected)
        one_by_one = [theirs(hf, [p], steering, use_cache=cache) for p in prompts[:3]]
        assert torch.equal(torch.cat(one_by_one), expected[:3])
    # The control: steering changes these tokens, and so does another scope.
    unsteered = hf.generate(
        *padded(prompts)[:1],
        attention_mask=padded(prompts)[1],
        max_new_tokens=N_NEW,
        do_sample=False,
    )[:, -N_NEW:]
    assert not torch.equal(unsteered, expected)


@pytest.mark.parametrize("engine", ["HookedTransformer", "TransformerBridge", "hugging_face"])
def test_every_kind_of_model_is_steered_alike(models, originals, checkpoints, engine):
    steering = steering_for(models["llama"], "last")
    prompts = models["llama"].tokenize(PROMPTS[:2])
    ids, mask = padded(prompts)
    if engine == "hugging_face":
        host = load_model(str(checkpoints["llama"]), device="cpu", engine="hugging_face")
        run = lambda: host.hooked.original(ids, attention_mask=mask).logits  # noqa: E731
    elif engine == "HookedTransformer":
        host = models["llama"].hooked
        run = lambda: host(ids, attention_mask=mask)  # noqa: E731
    else:
        from transformer_lens.model_bridge import TransformerBridge

        host = TransformerBridge.boot_transformers(str(checkpoints["llama"]), device="cpu")
        run = lambda: host.original_model(ids, attention_mask=mask).logits  # noqa: E731
    with torch.no_grad(), steering.attach(originals["llama"]):
        expected = originals["llama"](ids, attention_mask=mask).logits
    with torch.no_grad():
        unsteered = run()
        with steering.attach(host):
            steered = run()
    real = mask.bool()
    torch.testing.assert_close(steered[real], expected[real], atol=2e-4, rtol=1e-4)
    assert (steered - unsteered)[real].abs().max() > 0.1


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformer_lens_generates_the_same_tokens(models, family, cached):
    model, steering = models[family], steering_for(models[family], "final")
    prompts = model.tokenize(PROMPTS[2:3])
    with steering.attach(model):
        out = model.hooked.generate(
            torch.tensor(prompts),
            max_new_tokens=N_NEW,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=cached,
            verbose=False,
        )
    assert torch.equal(out[:, -N_NEW:], ours(model, prompts, steering))


def test_evaluate_on_a_steered_model_is_evaluate_with_hooks(models):
    model = models["qwen2"]
    task = talking_task(model, 16)
    exact = ReadSettings("exact")
    unsteered = evaluate(model, task, settings=exact)
    for positions in ("all", "last", "final", "generated"):
        steering = steering_for(model, positions)
        with_hooks = evaluate(model, task, steering.fwd_hooks(), settings=exact)
        with steering.attach(model):
            attached = evaluate(model, task, settings=exact)
        assert torch.equal(with_hooks.predictions, attached.predictions)
        torch.testing.assert_close(with_hooks.probs, attached.probs)
        assert not torch.equal(attached.probs, unsteered.probs), positions


@pytest.mark.filterwarnings("ignore:A steering was attached")
def test_the_first_k_tokens_are_counted_on_a_models_own_generate(models, originals):
    """With and without a cache, and in a loop that the user wrote."""
    model, hf = models["qwen2"], originals["qwen2"]
    prompts = model.tokenize(PROMPTS)
    whole, none = (steering_for(model, "generated", first_k=k) for k in (None, 0))
    for positions in ("last", "generated", "all"):
        steering = steering_for(model, positions, first_k=2)
        expected = ours(model, prompts, steering)
        for cache in (True, False):
            assert torch.equal(theirs(hf, prompts, steering, use_cache=cache), expected)
    few = theirs(hf, prompts, replace(whole, first_k=2))
    assert not torch.equal(few, theirs(hf, prompts, whole))  # controls
    assert not torch.equal(few, theirs(hf, prompts, none))
    with torch.no_grad(), replace(whole, first_k=2).attach(hf):
        tokens, cache = torch.tensor(prompts[:1]), None
        for expected in few[0].tolist():
            out = hf(tokens, past_key_values=cache, use_cache=True)
            tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            assert tokens.item() == expected


@pytest.mark.parametrize("positions", ["all", "last", "final", "generated"])
def test_padding_on_either_side_reads_the_same(models, originals, positions):
    """Log-likelihoods do not depend on the batch: the final prompt token is each row's own."""
    model, hf = models["qwen2"], originals["qwen2"]
    steering, prompts = steering_for(model, positions), model.tokenize(PROMPTS)
    with torch.no_grad(), steering.attach(hf):
        alone = [hf(torch.tensor([p])).logits[0] for p in prompts]
        for side in ("left", "right"):
            ids, mask = padded(prompts, side)
            batch = hf(ids, attention_mask=mask).logits
            for row, expected in enumerate(alone):
                torch.testing.assert_close(
                    batch[row][mask[row] == 1], expected, atol=1e-4, rtol=1e-4
                )


def test_beams_and_draws_are_rows_of_their_prompt(models, originals):
    model, hf = models["qwen2"], originals["qwen2"]
    steering, prompts = steering_for(model, "last"), model.tokenize(PROMPTS[:3])
    one = theirs(hf, prompts, steering, num_beams=1)
    assert torch.equal(one, ours(model, prompts, steering))
    for cache in (True, False):
        beams = theirs(hf, prompts, steering, num_beams=3, num_return_sequences=2, use_cache=cache)
        alone = [
            theirs(hf, [p], steering, num_beams=3, num_return_sequences=2, use_cache=cache)
            for p in prompts
        ]
        assert torch.equal(beams, torch.cat(alone)) and len(beams) == 6
    ids, mask = padded(prompts)
    with steering.attach(hf):
        torch.manual_seed(0)
        cached = hf.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=True)
        torch.manual_seed(0)
        again = hf.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=True, use_cache=False
        )
    assert torch.equal(cached, again)


def test_a_hook_runs_once_per_layer_and_token_and_nothing_stays(models, originals):
    model, hf = models["llama"], originals["llama"]
    (prompt,) = model.tokenize(PROMPTS[:1])
    ids = torch.tensor([prompt])
    before = hf(ids).logits
    with steering_for(model).attach(hf) as attachment:
        for n_generations in (1, 2):
            hf.generate(ids, max_new_tokens=N_NEW, do_sample=False)
            # The last token is emitted but never fed back: 1 prompt pass and N_NEW - 1 others.
            assert attachment.n_calls == n_generations * model.n_layers * (1 + N_NEW - 1)
    assert torch.equal(hf(ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())
    assert "generate" not in vars(hf)


def test_exceptions_leave_no_hook_and_steering_twice_is_refused(models, originals):
    model, hf = models["llama"], originals["llama"]
    steering = steering_for(model)

    def fail(*args):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"), steering.attach(hf):
        hf.generate(torch.tensor([[4, 5]]), max_new_tokens=3, stopping_criteria=[fail])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())
    assert "generate" not in vars(hf)
    with steering.attach(hf):
        with pytest.raises(ValueError, match="steered already"), steering.attach(hf):
            pass
        assert hf(torch.tensor([[4, 5]])).logits.isfinite().all()
    for other in (steering, replace(steering, layers=(0,), positions="generated")):
        hooks = [*replace(steering, layers=(1,)).fwd_hooks(), *other.fwd_hooks()]
        with pytest.raises(ValueError, match="hooks of several"), attach_hooks(hf, hooks):
            pass
    with steering.attach(hf):  # and free again
        hf(torch.tensor([[4, 5]]))


def test_above_every_limit_nothing_changes_bit_for_bit_and_it_is_said(models, originals):
    model, hf = models["gemma2"], originals["gemma2"]
    ids, mask = padded(model.tokenize(PROMPTS))
    options = dict(attention_mask=mask, max_new_tokens=N_NEW, do_sample=False)
    options |= dict(output_logits=True, return_dict_in_generate=True)
    plain, steering = hf.generate(ids, **options), steering_for(model)
    with (
        pytest.warns(UserWarning, match=r"moved no token: the highest predicted error was \d\.\d+"),
        replace(steering, probe=replace(steering.probe, bias=steering.probe.bias - 100)).attach(hf),
    ):
        steered = hf.generate(ids, **options)
    assert all(map(torch.equal, plain.logits, steered.logits))
    with steering.attach(hf):  # the control
        moved = hf.generate(ids, **options)
    assert not torch.equal(plain.logits[0], moved.logits[0])


def test_where_the_place_is_unknown_the_pass_is_refused(models, originals):
    model, hf = models["llama"], originals["llama"]
    ids, mask = padded(model.tokenize(PROMPTS[:2]))
    with steering_for(model, "last").attach(hf):
        with pytest.raises(ValueError, match="no attention mask"):
            hf(ids)
        first = hf(ids, attention_mask=mask, use_cache=True)
        with pytest.raises(ValueError, match="2 columns came on a cache"):
            longer = torch.cat([mask, mask[:, :1] * 0 + 1, mask[:, :1] * 0 + 1], 1)
            hf(ids[:, -2:], attention_mask=longer, past_key_values=first.past_key_values)
        hf(ids[:1])  # one row is never padded
    with steering_for(model, "all").attach(hf):
        hf(ids)  # and everywhere is everywhere
    with pytest.raises(ValueError, match="Linear is no model that can be steered"):
        steering_for(model).attach(torch.nn.Linear(2, 2)).__enter__()
    probe = random_probe(SimpleNamespace(n_layers=5, d_model=32))
    with pytest.raises(ValueError, match="moves layer 3, but LlamaForCausalLM has 3 layers"):
        Steering(probe, layers=(1, 3)).at(0.5).attach(hf).__enter__()


def test_a_batch_in_bfloat16_is_steered_in_float32_and_cast_once(models, originals, checkpoints):
    from transformers import AutoModelForCausalLM

    model = models["qwen2"]
    hf = AutoModelForCausalLM.from_pretrained(checkpoints["qwen2"], dtype=torch.bfloat16).eval()
    steering, prompts = steering_for(model), model.tokenize(PROMPTS)
    ids, mask = padded(prompts)
    seen = {}

    def keep(module, args, output):
        seen[module] = output[0] if isinstance(output, tuple) else output

    hook = steering.fwd_hooks()[1][1]
    layer = hf.model.layers[1]
    with torch.no_grad(), steering.attach(hf):
        handle = layer.register_forward_hook(keep)  # after ours: sees what it passed on
        batch = hf(ids, attention_mask=mask).logits
        handle.remove()
        alone = hf(torch.tensor([prompts[0]])).logits
    passed_on = seen[layer]
    assert batch.dtype == passed_on.dtype == torch.bfloat16
    score = passed_on[mask.bool()].float() @ hook.weights + hook.bias
    assert score.max() < 0.1  # the limit is 0, up to the rounding of one cast
    torch.testing.assert_close(batch[0][mask[0] == 1], alone[0], atol=0.15, rtol=0.05)


def by_answer(model, positions: str = "last") -> Steering:
    """Every token moves: along a direction to one answer, against it to the other."""
    steering = steering_for(model, positions)
    both = torch.stack([steering.direction, -steering.direction])
    return replace(steering, direction=both, rule=Adaptive(-2.0))


def test_steering_by_the_answer_runs_the_answer_pass_itself(models, originals, checkpoints):
    from transformer_lens.model_bridge import TransformerBridge

    model, hf, task = models["qwen2"], originals["qwen2"], make_task(12)
    options = option_tokens(model, task, ReadSettings("last"))
    steering = by_answer(model)
    prompts = model.tokenize([example.prompt for example in task.examples])
    expected = read_batch(model, prompts, options, ReadSettings("last"), steering.fwd_hooks())
    ids, mask = padded(prompts)
    bridge = TransformerBridge.boot_transformers(str(checkpoints["qwen2"]), device="cpu")
    for host in (hf, model.hooked, bridge.original_model):
        with torch.no_grad(), steering.attach(host, options=options):
            out = host(ids, attention_mask=mask)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        probs = options.class_logits(logits[:, -1]).softmax(-1)
        torch.testing.assert_close(probs, expected.probs, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        plain = options.class_logits(hf(ids, attention_mask=mask).logits[:, -1]).softmax(-1)
    assert (plain - expected.probs).abs().max() > 0.01
    with pytest.raises(ValueError, match="about to answer; pass options="):
        steering.attach(hf).__enter__()
    with torch.no_grad(), steering.attach(hf, options=options):
        with pytest.raises(ValueError, match="must come as tokens"):
            hf(inputs_embeds=hf.get_input_embeddings()(ids), attention_mask=mask)
        assert not any(len(m._forward_hooks) > 1 for m in hf.modules())


@pytest.mark.parametrize("positions", ["all", "last", "final"])
@pytest.mark.parametrize("readout", ["options", "last"])
def test_a_certified_steering_by_the_answer_knows_its_options(
    models, originals, readout, positions
):
    """Each prompt is steered as by the plain steering of the answer that it was about to get."""
    model, hf = models["qwen2"], originals["qwen2"]
    options = mixed_options(model)
    if readout == "options":  # of several tokens, which takes more than the logits of the prompt
        options = tuple(f"{option} red" for option in options)
    task = make_task(12, options=options).subset(range(12), role="calibration")
    read = ReadSettings(readout)
    decision = calibrate(model, task, by_answer(model, positions), min_gain=-0.99, settings=read)
    steering = decision.steering
    prompts = model.tokenize([example.prompt for example in task.examples])[:6]
    answers = evaluate(model, task, settings=read).predictions.tolist()
    assert len(set(answers[:6])) == 2
    single = [replace(steering, direction=steering.direction[i]) for i in (0, 1)]
    expected = [theirs(hf, [p], single[a])[0] for p, a in zip(prompts, answers[:6], strict=True)]
    for cache in (True, False):
        assert torch.equal(theirs(hf, prompts, steering, use_cache=cache), torch.stack(expected))
    texts = [example.prompt for example in task.examples][:6]
    for reply, row in zip(
        generate(model, texts, steering, max_new_tokens=N_NEW), expected, strict=True
    ):
        said = row.tolist()
        assert list(reply.tokens) == said[: said.index(2) if 2 in said else N_NEW]
    wrong = [theirs(hf, [p], single[1 - a])[0] for p, a in zip(prompts, answers[:6], strict=True)]
    assert not torch.equal(torch.stack(wrong), torch.stack(expected))  # the control


def test_what_a_certificate_was_not_judged_with_is_said(models, checkpoints):
    """`generate` takes settings from the model's own configuration that our decoding has not."""
    model, hf = models["llama"], original(checkpoints["llama"])
    options = mixed_options(model)
    task = make_task(12, options=options).subset(range(12), role="calibration")
    steering = calibrate(model, task, steering_for(model), min_gain=-0.99).steering
    assert steering is not None
    ids, mask = padded(model.tokenize(PROMPTS[:2]))
    told = {"attention_mask": mask, "max_new_tokens": 3}

    def said(which, **options):
        with warnings.catch_warnings(record=True) as seen, which.attach(hf):
            warnings.simplefilter("always")
            hf.generate(ids, **told, **options)
            hf.generate(ids, **told, **options)
        return [str(each.message) for each in seen if "generation_config" in str(each.message)]

    assert not said(steering)  # the control: greedy, and nothing else
    hf.generation_config.repetition_penalty, hf.generation_config.do_sample = 1.3, True
    (sentence,) = said(steering)  # once
    assert "do_sample=True, repetition_penalty=1.3" in sentence
    assert "Pass do_sample=False, repetition_penalty=1.0" in sentence
    assert not said(steering, do_sample=False, repetition_penalty=1.0)
    assert not said(replace(steering))  # which nothing is promised of


def test_the_log_has_a_line_per_prompt_which_the_monitor_takes(models, originals, tmp_path, mera):
    from mera_tl.steering import hash_of_prompt

    model, hf, path = models["llama"], originals["llama"], tmp_path / "audit.jsonl"
    prompts = model.tokenize(PROMPTS[:3])
    steering = steering_for(model)
    ids, mask = padded(prompts)
    with steering.attach(hf, log=path):
        hf.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, num_beams=2)
        hf.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=4, do_sample=False)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [hash_of_prompt(prompts[i]) for i in (0, 1, 2, 0)]
    assert [line["n_prompt"] for line in lines] == [len(prompts[i]) for i in (0, 1, 2, 0)]
    assert all(line["fired"] and line["shift"] > 0 for line in lines)
    assert all(0.5 < line["predicted_error"] < 1 for line in lines)
    assert lines[3]["n_steerable"] == model.n_layers * (len(prompts[0]) + 3)
    # Audited: which of these were answered better, or worse, than unsteered.
    audits = tmp_path / "outcomes.jsonl"
    rows = [{"prompt": hash_of_prompt(p), "steered": 0, "unsteered": 1} for p in prompts]
    audits.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")
    said = mera("monitor", audits, "--log", path, "--state", tmp_path / "monitor.json").out
    assert "3 audited pairs (0 better, 3 worse)" in said


def test_a_log_does_not_say_of_rows_that_it_lost_that_nothing_was_moved(
    models, originals, tmp_path
):
    """By hand, with finished rows left out: what is said not to have fired counts as no harm."""
    model, hf = models["llama"], originals["llama"]
    ids, mask = padded(model.tokenize(PROMPTS[:2]))
    longer = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)[1:]

    def two_passes(log):
        with steering_for(model).attach(hf, log=log) as attached:
            cache = hf(ids, attention_mask=mask, use_cache=True).past_key_values
            cache.batch_select_indices(torch.tensor([1]))
            hf(ids[1:, -1:], attention_mask=longer, past_key_values=cache)
        return attached.n_steered

    assert two_passes(None) > 0  # the control: counted, if not row by row
    with pytest.raises(ValueError, match="from 2 to 1 rows .* the log must know"):
        two_passes(tmp_path / "audit.jsonl")


def test_fixed_strengths_are_attached_too(models, originals):
    model, hf = models["llama"], originals["llama"]
    steering = replace(steering_for(model), rule=Additive(0.5), layers=(1,))
    ids = torch.tensor([[4, 5, 6]])
    seen = []
    with torch.no_grad():
        handle = hf.model.layers[1].register_forward_hook(lambda m, a, out: seen.append(out[0]))
        hf(ids)
        handle.remove()
        with steering.attach(hf):
            handle = hf.model.layers[1].register_forward_hook(lambda m, a, out: seen.append(out[0]))
            hf(ids)
            handle.remove()
    change = (seen[1] - seen[0]).reshape(-1, model.d_model)
    assert steering.fwd_hooks()[0][0] == resid_post(1)
    torch.testing.assert_close(change.norm(dim=-1), 0.5 * steering.probe.resid_norm[1].expand(3))
