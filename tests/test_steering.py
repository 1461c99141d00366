"""The laws of the rule and of its hooks, on all four families."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_task, mixed_options, random_probe, talking_task

from mera_tl.inference import (
    Decoding,
    ReadSettings,
    Window,
    evaluate,
    hooked_pass,
    left_pad,
    option_tokens,
    read_batch,
)
from mera_tl.models import resid_post
from mera_tl.steering import (
    Adaptive,
    Additive,
    Gated,
    ResidualSpace,
    Steering,
    evaluate_many,
    explain,
    generate,
)


def random_vectors(n: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 16, generator=generator).unbind()


# --- the rule -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prediction_equals_the_limit_above_it_and_nothing_moves_below(dtype):
    w, d, *hs = (v.to(dtype) for v in random_vectors(42))
    d = d if w @ d > 0 else -d
    h, bias, limit = torch.stack(hs), 0.3, 0.5
    score = h @ w + bias
    assert (score > limit).any()
    assert (score < limit).any()
    rule = Adaptive(limit)
    for direction in (w, d):
        shift = rule.amount(score)[:, None] * rule.step(w, direction, torch.tensor(1.0))
        after = (h + shift) @ w + bias
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        assert (after[score > limit] - limit).abs().max() < tolerance
        assert torch.equal(shift[score <= limit], torch.zeros_like(shift[score <= limit]))


def test_euclidean_shift_is_the_papers_formula_and_the_shortest():
    w, d, h, *_ = random_vectors(5)
    d = d if w @ d > 0 else -d
    score = h @ w
    rule = Adaptive((score - 1).item())
    shift = rule.amount(score) * rule.step(w, w, torch.tensor(1.0))
    paper = -(score - rule.limit).clamp(min=0) * (w / (w * w).sum())
    assert torch.equal(shift, paper)
    along = rule.amount(score) * rule.step(w, d, torch.tensor(1.0))
    assert shift.norm() < along.norm()
    # any other shift that reaches the limit is longer
    for other in random_vectors(50, seed=1):
        sideways = other - (other @ w) / (w @ w) * w
        assert (shift + sideways).norm() > shift.norm()


def test_no_direction_no_shift():
    w, _, h = random_vectors(3)
    one = torch.tensor(1.0)
    rule = Adaptive(-100.0)
    assert rule.amount(h @ w) > 0
    for direction in (torch.zeros(16), -w):  # nothing there, or no way to lower the score
        assert torch.equal(rule.step(w, direction, one), torch.zeros(16))
    assert torch.equal(rule.step(torch.zeros(16), torch.zeros(16), one), torch.zeros(16))
    assert torch.equal(Additive(1.0).step(w, torch.zeros(16), one), torch.zeros(16))


def test_additive_strength_is_in_units_of_the_residual_norm():
    w, d, _ = random_vectors(3)
    step = Additive(0.5).step(w, d, torch.tensor(12.0))
    assert step.norm().item() == pytest.approx(12.0)
    assert step @ d < 0


# --- hooks on models ----------------------------------------------------------------------------


def steered(model, limit=0.0, **scope):
    return replace(Steering(random_probe(model), **scope), rule=Adaptive(limit))


def logits_of(model, prompts, hooks):
    with torch.inference_mode(), hooked_pass(model, hooks):
        return Decoding(model, prompts, hooks).prompt()


def prompts_of(model, task):
    return model.tokenize([example.prompt for example in task.examples])


def test_infinite_limit_is_bit_equal_to_no_steering(model, task):
    prompts = prompts_of(model, task)
    plain = logits_of(model, prompts, ())
    assert torch.equal(logits_of(model, prompts, Steering(random_probe(model)).fwd_hooks()), plain)
    moved = logits_of(model, prompts, steered(model).fwd_hooks())
    assert (moved - plain).abs().max() > 1e-3  # the hooks do reach the logits


@pytest.mark.parametrize("positions", ["all", "last", "generated"])
def test_alone_equals_batched_and_left_padded(model, task, positions):
    hooks = steered(model, positions=positions).fwd_hooks()
    together = evaluate(model, task, hooks)
    alone = evaluate(model, task, hooks, settings=ReadSettings(batch_size=1))
    assert (together.probs - alone.probs).abs().max() < 1e-4
    assert torch.equal(together.predictions, alone.predictions)
    assert torch.equal(together.n_steered, alone.n_steered)
    assert torch.equal(together.n_steerable, alone.n_steerable)
    if positions != "generated":
        assert together.n_steered.sum() > 0


@pytest.mark.parametrize("positions", ["all", "last", "generated"])
def test_cached_equals_uncached(model, positions):
    """Decode six tokens with a cache; recompute every step from scratch under a full window."""
    prompts = prompts_of(model, make_task(6))
    hooks = steered(model, positions=positions).fwd_hooks()
    with torch.inference_mode(), hooked_pass(model, hooks):
        decoding = Decoding(model, prompts, hooks)
        logits, emitted = decoding.prompt(), []
        for _ in range(6):
            emitted.append(logits.argmax(-1))
            logits = decoding.next(emitted[-1])
        tokens, mask = left_pad(prompts, model.device)
        n_prompt = tokens.shape[1]
        new = torch.stack(emitted, dim=1)
        tokens, mask = torch.cat([tokens, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
        for name, _ in hooks:
            model.hooked.hook_dict[name].ctx["window"] = Window(mask.bool(), n_prompt)
        uncached = model.next_token_logits(tokens, mask)
    assert (logits - uncached).abs().max() < 1e-4


def test_scopes_steer_the_tokens_they_name(model):
    task = make_task(5)
    lengths = torch.tensor([len(tokens) for tokens in prompts_of(model, task)])
    settings = ReadSettings(readout="last")
    counts = {
        scope: evaluate(
            model, task, steered(model, -1e9, positions=scope).fwd_hooks(), settings=settings
        )
        for scope in ("all", "last", "generated")
    }
    assert torch.equal(counts["all"].n_steered, lengths * model.n_layers)
    assert torch.equal(counts["last"].n_steered, torch.full_like(lengths, model.n_layers))
    assert counts["generated"].n_steered.sum() == 0


def test_last_scope_leaves_earlier_positions_alone(model):
    prompts = prompts_of(model, make_task(4))
    seen = {}

    def look(resid, hook):
        seen[hook.name] = resid.clone()

    probes = [(resid_post(layer), look) for layer in range(model.n_layers)]
    logits_of(model, prompts, probes)
    before = dict(seen)
    logits_of(model, prompts, [*steered(model, -5.0, positions="last").fwd_hooks(), *probes])
    for name, resid in before.items():
        assert torch.equal(seen[name][:, :-1], resid[:, :-1])
        assert (seen[name][:, -1] - resid[:, -1]).abs().max() > 1e-3


def test_layers_scope_hooks_only_those_layers(model):
    probe = random_probe(model)
    assert [n for n, _ in Steering(probe, layers=(2, 0)).fwd_hooks()] == [
        resid_post(0),
        resid_post(2),
    ]
    assert [n for n, _ in Steering(probe, layers="best").fwd_hooks()] == [resid_post(1)]
    with pytest.raises(ValueError, match="numbered 0 to 2"):
        Steering(probe, layers=(3,))


def test_scores_after_steering_equal_the_limit_inside_the_model(model):
    """The last steered layer's stream, read after its hook, predicts at most the limit."""
    probe, limit = random_probe(model), 0.2
    prompts = prompts_of(model, make_task(8))
    seen = []

    def look(resid, hook):  # noqa: ARG001
        seen.append(resid.clone())

    layer = model.n_layers - 1
    hooks = replace(Steering(probe, layers=(layer,)), rule=Adaptive(limit)).fwd_hooks()
    logits_of(model, prompts, [(resid_post(layer), look)])
    logits_of(model, prompts, [*hooks, (resid_post(layer), look)])
    before, after = (x @ probe.weights[layer] + probe.bias[layer] for x in seen)
    assert (before > limit).any()
    assert (before < limit).any()
    assert (after[before > limit] - limit).abs().max() < 1e-4
    assert torch.equal(after[before <= limit], before[before <= limit])


def test_bfloat16_stream_is_not_promoted(checkpoints):
    from mera_tl.models import load_model

    model = load_model(str(checkpoints["llama"]), dtype="bfloat16", device="cpu")
    seen = []
    hooks = steered(model, -1.0).fwd_hooks()
    look = [(resid_post(2), lambda resid, hook: seen.append(resid.dtype))]  # noqa: ARG005
    logits = logits_of(model, prompts_of(model, make_task(4)), [*hooks, *look])
    assert logits.dtype == torch.bfloat16
    assert seen == [torch.bfloat16]


def test_hooks_are_gone_after_an_exception_and_context_with_them(model, task):
    def fail(resid, hook):
        raise RuntimeError("on purpose")

    hooks = [*steered(model).fwd_hooks(), (resid_post(2), fail)]
    with pytest.raises(RuntimeError, match="on purpose"):
        evaluate(model, task, hooks)
    for point in model.hooked.hook_dict.values():
        assert not point.fwd_hooks
        assert not point.ctx


def test_a_hook_that_matches_nothing_is_an_error(model, task):
    with pytest.raises(ValueError, match=r"blocks\.9\.hook_resid_post"):
        evaluate(model, task, [(resid_post(9), lambda x, hook: x)])


def test_plain_transformer_lens_hooks_work_without_a_window(model):
    """In a notebook the hooks go straight onto the HookedTransformer."""
    tokens = torch.tensor([[1, 5, 9, 8, 7]])
    mask = torch.ones_like(tokens)
    hooks = steered(model, -1.0).fwd_hooks()
    with torch.no_grad(), model.hooked.hooks(fwd_hooks=hooks):
        there = model.hooked(tokens, attention_mask=mask)[:, -1]
    assert (there - logits_of(model, tokens.tolist(), hooks)).abs().max() < 1e-5


def test_one_direction_per_answer_runs_the_last_token_twice(model):
    """Both directions zero but one: only rows whose unsteered answer is that option move."""
    task = make_task(16, options=mixed_options(model))
    settings = ReadSettings(readout="last")
    options, prompts = option_tokens(model, task, settings), prompts_of(model, task)
    probe = random_probe(model)
    direction = torch.stack([torch.zeros_like(probe.weights), probe.weights])
    steering = Steering(probe, direction, Adaptive(-5.0), positions="last")
    plain = read_batch(model, prompts, options, settings)
    moved = read_batch(model, prompts, options, settings, steering.fwd_hooks())
    says_second = plain.predictions == 1
    assert says_second.any()
    assert not says_second.all()
    change = (moved.probs - plain.probs).abs().amax(-1)
    assert (change[says_second] > 1e-4).all()
    assert (change[~says_second] < 1e-5).all()  # the second run of the token equals the first
    assert torch.equal(moved.n_steered > 0, says_second)
    tokens = torch.tensor([[1, 5, 9]])
    with (
        model.hooked.hooks(fwd_hooks=steering.fwd_hooks()),
        pytest.raises(ValueError, match="called from outside cannot know"),
    ):
        model.hooked(tokens)


def test_steering_refuses_what_cannot_fit():
    model = type("Tiny", (), {"n_layers": 3, "d_model": 8})
    probe = random_probe(model)
    with pytest.raises(ValueError, match="does not fit a probe"):
        Steering(probe, torch.zeros(2, 8))
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        Steering(probe).at(1.0)
    for nearly in (1 - 1e-9, 1e-60):  # at which float32 steers nothing, or everything by infinity
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            Steering(probe).at(nearly)
    assert Steering(probe).at(1e-30).limit > -70
    for name in ("weights", "bias"):
        broken = getattr(probe, name).clone()
        broken[1] = torch.nan  # which is above no limit, and would move nothing
        steering = Steering(replace(probe, **{name: broken})).at(0.5)
        replace(steering, layers=(0,)).fwd_hooks()  # the control
        with pytest.raises(ValueError, match="of layer 1 holds NaN"):
            steering.fwd_hooks()
    with pytest.raises(ValueError, match="direction of layer 0 holds NaN"):
        Steering(probe, probe.weights / 0).at(0.5).fwd_hooks()
    assert isinstance(Steering(probe).space, ResidualSpace)


def test_a_steering_of_another_width_or_number_of_options_is_one_sentence(models):
    """It ended in an error of torch's, from somewhere within a pass."""
    model, task = models["llama"], make_task(4)
    probe = random_probe(model)
    wide = replace(probe, weights=torch.randn(model.n_layers, model.d_model + 1))
    three = Steering(probe, torch.randn(3, model.n_layers, model.d_model))
    for steering, said in ((Steering(wide), r"reads 33 features .* has 32"), (three, "3 options")):
        steering = steering.at(0.3)
        calls = [
            lambda s=steering: evaluate(model, task, s.fwd_hooks()),
            lambda s=steering: evaluate_many(model, task, [s, s.at(0.4)]),
            lambda s=steering: explain(model, task.examples[0], s),
        ]
        if not steering.per_answer:  # else it needs the options of a certificate
            calls.append(lambda s=steering: generate(model, ["good film"], s, max_new_tokens=2))
        for call in calls:
            with pytest.raises(ValueError, match=said):
                call()
    many = replace(probe, weights=probe.weights.repeat(2, 1, 1), bias=probe.bias.repeat(2, 1))
    with pytest.raises(ValueError, match="knows 2 answers and the direction 3"):
        Steering(many, three.direction)
    evaluate(model, make_task(4, options=("yes", "no", "good")), three.at(0.3).fwd_hooks())


@pytest.mark.parametrize("positions", ["all", "last", "generated"])
def test_what_was_moved_is_counted_as_by_hand(model, positions):
    """Run each prompt alone, look at every layer before and after its hook, and count."""
    task, hooks = talking_task(model), steered(model, 0.3, positions=positions).fwd_hooks()
    got = evaluate(model, task, hooks)
    before, passes, shares = {}, [], []

    def look(resid, hook):
        before[hook.name] = resid[0]

    def compare(resid, hook):
        change = (resid[0] - before[hook.name]).norm(dim=-1)
        shares.extend((change / before[hook.name].norm(dim=-1))[change > 0].tolist())
        passes.extend([[]] if hook.name == hooks[0][0] else [])
        passes[-1].append(change > 0)

    spied = [part for name, hook in hooks for part in ((name, look), (name, hook), (name, compare))]
    for i in range(len(task)):
        passes.clear()
        evaluate(model, task.subset([i]), spied)
        moved = torch.cat([torch.stack(layers) for layers in passes], dim=1)
        assert int(got.n_steered[i]) == int(moved.sum())
        assert int(got.n_tokens[i]) == int(moved.any(0).sum())
        assert int(got.n_layers[i]) == int(moved.any(1).sum())
    assert got.relative_shift == pytest.approx(sum(shares) / max(1, len(shares)), rel=1e-4)
    if positions != "generated":
        assert 0 < got.n_steered.sum() < got.n_steerable.sum()
    assert evaluate(model, task).relative_shift == 0  # control: nothing moved


def test_two_hooks_on_one_layer_count_each_for_itself(models):
    """Hooks that only read come last, and say of their own that they moved nothing."""
    model = models["llama"]
    task, one = talking_task(model), steered(model, 0.3, layers=(0, 1), positions="last")
    reading = replace(one, positions="all").reading_hooks()
    alone, both = (evaluate(model, task, [*one.fwd_hooks(), *more]) for more in ([], reading))
    assert torch.equal(both.probs, alone.probs) and alone.n_steered.any()
    for name in ("n_steered", "n_tokens", "n_layers", "shift"):
        assert torch.equal(getattr(both, name), getattr(alone, name)), name
    assert (both.n_steerable > alone.n_steerable).all()
    assert (both.max_score >= alone.max_score).all()


def test_a_rule_without_a_limit_has_no_threshold(model):
    steering = Steering(random_probe(model), rule=Additive(0.3))
    with pytest.raises(ValueError, match="has no threshold"):
        steering.at(0.5)  # control: it used to become MERA's rule
    assert replace(steering, rule=Gated()).at(0.5).rule == Gated(limit=0.0)


def test_hooks_that_can_move_nothing_say_so(model, recwarn):
    steering = Steering(random_probe(model))
    with pytest.warns(UserWarning, match="has no threshold yet"):
        steering.fwd_hooks()
    recwarn.clear()
    steering.reading_hooks(), steering.at(0.5).fwd_hooks()
    assert not recwarn
    against = replace(steering, direction=-steering.probe.weights)
    with pytest.warns(UserWarning, match="rule moves nothing here .*score does not fall"):
        against.at(0.5).fwd_hooks()
    recwarn.clear()
    replace(against, rule=Gated()).at(0.5).fwd_hooks()
    assert not recwarn


def test_the_highest_score_is_that_of_real_tokens(model):
    """Padding has scores too; an example's highest must not come from there."""
    probe = random_probe(model)
    ((_, hook),) = Steering(probe, layers=(1,)).reading_hooks()
    resid = torch.zeros(2, 3, model.d_model)
    resid[0, 0] = 100 * probe.weights[1]  # a padded column that the probe finds very wrong
    real = torch.tensor([[False, True, True], [True, True, True]])
    point = SimpleNamespace(ctx={"window": Window(real, 3)})
    assert hook(resid, point) is resid
    assert torch.equal(point.ctx["left"][0]["max_score"], probe.bias[1].expand(2))
