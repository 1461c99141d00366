"""Which model this is, told of whatever object the user has."""

import pytest
import torch
from conftest import certified, random_probe, talking_task
from conftest import original as loaded
from transformers import LlamaForCausalLM

from mera_tl import collect, fit_error_probe, load_model, load_steering
from mera_tl.models import manifest_of
from mera_tl.steering import Steering


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """A certified steering of the tiny Llama."""
    model = models["llama"]
    decision = certified(model, talking_task(model), steering_of(model))
    return decision.save(tmp_path_factory.mktemp("saved") / "steering")


def steering_of(model):
    return Steering(random_probe(model, scale=3.0), positions="last").at(0.3)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_a_model_of_transformers_has_the_fingerprint_of_its_files(models, checkpoints, family):
    told, model = manifest_of(loaded(checkpoints[family])), models[family]
    assert told == {**{k: model.manifest[k] for k in told}, "model": told["model"]}
    assert manifest_of(model.hooked)["model_fingerprint"] == model.fingerprint  # from loading


def test_a_certified_steering_refuses_other_weights_on_any_kind_of_model(
    folder, models, checkpoints
):
    steering = load_steering(folder)
    own, ids = loaded(checkpoints["llama"]), torch.tensor([[4, 5, 6]])
    with steering.attach(own):  # the control
        assert own(ids).logits.isfinite().all()
    assert load_steering(folder, model=own).certificate == steering.certificate
    with steering.attach(models["llama"].hooked):
        models["llama"].hooked(ids)
    trained = loaded(checkpoints["llama"])
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    nameless = LlamaForCausalLM(own.config)
    nameless.name_or_path = ""
    for other, reason in (
        (loaded(checkpoints["qwen2"]), "Qwen2ForCausalLM has "),
        (trained, "other than those in"),
        (nameless, "from no folder that it names"),
        (own.bfloat16(), "dtype float32, but LlamaForCausalLM has bfloat16|other than"),
    ):
        with pytest.raises(ValueError, match=f"certified on .*({reason}).*anyway=True"):
            steering.attach(other)
    anyway = load_steering(folder, model=nameless, anyway=True)
    with anyway.attach(nameless):
        nameless(ids)


def one_number(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[7, 3] += 1e-3  # of one neuron


def written_past_torch(model):
    model.model.layers[1].mlp.down_proj.weight.data[:, 3] = 0  # an ablated neuron


def changed_places(model):
    """Their sum stays what it was."""
    with torch.no_grad():
        weight = model.model.layers[1].mlp.down_proj.weight
        weight[[0, 1]] = weight[[1, 0]]


class Adapted(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return 1.1 * self.base_layer(x)


def an_adapter(model):
    mlp = model.model.layers[1].mlp
    mlp.down_proj = Adapted(mlp.down_proj)


def another_activation(model):
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()


CHANGES = [one_number, written_past_torch, changed_places, an_adapter, another_activation]


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_while_it_is_known_is_known_no_longer(folder, checkpoints, change):
    model = loaded(checkpoints["llama"])
    load_steering(folder).attach(model)
    change(model)
    with pytest.raises(ValueError, match="other than those in"):
        load_steering(folder).attach(model)


def test_an_adapter_between_the_layers_is_another_model(folder, checkpoints):
    model = loaded(checkpoints["llama"])
    an_adapter(model)
    with pytest.raises(ValueError, match="other than those in"):
        load_steering(folder).attach(model)


def test_a_loaded_model_that_was_changed_is_another_one(checkpoints):
    model = load_model(str(checkpoints["llama"]), device="cpu")
    task = talking_task(model)
    before = certified(model, task, steering_of(model))
    before.check(model)  # the control
    weight = model.hooked.blocks[1].mlp.W_out
    kept = weight.data.clone()
    weight.data[3] = 0
    with pytest.raises(ValueError, match="changed since it was loaded"):
        before.steering.check(model)
    # What is collected, fitted and certified on the changed model is good for that one.
    probe = fit_error_probe(collect(model, task.subset(range(12, 24), role="train")))
    after = certified(model, task, Steering(probe).at(0.3))
    after.check(model)
    probe.check(model)
    weight.data.copy_(kept)
    before.check(model)
    for stale in (after, probe):
        with pytest.raises(ValueError, match="changed since it was loaded"):
            stale.check(model)


def test_a_probe_that_names_no_model_goes_on_any(models, checkpoints):
    Steering(random_probe(models["llama"])).at(0.5).attach(loaded(checkpoints["qwen2"]))


def test_a_hooked_transformer_from_elsewhere_cannot_name_its_weights(folder):
    from transformer_lens import HookedTransformer

    own = load_model("organism").hooked
    stranger = HookedTransformer(own.cfg, None)
    assert manifest_of(stranger)["model_fingerprint"] == "that it cannot name"
    with pytest.raises(ValueError, match="that it cannot name|number of layers"):
        load_steering(folder).attach(stranger)
