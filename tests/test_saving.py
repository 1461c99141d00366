"""Laws of saved decisions: bit for bit what was certified, for that model only, or refused."""

import dataclasses
import html
import json
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import organism, random_probe, talking_task

from mera_tl import storage
from mera_tl.certificate import Calibration, calibrate, certify, load_steering
from mera_tl.inference import evaluate
from mera_tl.sae import load_saes
from mera_tl.steering import SAESpace, Steering
from mera_tl.tasks import load_task


@pytest.fixture(scope="module")
def decided(models):
    """A model, a task and a decision to steer (there is hardly anything that is not promised)."""
    model = models["llama"]
    task = talking_task(model).subset(range(20), role="calibration")
    torch.manual_seed(1)
    direction = torch.randn(2, model.n_layers, model.d_model)
    where: dict = {"layers": (0, 2), "positions": "last", "first_k": 3}
    steering = Steering(random_probe(model), direction, **where)
    grid = [steering.at(threshold) for threshold in (0.3, 0.5)]
    return model, task, calibrate(model, task, grid, min_gain=-0.99)


def test_what_is_loaded_steers_as_what_was_saved_bit_for_bit(decided, tmp_path):
    model, task, decision = decided
    folder = decision.save(tmp_path / "steering")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "steering.json",
        "steering.safetensors",
    ]
    loaded = load_steering(folder, model=model)
    assert loaded.certificate == decision and loaded.first_k == 3
    assert str(decision).split("\n")[0] in (folder / "README.md").read_text()
    runs = [evaluate(model, task, steering.fwd_hooks()) for steering in (decision.steering, loaded)]
    assert torch.equal(runs[0].probs, runs[1].probs) and runs[0].n_steered.sum() > 0
    assert Calibration.load(folder) == decision
    decision.save(folder)  # again, in its place
    assert load_steering(folder).certificate == decision
    assert not list(tmp_path.glob(".*"))


def test_a_kill_while_a_decision_is_replaced_loses_neither_for_good(decided, tmp_path, monkeypatch):
    """The old one had gone before the new one came, into a folder that was never looked at."""
    decision = decided[2]
    folder, rename = decision.save(tmp_path / "steering"), os.replace
    monkeypatch.setattr(
        os, "replace", lambda old, new: os._exit(9) if new == folder else rename(old, new)
    )
    if not (child := os.fork()):
        decision.at(min_gain=-0.5).save(folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    assert not folder.exists()  # the instant in which neither is in its place
    assert Calibration.load(folder) == load_steering(folder).certificate == decision
    other = decision.at(min_gain=-0.5)
    other.save(folder)
    assert Calibration.load(folder) == other
    assert {path.suffix for path in tmp_path.glob(".*")} == {".tmp"}  # what `sweep` removes


def test_a_folder_of_several_certificates_names_those_that_steer(decided, tmp_path):
    decision = decided[2]
    for certificates in (tmp_path / "certificates", tmp_path / "run" / "certificates"):
        decision.save(certificates / "steers")
        decision.at(min_gain=0.99).save(certificates / "abstains")
    for folder in (tmp_path, tmp_path / "certificates", tmp_path / "run"):
        with pytest.raises(ValueError, match="pass one that steers: .*steers") as error:
            load_steering(folder)
        assert "abstains" not in str(error.value)
    shutil.rmtree(tmp_path / "certificates" / "steers")
    with pytest.raises(ValueError, match="and none steers"):
        load_steering(tmp_path / "certificates")


def test_another_model_is_refused_and_gets_no_certificate(decided, models, tmp_path):
    _, task, decision = decided
    folder, other = decision.save(tmp_path / "steering"), models["qwen2"]
    with pytest.raises(ValueError, match="certified on .* with weights .* anyway=True"):
        load_steering(folder, model=other)
    with pytest.raises(ValueError, match="with weights"):
        load_steering(folder).check(other)
    anyway = load_steering(folder, model=other, anyway=True)
    assert "NOT CERTIFIED" in str(anyway.certificate) and "weights" in str(anyway.certificate)
    assert "NoCertificate" in repr(anyway) and "NOT CERTIFIED" in anyway._repr_html_()
    promise = str(decision).partition("\n")[0]
    assert html.escape(promise) in load_steering(folder)._repr_html_()
    anyway.check(other)
    assert evaluate(other, task, anyway.fwd_hooks()).n_steered.sum() > 0
    chatty = dataclasses.replace(decided[0], chat=True)
    with pytest.raises(ValueError, match="template"):
        load_steering(folder, model=chatty)
    briefed = dataclasses.replace(decided[0], system="Answer at random.")
    with pytest.raises(ValueError, match="with system prompt None, but .* has Answer at random"):
        load_steering(folder, model=briefed)
    load_steering(folder).check(decided[0])  # control


def test_a_model_of_another_shape_is_refused_whatever_is_asked(decided, tmp_path):
    folder = decided[2].save(tmp_path / "steering")
    with pytest.raises(ValueError, match="certified on .* but organism has"):
        load_steering(folder, model=organism(), anyway=True)


def test_changes_of_any_file_are_found(decided, tmp_path):
    folder = decided[2].save(tmp_path / "steering")
    content = json.loads((folder / "steering.json").read_text())

    def write(changed, sealed=True):
        changed = {name: value for name, value in changed.items() if name != "seal"}
        seal = storage.fingerprint(changed) if sealed else content["seal"]
        storage.write_json(folder / "steering.json", {**changed, "seal": seal})

    write({**content, "probe": {**content["probe"], "clip": 0.2}}, sealed=False)
    with pytest.raises(ValueError, match="changed after it was saved"):
        load_steering(folder)
    rows = json.loads(json.dumps(content["evidence"]))
    rows[content["chosen"]]["steering"]["limit"] = 2.0
    write({**content, "evidence": rows})
    with pytest.raises(ValueError, match="threshold of this steering is not the one"):
        load_steering(folder)
    write({**content, "chosen": None})
    with pytest.raises(ValueError, match="does not follow from its own evidence"):
        load_steering(folder)
    write({**content, "format": 99})
    with pytest.raises(ValueError, match="another version"):
        load_steering(folder)
    write(content)
    load_steering(folder)  # control
    tensors = storage.load_tensors(folder / "steering.safetensors")
    tensors["direction"][0, 0, 0] += 1e-6
    storage.save_tensors(folder / "steering.safetensors", tensors)
    with pytest.raises(ValueError, match="direction of this steering is not the one"):
        load_steering(folder)
    (folder / "steering.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged"):
        load_steering(folder)
    (folder / "steering.json").unlink()
    with pytest.raises(ValueError, match="no file"):
        load_steering(folder)


def test_an_abstention_is_kept_and_steers_nothing(decided, tmp_path):
    none = decided[2].at(min_gain=0.99)
    folder = none.save(tmp_path / "none")
    assert Calibration.load(folder) == none and Calibration.load(folder).fwd_hooks() == []
    assert not (folder / "steering.safetensors").exists()
    with pytest.raises(ValueError, match="decision was to abstain; take one that steers"):
        load_steering(folder)


def test_a_certificate_of_what_moves_nothing_says_that_it_holds_no_steering(tmp_path):
    gains = np.repeat([[1.0, 0.0]], (60, 40), axis=1)
    folder = certify(gains, candidates=[{"threshold": 0.7}]).save(tmp_path / "flip")
    with pytest.raises(ValueError, match="moves no activations, such as the method flip"):
        load_steering(folder)


def test_a_folder_of_something_else_is_left_alone(decided, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds other files"):
        decided[2].save(tmp_path)
    with pytest.raises(ValueError, match=r"thesis.tex cannot be written \(Not a folder\)"):
        decided[2].save(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    with pytest.raises(ValueError, match="neither a folder nor a steering that could be fetched"):
        load_steering("nobody/nothing")


def test_a_steering_in_sae_space_needs_the_saes_it_was_made_with(tmp_path):
    model = organism()
    saes = load_saes("organism", (1,), model)
    width = (model.n_layers, saes.d_sae)
    probe = dataclasses.replace(random_probe(model), weights=torch.randn(width) / 10)
    task = load_task("spam_cue").split(0, calibration=20, test=20).calibration
    steering = Steering(probe, space=saes, layers=(1,), positions="last").at(0.4)
    decision = calibrate(model, task, steering, min_gain=-0.99)
    folder = decision.save(tmp_path / "steering")
    with pytest.raises(ValueError, match="in SAE space; pass space"):
        load_steering(folder)
    assert load_steering(folder, model=model, space=saes).certificate == decision
    other = load_saes("organism", (2,), model)
    with pytest.raises(ValueError, match="no SAE of layer 1"):
        load_steering(folder, space=other)
    wrong = SAESpace({1: other.saes[2]})
    with pytest.raises(ValueError, match="pass the SAEs it was made with"):
        load_steering(folder, space=wrong)
    assert Calibration.load(folder) == decision  # the certificate alone needs none


def test_loading_says_nothing_that_a_person_must_not_worry_about(decided, tmp_path):
    folder = decided[2].save(tmp_path / "steering")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_steering(folder)


def test_numbers_of_numpy_are_sealed_as_they_are_written(tmp_path):
    """A layer chosen by idxmax made a folder that said of itself that it had been changed."""
    value = {"layers": [np.int64(2)], "strength": np.float32(0.3)}
    storage.write_json(tmp_path / "value.json", value)
    assert storage.fingerprint(value) == storage.fingerprint(
        storage.read_json(tmp_path / "value.json")
    )
