"""SAE space from the command line: train, report, run, compare, refuse."""

import json
import shutil
import sys

import conftest
import pytest
from conftest import SMALL, call_mera, change_one_bit

from mera_tl import storage
from mera_tl.benchmark import GridConfig, run_grid
from mera_tl.methods import METHODS, find_methods

STARRED = [n for n, m in METHODS.items() if m.in_latents and "steering" not in n]


@pytest.fixture(scope="module")
def trained(checkpoints, toy, tmp_path_factory):
    """SAEs of layers 0 and 1, as `mera sae train` leaves them."""
    with pytest.MonkeyPatch.context() as patch:
        out = tmp_path_factory.mktemp("saes")
        options = ["--layers", "0-1", "--n-steps", 40, "--step-tokens", 64, "--expansion", 2]
        told = ["sae", "train", "--model", checkpoints["llama"], "--task", toy, "--out", out]
        assert call_mera(patch, *told, *options) == 0
    return out


def arguments(checkpoints, toy, trained, out, **changes):
    return conftest.arguments(checkpoints, toy, out, **{"space": "sae", "sae": trained} | changes)


def test_training_leaves_saes_that_a_report_reads(mera, checkpoints, toy, trained):
    assert sorted(path.name for path in trained.iterdir()) == ["layer_0", "layer_1"]
    told = ["--model", checkpoints["llama"], "--task", toy, "--sae", trained]
    printed = mera("sae", "report", *told).out
    for column in ("l0", "dead", "accuracy"):  # longer names wrap
        assert column in printed


def test_every_starred_method_runs_in_latents(mera, checkpoints, toy, trained, tmp_path):
    told = arguments(checkpoints, toy, trained, tmp_path / "run")
    mera("run", *told, "--methods", "no_steering", *STARRED)
    records = storage.read_records(tmp_path / "run" / "records.jsonl")
    assert [r["method"] for r in records] == [
        "no_steering",
        *sorted(STARRED, key=list(METHODS).index),
    ]
    assert {r["space"] for r in records} == {"sae"}
    by_method = {r["method"]: r for r in records}
    # Thirty answers of a random model: the difference of means is all that reads anything in them.
    assert by_method["vanilla_contrastive"]["steered_share"] > 0
    assert by_method["optimal_probe"]["certificate"]
    probe = storage.load_tensors(tmp_path / "run" / "probes" / "contrastive" / "probe.safetensors")
    assert probe["weights"].shape == (3, 64)
    assert probe["weights"][0].any()
    assert not probe["weights"][2].any()
    # What abstained is explained, too: its probe reads latents, and nothing was moved.
    abstained = next(r["method"] for r in records if r["decision"] == "ABSTAIN")
    told = mera("explain", tmp_path / "run", "--method", abstained).out
    assert "Nothing was moved." in " ".join(told.split())


def test_saes_of_a_sibling_say_how_well_they_reconstruct(mera, checkpoints, toy, trained, tmp_path):
    borrowed = shutil.copytree(trained, tmp_path / "saes")
    for path in borrowed.glob("*/cfg.json"):
        config = json.loads(path.read_text())
        config["metadata"] |= {"model_name": "gpt2-it", "model_fingerprint": None}
        path.write_text(json.dumps(config))
    told = arguments(checkpoints, toy, borrowed, tmp_path / "run")
    assert "ask for it with sibling" in mera("run", *told, "--methods", "no_steering", code=2).err
    printed = mera("run", *told, "--sae-sibling", "--methods", "no_steering").out
    assert "SAEs of a sibling of" in printed and "on 30 training prompts" in printed
    for column in ("l0", "dead", "accuracy"):  # longer names wrap
        assert column in printed
    own = arguments(checkpoints, toy, trained, tmp_path / "own")
    assert "SAEs of a sibling" not in mera("run", *own, "--methods", "no_steering").out


def test_a_folder_knows_its_saes(mera, checkpoints, toy, trained, tmp_path):
    own = shutil.copytree(trained, tmp_path / "saes")
    told = arguments(checkpoints, toy, own, tmp_path / "run") + ["--methods", "no_steering"]
    mera("run", *told)
    for path in own.glob("*/*"):
        path.touch()  # a copy of the same
    mera("run", *told)
    change_one_bit(next(own.glob("*/*.safetensors")))
    assert "changed: its SAEs)" in mera("run", *told, code=2).err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": "sub_optimal_probe"}, "sub_optimal_probe works in the residual stream only"),
        ({"sae": "nowhere"}, "There are no SAEs at 'nowhere'"),
        ({"layers": "2"}, "none of layer 2"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_run(
    mera, checkpoints, toy, trained, tmp_path, changes, sentence
):
    told = arguments(checkpoints, toy, trained, tmp_path / "run", **changes)
    said = mera("run", *told, code=2).err
    assert sentence in said
    assert len(said.split("mera: ")[1].splitlines()) == 1
    assert not (tmp_path / "run" / "activations").exists()


def test_a_missing_extra_is_named(mera, monkeypatch, checkpoints, toy, trained, tmp_path):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    said = mera("run", *arguments(checkpoints, toy, trained, tmp_path / "run"), code=2).err
    assert "pip install mera-tl[sae]" in said


def test_a_grid_compares_both_spaces_on_the_same_splits(checkpoints, toy, trained, tmp_path):
    config = GridConfig(
        models=(str(checkpoints["llama"]),),
        tasks=(toy,),
        methods=("no_steering", "additive_logistic_probe"),
        spaces=("raw", "sae"),
        sae=str(trained),
        layers="0-1",
        strength=0.5,
        **SMALL,
        readout="last",
    )
    records = run_grid(config, tmp_path)
    assert [(r["method"], r["space"]) for r in records] == [
        (method, space) for space in ("raw", "sae") for method in config.methods
    ]
    raw, sae = (
        {r["method"]: r for r in records if r["space"] == space} for space in ("raw", "sae")
    )
    assert raw["no_steering"]["error"] == sae["no_steering"]["error"]
    assert raw["no_steering"]["hashes"]["data"] == sae["no_steering"]["hashes"]["data"]
    moved = [r["additive_logistic_probe"]["error"] for r in (raw, sae)]
    assert len({raw["no_steering"]["error"], *moved}) == 3


def test_which_methods_work_in_latents():
    assert find_methods(list(METHODS)) == list(METHODS.values())
    with pytest.raises(ValueError, match="in SAE space there are no_steering"):
        find_methods(["tuned_contrastive"], "sae")
