"""Is the promise of a whole run kept: repeated texts, several methods, limited harm, withholding?

Expected: with one example per text, and with delta shared among methods, at most delta of the runs
promise what is false; without, several times that many do (the controls). Handing shares on finds
more and keeps the promise. Five minutes on one core.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from mera_tl.certificate import (
    certify_withholding,
    share_delta,
    unconditional,
    upper_share,
    withholding_thresholds,
)
from mera_tl.storage import fingerprint, write_records

RESULTS = Path(__file__).parent / "results" / "coverage_of_the_run"
BATCH = 500


@dataclass(frozen=True)
class Config:
    draws: int = 20_000
    n: int = 250
    delta: float = 0.05
    churn: float = 0.1
    """Share of answers that change, where nothing else is said."""
    seed: int = 0


@cache
def gains(better: int, worse: int, n: int, level: float) -> bool:
    return unconditional(better, worse, n, level)(0.0) <= level


@cache
def harmless(worse: int, n: int, level: float, most: float) -> bool:
    return upper_share(worse, n, level) <= most


def tables(rng: Any, n: int, better: Any, worse: Any, shape: tuple[int, ...], nested: float) -> Any:
    """Draw counts of (better, worse) per run and candidate; nested candidates change the same."""
    u = rng.random((*shape, n))
    same = rng.random((shape[0], *[1] * (len(shape) - 1), n))
    u = np.where(rng.random(same.shape) < nested, same, u)
    better, worse = (np.asarray(rate)[..., None] for rate in (better, worse))
    return np.stack(((u < better).sum(-1), (u > 1 - worse).sum(-1)), -1)


def tested(counts: Any, n: int, level: float, most: float | None = None) -> Any:
    """Return which candidates are certified at a level: gain, and harm where it is limited."""
    flat = counts.reshape(-1, 2).tolist()
    sure = [gains(a, b, n, level) and (not most or harmless(b, n, level, most)) for a, b in flat]
    return np.array(sure).reshape(counts.shape[:-1])


def batches(config: Config, *key: int) -> Iterator[Any]:
    rng = np.random.default_rng([config.seed, *key])
    for _ in range(0, config.draws, BATCH):
        yield rng


def copies(config: Config) -> Iterator[dict[str, Any]]:
    """Yield how often useless candidates are certified where each text is there k times."""
    half = config.churn / 2
    for k in (1, 2, 3, 5):
        for n_candidates in (1, 10):
            wrong: dict[str, list[Any]] = {"one per text": [], "every copy": []}
            texts, level = config.n // k, config.delta / n_candidates
            for rng in batches(config, k, n_candidates):
                counts = tables(rng, texts, half, half, (BATCH, n_candidates), 0.0)
                wrong["one per text"].append(tested(counts, texts, level).any(1))
                wrong["every copy"].append(tested(k * counts, k * texts, level).any(1))
            for how, draws in wrong.items():
                what = {"law": "copies", "copies": k, "candidates": n_candidates, "how": how}
                yield what | {"wrong": float(np.concatenate(draws).mean())}


def methods(config: Config) -> Iterator[dict[str, Any]]:
    """Yield how often a run certifies a useless method, and how many good ones it finds."""
    for n_methods, n_good in ((3, 0), (11, 0), (3, 1), (11, 4), (3, 2)):
        names = ["searched", *(f"method {i}" for i in range(n_methods - 1))]
        true = np.where(np.arange(n_methods) < n_good, 0.07, 0.0)
        better, worse = (config.churn + true) / 2, (config.churn - true) / 2
        shares = np.array(list(share_delta(names, config.delta).values()))
        found: dict[str, list[Any]] = {"each at delta": [], "shared": [], "stepping down": []}
        for rng in batches(config, n_methods, n_good):
            counts = tables(rng, config.n, better, worse, (BATCH, n_methods), 0.3)
            alone, shared = (
                np.stack([tested(counts[:, m], config.n, x) for m, x in enumerate(levels)], 1)
                for levels in ([config.delta] * n_methods, shares.tolist())
            )
            found["each at delta"].append(alone)
            found["shared"].append(shared)
            stepped = [
                step(config, row, shares, sure) for row, sure in zip(counts, shared, strict=True)
            ]
            found["stepping down"].append(np.array(stepped))
        for how, draws in found.items():
            sure = np.concatenate(draws)
            what = {"law": "methods", "methods": n_methods, "good": n_good, "how": how}
            power = float(sure[:, :n_good].mean()) if n_good else None
            yield what | {"wrong": float(sure[:, n_good:].any(1).mean()), "power": power}


def step(config: Config, counts: Any, shares: Any, sure: Any) -> Any:
    """Hand the shares of certified methods on, as `step_down` does."""
    sure, new = sure.copy(), sure.any()
    while new and not sure.all():
        levels = config.delta * shares / shares[~sure].sum()
        again = sure | [
            gains(int(a), int(b), config.n, round(float(level), 12))
            for (a, b), level in zip(counts, np.minimum(levels, config.delta), strict=True)
        ]
        new, sure = (again != sure).any(), again
    return sure


def harm(config: Config, most: float = 0.05) -> Iterator[dict[str, Any]]:
    """Yield how often steering is certified, gain and harm at delta each; ten nested candidates."""
    for name, better, worse in (
        ("no gain, little harm", 0.01, 0.01),
        ("gain, too much harm", 0.2, most),
        ("no gain, too much harm", most, most),
        ("gain, little harm", 0.1, 0.01),
    ):
        for n_candidates in (1, 10):
            sure, level = [], config.delta / n_candidates
            for rng in batches(config, n_candidates, int(1000 * better), int(1000 * worse)):
                counts = tables(rng, config.n, better, worse, (BATCH, n_candidates), 0.3)
                sure.append(tested(counts, config.n, level, most).any(1))
            what = {"law": "harm", "how": name, "candidates": n_candidates, "most": most}
            share = float(np.concatenate(sure).mean())
            yield what | ({"power": share} if name == "gain, little harm" else {"wrong": share})


def withholding(config: Config) -> Iterator[dict[str, Any]]:
    """Yield how often more than alpha is certified, and the share answered beside the oracle's."""
    ranks = np.linspace(0, 1, 1001)  # of the predicted error in training: a quantile is a share
    for (skill, alpha), n in product(((0, 0.1), (1, 0.12), (2, 0.05), (2, 0.1)), (250, 1000)):
        shares = withholding_thresholds(ranks, n, alpha=alpha, delta=config.delta)
        # As hard as can be: the risk is alpha at one of the thresholds.
        base = alpha / shares[len(shares) // 2] ** skill
        risks = {share: base * share**skill for share in shares}
        oracle = max((share for share, risk in risks.items() if risk < alpha - 1e-9), default=0.0)
        rng, wrong, answered = np.random.default_rng([config.seed, n]), 0, 0.0
        for _ in range(config.draws):
            rank = rng.random(n)
            correct = rng.random(n) >= base * (skill + 1) * rank**skill
            found = certify_withholding(rank, correct, alpha=alpha, thresholds=shares).threshold
            wrong += found is not None and risks[found] >= alpha - 1e-9
            answered += (found or 0.0) / config.draws
        what = {"law": "withholding", "base": base, "skill": skill, "alpha": alpha, "n": n}
        yield what | {"wrong": wrong / config.draws, "answered": answered, "oracle": oracle}


def main(config: Config) -> None:
    records = []
    for law in (copies, methods, harm, withholding):
        for record in law(config):
            records.append(record | {"draws": config.draws})
            print(records[-1], flush=True)
    write_records(RESULTS / f"{fingerprint(asdict(config))}.jsonl", records)


if __name__ == "__main__":
    main(tyro.cli(Config))
