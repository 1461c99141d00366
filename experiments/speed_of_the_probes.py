"""How fast are all probes, against a loop over scikit-learn in the same process?

The paper's grid (least squares, six lassos, L1 logistic; five folds), processor time of one thread.
Expected: the published workload (8 layers, 2 positions, 600 examples, width 256: 640 fits) in under
0.8 s, and a Gemma-2-2B-sized layer (3,000 examples, width 2,304) at least 20 times faster than the
loop where features are as collinear as real ones. Activations are from `model` if it exists, else
drawn with a power-law spectrum: variance falls as i**-3.4 in sms-llama, and i**-2 is much harder.
At last all layers of such a model are fitted, on all cores: under five minutes, within 6 GiB.
Ten minutes; the large loop runs `loop_folds` folds and its time is scaled to five.
"""

import os
import resource
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time

import torch
import tyro
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression
from threadpoolctl import threadpool_limits

import mera_tl
from mera_tl.inference import Activations, Outcomes
from mera_tl.probes import cross_validation, probe_path
from mera_tl.storage import fingerprint, write_records

RESULTS = Path(__file__).parent / "results" / "speed_of_the_probes"
SHARED = Path(__file__).parents[2] / "shared"


@dataclass(frozen=True)
class Config:
    model: Path = SHARED / "models/sms-llama"
    data_dir: Path = SHARED / "data"
    n: int = 600
    repeats: int = 5
    large_layers: int = 2
    large_n: int = 3000
    large_width: int = 2304
    decays: tuple[float, ...] = (3.4, 2.0)
    whole_layers: int = 26
    """Layers of the whole model that is fitted at last; 0 leaves it out."""
    loop_folds: int = 1
    """Folds that the scikit-learn loop runs on each large layer; its time is scaled to all five."""


def drawn(shape: tuple[int, int, int], positions: tuple[str, ...], decay: float) -> Activations:
    """Draw activations [example layer d]; the error is linear in ten features, plus noise."""
    (n, _, width), generator = shape, torch.Generator().manual_seed(0)
    by_position = {}
    for position in positions:
        spectrum = torch.arange(1, width + 1) ** (-decay / 2)
        axes = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
        resid = torch.randn(shape, generator=generator) * spectrum @ axes
        by_position[position] = resid / resid.std((0, 1))
    score = by_position[positions[-1]][:, -1, :10].sum(-1) / 2
    error = torch.sigmoid(score + torch.randn(n, generator=generator))
    zero, wrong = torch.zeros(n, dtype=torch.long), (error > 0.5).long()
    probs = torch.stack([1 - error, error], 1)
    parts = (torch.arange(n), zero, wrong, probs, *[zero] * 4, *[torch.zeros(n)] * 2)
    return Activations(by_position, Outcomes(("a", "b"), *parts), {"model": "drawn"})


def collected(config: Config) -> Activations:
    if not config.model.exists():
        return drawn((config.n, 8, 256), ("last", "exact"), config.decays[0])
    template = config.model / "prompt_template.txt"
    task = mera_tl.load_task("sms_spam", data_dir=config.data_dir, template=template)
    model = mera_tl.load_model(str(config.model))
    return mera_tl.collect(model, task.subset(range(config.n)))


def loop(activations: Activations, position: str, n_folds: int) -> tuple[float, int]:
    """Fit the same grid one model at a time; return seconds and how many ran out of iterations."""
    resid, target = activations.resid(position).double(), torch.logit(activations.error, eps=0.01)
    incorrect, failed, start = ~activations.correct, 0, process_time()
    for x in (resid - resid.mean(1, keepdim=True)) / resid.std(1, keepdim=True):
        for rows in cross_validation.folds(incorrect, 0)[:n_folds]:
            features, errors = x[rows].numpy(), target[rows].numpy()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                LinearRegression().fit(features, errors)
                for penalty in cross_validation.LASSO:
                    Lasso(alpha=penalty).fit(features, errors)
                logistic = LogisticRegression(l1_ratio=1.0, solver="liblinear")
                logistic.fit(features, incorrect[rows].numpy())
            failed += sum("converge" in str(warning.message) for warning in caught)
    return process_time() - start, failed


def compare(name: str, activations: Activations, repeats: int, n_folds: int) -> dict[str, object]:
    positions = tuple(activations.by_position)
    times = []
    for _ in range(repeats):
        start = process_time()
        probe_path(activations, grid=cross_validation.PUBLISHED, positions=positions)
        times.append(process_time() - start)
    with threadpool_limits(1):
        loops = [loop(activations, position, n_folds) for position in positions]
    ours = sorted(times)[len(times) // 2]
    theirs = sum(seconds for seconds, _ in loops) * cross_validation.N_FOLDS / n_folds
    n, layers, width = activations.by_position[positions[0]].shape
    return {
        "workload": name,
        "layers": layers * len(positions),
        "n": n,
        "width": width,
        "fits": layers * len(positions) * cross_validation.N_FOLDS * 8,
        "seconds": round(ours, 3),
        "seconds_loop": round(theirs, 1),
        "ratio": round(theirs / ours, 1),
        "loop_out_of_iterations": sum(failed for _, failed in loops),
        "loop_fits_run": layers * len(positions) * n_folds * 8,
        "peak_gib": peak_gib(),
    }


def peak_gib() -> float:
    """Return the most memory that this process has held."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def fit_whole(config: Config, decay: float) -> dict[str, object]:
    """Fit every layer of a large model on all cores; return wall and processor time."""
    n, layers, width = config.large_n, config.whole_layers, config.large_width
    activations, n_threads = drawn((n, layers, width), ("last",), decay), torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    wall, start = perf_counter(), process_time()
    probe_path(activations, grid=cross_validation.PUBLISHED)
    found = {
        "workload": f"whole Gemma-2-2B-sized model, variance as i**-{decay}",
        "layers": layers,
        "n": n,
        "width": width,
        "fits": layers * cross_validation.N_FOLDS * 8,
        "threads": torch.get_num_threads(),
        "wall_s": round(perf_counter() - wall, 1),
        "seconds": round(process_time() - start, 1),
        "peak_gib": peak_gib(),
    }
    torch.set_num_threads(n_threads)
    return found


def main(config: Config) -> None:
    torch.set_num_threads(1)
    records = [compare("published", collected(config), config.repeats, cross_validation.N_FOLDS)]
    print(records[-1])
    for decay in config.decays if config.large_layers else ():
        shape = (config.large_n, config.large_layers, config.large_width)
        large = drawn(shape, ("last",), decay)
        name = f"Gemma-2-2B-sized, variance as i**-{decay}"
        records.append(compare(name, large, 1, config.loop_folds))
        print(records[-1])
    for decay in config.decays if config.whole_layers else ():
        records.append(fit_whole(config, decay))
        print(records[-1])
    write_records(RESULTS / f"{fingerprint(asdict(config))}.jsonl", records)


if __name__ == "__main__":
    main(tyro.cli(Config))
