"""A task collected in shards is, byte for byte, the task collected at once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_task

from mera_tl.benchmark import RunConfig, collect_shards, deal, open_run
from mera_tl.benchmark import shards as module
from mera_tl.inference import ReadSettings, by_length

FILES = ("activations.safetensors", "outcomes.jsonl", "manifest.json")


def files(folder: Path) -> list[bytes]:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return [(folder / name).read_bytes() for name in FILES]


@pytest.fixture
def config(checkpoints, tmp_path) -> RunConfig:
    return RunConfig(
        model=str(checkpoints["llama"]), task=write_task(tmp_path), device="cpu", batch_tokens=60
    )


@pytest.fixture
def at_once(config, tmp_path) -> list[bytes]:
    with open_run(config, tmp_path / "whole") as run:
        assert len(run.activations.outcomes) > 10
    return files(tmp_path / "whole" / "activations")


@pytest.mark.parametrize("n_shards", [1, 3, 1000])
def test_shards_join_to_the_same_bytes(n_shards, config, at_once, tmp_path):
    with open_run(config, tmp_path / "run") as run:
        activations = collect_shards(run, n_shards)
        assert activations is not run.activations  # which is now read from the folder
    assert files(tmp_path / "run" / "activations") == at_once


def test_other_batches_give_other_bytes(config, at_once, tmp_path):
    """Positive control: the bytes do tell how prompts were batched."""
    with open_run(replace(config, batch_tokens=25), tmp_path / "run") as run:
        collect_shards(run, 3)
    assert files(tmp_path / "run" / "activations")[0] != at_once[0]


def test_a_lost_shard_is_all_that_is_done_again(config, at_once, tmp_path, monkeypatch):
    done, real = [], module.collect

    def fragile(model, task, **kwargs):
        done.append(len(task))
        if len(done) == 2:
            raise RuntimeError("power cut")
        return real(model, task, **kwargs)

    monkeypatch.setattr(module, "collect", fragile)
    with open_run(config, tmp_path / "run") as run:
        with pytest.raises(ValueError, match=r"1 of 3 shards failed \(first: power cut\)"):
            collect_shards(run, 3)
        collect_shards(run, 3)
    assert len(done) == 4 and done[3] == done[1]
    assert files(tmp_path / "run" / "activations") == at_once


def test_a_shard_batched_by_itself_has_the_batches_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    prompts = [[0] * int(n) for n in torch.randint(1, 60, (500,), generator=generator)]
    for settings in (ReadSettings(batch_tokens=200), ReadSettings(batch_size=7)):
        whole = {tuple(batch) for batch in by_length(prompts, settings)}
        again = set()
        for places in deal(prompts, settings, 4):
            mine = by_length([prompts[i] for i in places], settings)
            again |= {tuple(places[i] for i in batch) for batch in mine}
        assert again == whole
