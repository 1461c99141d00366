"""Laws of evaluating many steerings at once: each as if alone; rows that do not move are free."""

from dataclasses import replace

import pytest
import torch
from conftest import make_task, organism, random_probe, talking_task

from mera_tl.certificate import DEFAULT_THRESHOLDS
from mera_tl.inference import ReadSettings, collect, evaluate
from mera_tl.models import load_model
from mera_tl.probes import LinearProbe, fit_error_probe
from mera_tl.sae import fit_latent_probe, load_saes
from mera_tl.steering import Adaptive, Additive, Gated, Passes, Steering, evaluate_many
from mera_tl.tasks import load_task

COUNTS = ("n_steered", "n_steerable", "n_tokens", "n_layers")


def many(model):
    """Every rule, scope, set of layers; directions and probes per answer."""
    probe, other = random_probe(model), random_probe(model, seed=1)
    directions = torch.stack([0.5 * probe.weights, -2 * other.weights])
    told = LinearProbe.of_answers(probe, (probe, other))
    mera = Steering(probe, positions="last")
    found = {f"mera at {limit}": replace(mera, rule=Adaptive(limit)) for limit in (-0.5, 0.3, 2.5)}
    found |= {
        f"{positions}, layers {layers}": Steering(
            other, rule=Adaptive(0.2), layers=layers, positions=positions
        )
        for positions in ("last", "final", "generated", "all")
        for layers in ((2,), (0, 1))
    }
    found |= {
        f"{positions}, first {k}": Steering(
            other, rule=Adaptive(0.2), layers=(0, 2), positions=positions, first_k=k
        )
        for positions, k in (("last", 1), ("last", 0), ("generated", 2), ("all", 1))
    }
    found |= {
        "direction per answer": Steering(
            probe, directions, layers=(1,), positions="last", rule=Adaptive(-0.5)
        ),
        "gate, probe per answer": Steering(
            told, directions, layers=(1, 2), positions="last", rule=Gated(-0.5, 1.5)
        ),
        "probe per answer, whole prompt": Steering(told, rule=Gated(0.5, 0.5)),
        "fixed": Steering(other, layers=(1,), positions="last", rule=Additive(0.3)),
        "fixed, all": Steering(probe, layers=(0,), rule=Additive(0.1)),
        "nothing": Steering(probe, positions="last"),
    }
    return found


def assert_same(cheap, whole, name, tolerance=1e-5):
    assert torch.equal(cheap.predictions, whole.predictions), name
    assert (cheap.probs - whole.probs).abs().max() < tolerance, name
    for count in COUNTS:
        assert torch.equal(getattr(cheap, count), getattr(whole, count)), (name, count)
    assert (cheap.shift - whole.shift).abs().max() < 1e-3, name
    finite = whole.max_score > -torch.inf
    assert torch.equal(finite, cheap.max_score > -torch.inf), name
    assert torch.allclose(cheap.max_score[finite], whole.max_score[finite], atol=1e-4), name


def hooks_of(steering):
    return steering.reading_hooks() if steering.limit == float("inf") else steering.fwd_hooks()


@pytest.mark.parametrize("readout", ["options", "last", "exact"])
def test_each_of_many_equals_itself_alone(model, readout):
    check_each(model, readout)


@pytest.mark.parametrize(("family", "readout"), [("gemma2", "exact"), ("llama", "options")])
def test_each_equals_itself_under_the_other_engine(family, readout, checkpoints):
    model = load_model(str(checkpoints[family]), device="cpu", engine="hugging_face")
    assert model.resumes
    check_each(model, readout)


def test_the_other_engine_runs_only_layers_above_the_first_steered_one(checkpoints):
    model = load_model(str(checkpoints["llama"]), device="cpu", engine="hugging_face")
    assert model.resumes  # which is tried once, at a few tokens
    task, rows = make_task(14), [0] * model.n_layers
    some = [
        Steering(random_probe(model, seed=i), layers=(0,), positions="final", rule=Gated(-99.0))
        for i in range(4)
    ]

    def counting(module, args, out):
        rows[[layer.mlp for layer in model.hooked.layers].index(module)] += len(out)

    handles = [layer.mlp.register_forward_hook(counting) for layer in model.hooked.layers]
    evaluate_many(model, task, some)
    for handle in handles:
        handle.remove()
    assert rows[2] - rows[0] == 4 * 14


def check_each(model, readout):
    words = ("very good film", "blue bird")
    task = make_task(14, options=words) if readout == "options" else talking_task(model, 14)
    settings = ReadSettings(readout, batch_tokens=140)
    steerings = many(model)
    roomy = replace(settings, batch_tokens=2048)
    plain = evaluate(model, task, settings=roomy)
    outcomes = evaluate_many(model, task, list(steerings.values()), settings=settings)
    decided = evaluate_many(model, task, list(steerings.values()), settings=settings, decide=True)
    moved = 0
    for (name, steering), cheap, rough in zip(steerings.items(), outcomes, decided, strict=True):
        whole = evaluate(model, task, hooks_of(steering), settings=roomy)
        assert_same(cheap, whole, name)
        assert torch.equal(rough.predictions, whole.predictions), name
        moved += int((whole.probs - plain.probs).abs().max() > 1e-3)
    assert moved >= 9  # most of them do something
    if readout == "exact":  # what can be no answer any more is not decoded to its end
        length = [sum(len(r) for run in runs for r in run.replies) for runs in (decided, outcomes)]
        assert length[0] < length[1]


def assert_equal(some, others):
    for one, other in zip(some, others, strict=True):
        for name in ("predictions", "probs", "max_score", "shift", *COUNTS):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.replies == other.replies


@pytest.mark.parametrize("engine", ["transformer_lens", "hugging_face"])
@pytest.mark.parametrize("readout", ["options", "last", "exact"])
def test_who_starts_from_a_kept_pass_answers_as_from_its_own(engine, readout, checkpoints):
    model = load_model(str(checkpoints["llama"]), device="cpu", engine=engine)
    words = ("very good film", "blue bird")
    task = make_task(8, options=words) if readout == "options" else talking_task(model, 8)
    steerings, passes = list(many(model).values())[::3], Passes()
    settings = ReadSettings(readout, batch_tokens=140)
    for decide in (False, True):
        for part, some in ((task, steerings[::2]), (task, steerings), (task.subset(range(3)), [])):
            told = {"settings": settings, "decide": decide}
            asked = some or steerings
            own = evaluate_many(model, part, asked, **told)
            assert_equal(evaluate_many(model, part, asked, **told, passes=passes), own)


def test_a_kept_pass_is_not_run_again_and_what_does_not_fit_is():
    model, splits = organism(), organism_task()
    probe = fit_error_probe(collect(model, splits.train))
    none, some = ([Steering(probe, positions="last").at(t)] for t in (0.999999, 0.4))

    def cost(steerings, passes, **told):
        told = {"settings": ReadSettings(), "passes": passes, **told}
        work = lambda: evaluate_many(model, splits.calibration, steerings, **told)  # noqa: E731
        return tokens_through_blocks(model, work)

    passes, small = Passes(), Passes(1000)
    first = cost(none, passes)
    assert cost(none, passes) < first / 4  # what the prompts begin with is run
    assert cost(some, passes) < cost(some, None) - first / 2
    assert cost(none, small) == cost(none, small) == first
    assert cost(none, passes, decide=True) > first / 2  # other readings are no pass of these
    assert cost(none, passes, settings=ReadSettings("last")) > first / 2


def organism_task(n=60):
    return load_task("spam_cue").split(0, train=240, calibration=n, test=10)


def test_in_the_latents_of_an_sae_each_equals_itself_alone():
    model, splits = organism(), organism_task(24)
    space = load_saes("organism", (1, 2), model)
    probe = fit_latent_probe(collect(model, splits.train), space)
    layer = space.layers[:1]
    steerings = [
        Steering(probe, space=space, layers=layer, positions="last").at(t) for t in (0.2, 0.5)
    ] + [Steering(probe, space=space).at(0.3)]
    outcomes = evaluate_many(model, splits.calibration, steerings)
    for steering, cheap in zip(steerings, outcomes, strict=True):
        whole = evaluate(model, splits.calibration, steering.fwd_hooks())
        assert_same(cheap, whole, steering.rule)
        assert (whole.n_steered > 0).any()


def tokens_through_blocks(model, work):
    """Count the (token, layer) pairs that are run."""
    counts = []
    handles = [
        block.register_forward_hook(lambda module, args, out: counts.append(out[..., 0].numel()))  # noqa: ARG005
        for block in model.hooked.blocks
    ]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
    return sum(counts)


def test_ten_thresholds_on_whole_prompts_cost_at_most_four_evaluations():
    model, splits = organism(), organism_task()
    probe = fit_error_probe(collect(model, splits.train))
    steering = Steering(probe, layers=(2,))  # from layer 1 of 4 it costs 5.2 evaluations
    grid = [steering.at(t) for t in DEFAULT_THRESHOLDS]
    one = tokens_through_blocks(model, lambda: evaluate(model, splits.calibration))
    ten = tokens_through_blocks(model, lambda: evaluate_many(model, splits.calibration, grid))
    assert len(grid) == 10
    assert one <= ten <= 4 * one


def test_steerings_that_are_made_one_by_one_share_their_prompts():
    """Each has a residual space of its own, equal to the others'."""
    model, splits = organism(), organism_task()
    probe = fit_error_probe(collect(model, splits.train))
    grid = [Steering(probe, layers=(2,), positions="last").at(t) for t in DEFAULT_THRESHOLDS]
    assert len({id(each.space) for each in grid}) == len(grid)
    one, ten = (
        tokens_through_blocks(model, lambda n=n: evaluate_many(model, splits.calibration, grid[:n]))
        for n in (1, 10)
    )
    assert one < ten < 2 * one


@pytest.mark.parametrize(("positions", "readout"), [("last", "options"), ("generated", "exact")])
def test_what_is_not_finite_is_refused_as_alone(models, positions, readout):
    """Not taken for an answer: the likeliest of options that are all NaN is the first."""
    model, read = models["llama"], ReadSettings(readout)
    steering = Steering(random_probe(model), rule=Additive(3e38), layers=(1,))
    steering, task = replace(steering, positions=positions), talking_task(model)
    with pytest.raises(ValueError, match="not finite from layer 1 on"):
        evaluate(model, task, steering.fwd_hooks(), settings=read)
    for decide in (False, True):
        with pytest.raises(ValueError, match="not finite from layer 1 on"):
            evaluate_many(model, task, [steering], settings=read, decide=decide)
