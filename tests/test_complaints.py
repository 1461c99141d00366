"""Complaints of users of other steering tools, as laws that hold here."""

from dataclasses import replace

import pytest
import torch
from conftest import make_task, random_probe, talking_task

from mera_tl import Additive, Steering, collect, fit_error_probe, load_model
from mera_tl.inference import ReadSettings, evaluate
from mera_tl.steering import SAESpace, fit_direction


def test_left_padding_on_gpt2_with_the_hugging_face_engine(checkpoints, models):
    """Absolute positions count real tokens, so a padded prompt reads as it does alone."""
    engine = load_model(str(checkpoints["gpt2"]), device="cpu", engine="hugging_face")
    task = talking_task(models["gpt2"], 12)
    steering = Steering(random_probe(engine, scale=3.0), positions="last").at(0.3)
    runs = [
        evaluate(engine, task, steering.fwd_hooks(), settings=ReadSettings(batch_size=size))
        for size in (1, 12)
    ]
    torch.testing.assert_close(runs[0].probs, runs[1].probs, atol=1e-4, rtol=1e-4)
    assert torch.equal(runs[0].predictions, runs[1].predictions)
    other = evaluate(models["gpt2"], task, steering.fwd_hooks())
    torch.testing.assert_close(runs[0].probs, other.probs, atol=1e-4, rtol=1e-4)
    assert not torch.equal(runs[0].probs, evaluate(engine, task).probs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_does_not_depend_on_the_batch_size_beyond_rounding(checkpoints, dtype):
    model = load_model(str(checkpoints["qwen2"]), device="cpu", dtype=dtype, engine="hugging_face")
    task = make_task(8)
    steering = Steering(random_probe(model, scale=3.0)).at(0.3)
    settings = [ReadSettings("last", batch_size=size) for size in (1, 8)]
    one, many = (evaluate(model, task, steering.fwd_hooks(), settings=s) for s in settings)
    torch.testing.assert_close(one.probs, many.probs, atol=0.06, rtol=0)


def test_labels_of_calibration_and_test_leave_probes_and_directions_byte_identical(models):
    """Nothing but the training split is read by a fit."""
    model = models["llama"]
    task = talking_task(model, 60)
    generator = torch.Generator().manual_seed(0)

    def fit(shuffle: tuple[str, ...]):
        train, calibration, test = task.split(seed=0)
        parts = {"train": train, "calibration": calibration, "test": test}
        for name in shuffle:
            labels = torch.tensor(parts[name].labels)
            order = torch.randperm(len(labels), generator=generator)
            examples = [
                replace(e, label=int(label))
                for e, label in zip(parts[name].examples, labels[order], strict=True)
            ]
            parts[name] = replace(parts[name], examples=tuple(examples))
        activations = collect(model, parts["train"], settings=ReadSettings("exact"))
        for name in ("calibration", "test"):
            evaluate(model, parts[name])
        probe = fit_error_probe(activations)
        return probe.weights, fit_direction(activations, probe, "contrastive").vectors

    plain, other = fit(()), fit(("calibration", "test"))
    assert all(map(torch.equal, plain, other))
    assert not torch.equal(plain[0], fit(("train",))[0])  # the control


def test_a_large_edit_of_a_latent_moves_the_logits_though_the_error_term_is_kept(models):
    from sae_lens.saes import standard_sae

    torch.manual_seed(0)
    model, task = models["llama"], make_task(6)
    sae = standard_sae.StandardSAE(standard_sae.StandardSAEConfig(d_in=32, d_sae=64))
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn_like(weight) / 6)
    space = SAESpace({1: sae})
    probe = replace(random_probe(model), weights=-torch.rand(3, 64))  # away from it: latents up
    settings = ReadSettings("last")

    def probs(strength: float) -> torch.Tensor:
        steering = Steering(probe, rule=Additive(strength), space=space, layers=(1,))
        return evaluate(model, task, steering.fwd_hooks(), settings=settings).probs

    plain = evaluate(model, task, settings=settings).probs
    assert torch.equal(probs(0.0), plain)  # what the SAE does not explain is kept, bit for bit
    assert (probs(20.0) - plain).abs().max() > 0.01
