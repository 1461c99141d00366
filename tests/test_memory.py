"""What a run is said to take is what it takes: bytes exact, what passes within a third."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, make_task, talking_task, write_task

from mera_tl.benchmark import RunConfig, memory
from mera_tl.inference import ReadSettings, collect, tokenize_task
from mera_tl.models import load_model


def profiled_peak(work) -> int:
    """Return the most bytes that were allocated at once while `work` ran."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        _kept = work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_cache_are_exact(family, models, checkpoints):
    model, outline = models[family], load_model(str(checkpoints[family]), device="meta")
    weights = list(model.hooked.parameters())
    stores = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in weights}
    held = sum(stores.values())
    assert memory.weight_bytes(outline) == held
    cache, tokens = model.new_cache(5), torch.ones(5, 11, dtype=torch.long)
    model.next_token_logits(tokens, torch.ones_like(tokens), cache)
    kept = [t for entry in cache.entries for t in (entry.past_keys, entry.past_values)]
    assert memory.cache_bytes(outline, 5, 11) == sum(t.numel() * t.element_size() for t in kept)


@pytest.mark.parametrize("shape", [(24, 12), (2, 60)])
def test_what_passes_is_within_a_third_of_the_profile(shape, model):
    rows, columns = shape

    def work():
        tokens = torch.ones(rows, columns, dtype=torch.long)
        with torch.inference_mode():
            cache = model.new_cache(rows)
            return model.next_token_logits(tokens, torch.ones_like(tokens), cache), cache

    cache = memory.cache_bytes(model, rows, columns)
    said = cache + memory.passing_bytes(model, rows, columns)
    assert 0.9 < said / profiled_peak(work) < 1.35
    assert said > 2 * cache  # positive control: the cache alone would not have been enough


@pytest.mark.parametrize("readout", ["exact", "last"])
def test_the_file_of_activations_is_exact(readout, model, tmp_path):
    settings, task = ReadSettings(readout), talking_task(model)
    collect(model, task, settings=settings, out=tmp_path)
    size = (tmp_path / "activations.safetensors").stat().st_size
    assert memory.activation_bytes(model, len(task), settings) == size


def test_an_estimate_looks_at_the_largest_batch_and_advises(checkpoints, models, tmp_path):
    config = RunConfig(model=str(checkpoints["llama"]), task=write_task(tmp_path), device="cpu")
    found = memory.estimate(memory.planned(config))
    run = memory.Run(config, Path(), load=lambda _: models["llama"])
    longest = max(len(p) for split in run.splits for p in tokenize_task(run.model, split, run.read))
    assert f"up to {longest} tokens" in found.batch
    assert found.fits and found.advice == "This fits."
    batch = found.cache + found.passing + found.copies
    assert found.device == found.process + found.weights + batch + found.kept
    assert found.process > 2**27 and 0 < found.kept < found.free / 8
    halved = replace(found, free=found.weights + batch // 2)
    assert not halved.fits and "--batch-tokens 9" in halved.advice  # 0.9 x half of 2,048
    assert "bfloat16" in replace(found, free=found.weights - 1).advice
    assert "--train" in replace(found, free_disk=found.disk - 1).advice
    gpu = replace(found, on_gpu=True)
    assert f"--batch-tokens {memory.GPU_TOKENS}" in gpu.advice
    for word in ("weights", "cache", "disk", "KiB", "GiB"):
        assert word in str(found)


@pytest.mark.parametrize(
    ("size", "text"), [(999, "999 B"), (1024, "1 KiB"), (3 * 2**29, "1.5 GiB")]
)
def test_bytes_for_people(size, text):
    assert memory.human(size) == text


def test_memory_does_not_grow_with_the_activations_collected(models, tmp_path):
    """Only answers are kept, a few numbers an example; in memory, everything is."""
    model, positions = models["llama"], 2
    sizes, settings = (100, 900), ReadSettings("exact_anywhere")

    def grown(folder: Path | None) -> float:
        """Return the bytes that each further example adds to the peak."""
        few, many = (
            profiled_peak(lambda n=n: collect(model, make_task(n), settings=settings, out=folder))
            for n in sizes
        )
        return (many - few) / (sizes[1] - sizes[0])

    collect(model, make_task(100), settings=settings)  # what is allocated once, is by now
    each = positions * model.n_layers * model.d_model * 4
    assert grown(tmp_path) < each / 2
    assert grown(None) > each / 2  # positive control: without a folder they are kept
