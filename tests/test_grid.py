"""A grid of runs survives kills, failures and a second process, and ends with the same records."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, change_one_bit, python, timeless, write_task

from mera_tl import storage
from mera_tl.benchmark import GridConfig, run_grid, run_name
from mera_tl.inference import Activations
from mera_tl.methods import METHODS as METHODS_TABLE
from mera_tl.probes import LinearProbe

METHODS = ("no_steering", "additive_probe", "optimal_probe")


@pytest.fixture(scope="module")
def config(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    return GridConfig(
        models=(str(checkpoints["llama"]),),
        tasks=(write_task(folder, name="first"), write_task(folder, name="second")),
        seeds=(0, 1),
        methods=METHODS,
        **SMALL,
    )


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    return timeless(run_grid(config, tmp_path_factory.mktemp("plain")))


def test_every_job_has_one_record(config, undisturbed):
    jobs = [(r["task"], r["seed"], r["method"]) for r in undisturbed]
    assert len(set(jobs)) == len(jobs) == 2 * 2 * 3
    assert len({run_name(run) for run in config.runs()}) == 4


def test_shared_work_is_done_once(config, tmp_path, monkeypatch):
    from mera_tl.benchmark import grid, run

    counts = {"collect": 0, "load": 0}
    monkeypatch.setattr(grid, "_latest_model", grid.LatestModel())
    real_collect, real_load = run.collect, grid.load_configured

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(run, "collect", counted("collect", real_collect))
    monkeypatch.setattr(grid, "load_configured", counted("load", real_load))
    run_grid(config, tmp_path)
    assert counts == {"collect": 4, "load": 1}
    run_grid(config, tmp_path)  # everything is found again
    assert counts == {"collect": 4, "load": 1}  # not even the model is needed


def test_a_model_that_was_written_anew_under_its_name_is_loaded_anew(config, tmp_path):
    from mera_tl.benchmark import grid

    there, load = shutil.copytree(config.models[0], tmp_path / "model"), grid.LatestModel()
    run = replace(config.runs()[0], model=str(there))
    first = load(run)
    assert load(run) is first
    change_one_bit(there / "model.safetensors")
    assert load(run).fingerprint != first.fingerprint


LOOK = 1 + 30
"""Prompts of a pre-flight: one to warm up, then the training split, which is small."""


@pytest.fixture
def forwards(monkeypatch):
    """The rows of prompts that went through the model."""
    from mera_tl.models import Model

    rows, real = [], Model.next_token_logits

    def counted(self, tokens, mask, *rest):
        rows.extend([len(tokens)] if tokens.shape[1] > 1 else [])
        return real(self, tokens, mask, *rest)

    monkeypatch.setattr(Model, "next_token_logits", counted)
    return rows


def test_a_second_grid_computes_no_prompt_twice(config, tmp_path, forwards, undisturbed):
    cache = tmp_path / "cache"
    first = replace(config, tasks=config.tasks[:1], seeds=(0,), methods=METHODS[:2])
    run_grid(first, tmp_path / "first", cache=cache)
    assert sum(forwards) == LOOK + 30 + 15 + 15  # training, test unsteered and steered
    forwards.clear()
    other = replace(first, layers="1")  # another run, of the same activations
    run_grid(other, tmp_path / "other", cache=cache)
    assert sum(forwards) == 15  # steered
    more = replace(first, methods=METHODS)
    forwards.clear()
    records = run_grid(more, tmp_path / "second", cache=cache)
    with_cache = sum(forwards)
    same = [r for r in undisturbed if (r["task"], r["seed"]) == ("first", 0)]
    assert timeless(records) == same
    assert len(same) == len(METHODS)
    forwards.clear()
    run_grid(more, tmp_path / "alone")
    assert sum(forwards) - with_cache == LOOK + 30 + 15
    n_kept = len(list(cache.iterdir()))
    again = replace(more, layers="1", methods=("optimal_probe",))
    run_grid(again, tmp_path / "third", cache=cache)
    assert len(list(cache.iterdir())) == n_kept  # its probe was there


def test_what_two_processes_make_at_once_is_whole_for_both(tmp_path):
    """Of the same work each is done at about the same time, and takes links from what is there."""
    cache, key, made = tmp_path / "cache", "same", []
    cache.mkdir()

    def make(folder):
        made.append(folder)
        if len(made) == 1:  # while this one works, another one begins and ends
            assert kept("second") == {"n": 1}
        storage.reopen(folder / "x.json")
        shared = [p for p in cache.iterdir() if not p.name.endswith(".tmp")]
        assert all((path / "x.json").exists() for path in shared)  # for a third to link
        storage.write_json(folder / "x.json", {"n": 1})

    def kept(name):
        read = lambda folder: storage.read_json(folder / "x.json")  # noqa: E731
        return storage.kept(tmp_path / name, "x.json", make, read, cache=cache, key=lambda: key)

    assert kept("first") == kept("third") == {"n": 1}
    assert len(made) == 2 and len(list(cache.iterdir())) == 1


def test_other_content_is_not_found_in_the_cache(config, tmp_path, forwards):
    cache = tmp_path / "cache"
    base = replace(config, tasks=config.tasks[:1], seeds=(0,), methods=METHODS[:2])
    run_grid(base, tmp_path / "base", cache=cache)
    wording = tmp_path / "wording.txt"
    wording.write_text("question : {text} answer :")
    for change in ({"template": str(wording)}, {"readout": "last"}, {"seeds": (1,)}):
        forwards.clear()
        run_grid(replace(base, **change), tmp_path / str(change)[2:6], cache=cache)
        assert sum(forwards) == LOOK + 30 + 15 + 15


def test_another_models_work_is_not_found_in_the_cache(config, tmp_path):
    cache, name = tmp_path / "cache", Path(config.models[0]).name
    base = replace(config, tasks=config.tasks[:1], seeds=(0,), methods=METHODS[:2])
    run_grid(base, tmp_path / "base", cache=cache)
    n_kept = len(list(cache.iterdir()))
    change_one_bit(shutil.copytree(config.models[0], tmp_path / name) / "model.safetensors")
    other = replace(base, models=(str(tmp_path / name),))
    run_grid(other, tmp_path / "other", cache=cache)
    assert len(list(cache.iterdir())) == 2 * n_kept > 0


def test_a_failing_job_is_a_record_and_the_others_go_on(
    mera, config, tmp_path, monkeypatch, undisturbed
):
    works = METHODS_TABLE["additive_probe"]

    def fail(run):
        if run.config.seed == 1:
            raise OSError("No space left on device")
        return works.treat(run)

    monkeypatch.setitem(METHODS_TABLE, "additive_probe", replace(works, treat=fail))
    options = ["--methods", *METHODS, "--seeds", "0", "1", "--train", "30", "--out", str(tmp_path)]
    told = ["--models", *config.models, "--tasks", *config.tasks, *options]
    said = mera("benchmark", *told, "--calibration", 15, "--test", 15, code=1).err
    assert "No space left on device" in said
    records = storage.read_records(tmp_path / "records.jsonl")
    failed = [record for record in records if "failure" in record]
    assert [(r["seed"], r["method"]) for r in failed] == [(1, "additive_probe")] * 2
    assert timeless(r for r in records if "failure" not in r) == [
        r for r in undisturbed if not (r["seed"] == 1 and r["method"] == "additive_probe")
    ]
    printed = mera("table", tmp_path, "--format", "csv").out.splitlines()
    assert len(printed) == 1 + len(records) - len(failed)
    assert all(name in printed[0] for name in ("seed", "SPI low", "p,", "layers", "shift", "f1"))
    monkeypatch.undo()  # the disk has room again
    assert timeless(run_grid(config, tmp_path)) == undisturbed


def test_data_that_vanished_fails_its_own_runs_only(config, tmp_path, undisturbed):
    gone = replace(config, tasks=("nowhere/gone.toml", config.tasks[1]))
    records = run_grid(gone, tmp_path)
    assert sum("failure" in record for record in records) == 2 * len(METHODS)
    assert timeless(r for r in records if "failure" not in r) == [
        r for r in undisturbed if r["task"] == undisturbed[-1]["task"]
    ]


def test_two_processes_in_one_folder_are_refused(config, tmp_path):
    with storage.lock(tmp_path), pytest.raises(ValueError, match="in use by another process"):
        run_grid(config, tmp_path)


# A child imports once and forks; each grandchild runs the grid and is killed at a random moment.
HARNESS = """
import os, random, signal, sys, time
import torch; torch.set_num_threads(1)
from mera_tl.benchmark import GridConfig
from mera_tl.benchmark import run_grid
config, folder, kills, seed = eval(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rng, killed = random.Random(seed), 0
while True:
    child = os.fork()
    if child == 0:
        run_grid(config, folder)
        os._exit(0)
    if killed < kills:
        time.sleep(rng.uniform(0, float(sys.argv[5])))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if killed >= kills:
        sys.exit(os.waitstatus_to_exitcode(status))
    killed += os.WIFSIGNALED(status)
    if not os.WIFSIGNALED(status):  # it finished before the shot: begin anew
        import shutil; shutil.rmtree(folder)
"""


def test_killed_at_a_hundred_random_moments_it_ends_the_same(config, tmp_path, undisturbed):
    kills = int(os.environ.get("MERA_TEST_KILLS", "100"))
    folder = tmp_path / "grid"
    python(HARNESS, arguments=(repr(config), folder, kills, 0, 0.5), flags=("-W", "ignore"))
    assert timeless(storage.read_records(folder / "records.jsonl")) == undisturbed
    assert not list(folder.rglob("*.tmp"))  # what the killed ones left is swept up


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    target = tmp_path / "records.jsonl"
    storage.write_records(target, [{"a": 1}])

    class Stop(BaseException):
        pass

    class Poison:
        def __str__(self):
            raise Stop

    with pytest.raises(Stop):
        storage.write_records(target, [{"a": 2}, {"b": Poison()}])
    assert storage.read_records(target) == [{"a": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def test_pairs_choose_what_a_contrastive_probe_compares(tmp_path):
    """Even where the probe of all examples lies in the cache."""
    sizes = {"train": "60", "calibration": "10", "test": "10"}
    base = GridConfig(
        models=("organism",), tasks=("spam_cue",), methods=("vanilla_contrastive",), **sizes
    )
    for pairs in (0, 5):
        config, folder = replace(base, pairs=pairs), tmp_path / str(pairs)
        (record,) = run_grid(config, folder, cache=tmp_path / "cache")
        assert record["details"]["penalty"] == pairs
        folder /= run_name(config.runs()[0])
        (kept,) = (folder / "probes").iterdir()
        activations = Activations.load(folder / "activations")
        resid, k = activations.resid("last"), pairs or len(activations.error) // 2
        order = activations.error.argsort(stable=True)
        wanted = resid[:, order[-k:]].mean(1) - resid[:, order[:k]].mean(1)
        weights = LinearProbe.load(kept).weights
        alike = torch.cosine_similarity(weights, wanted, dim=-1)
        assert ((alike > 0.999) | (weights == 0).all(-1)).all() and (weights != 0).any()
