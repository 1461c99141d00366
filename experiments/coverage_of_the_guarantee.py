"""Is the guarantee kept, and what does it cost?

Whole calibrations over ten thresholds are simulated. Expected: a lower bound exceeds its true gain
in at most delta of them; at 250 examples the exact test certifies most six-point gains, and
Hoeffding's bound none. About 20 minutes on one core.
"""

from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import tyro

from mera_tl.bounds import betting, hoeffding_curve, mcnemar, unconditional
from mera_tl.store import fingerprint, write_records

RESULTS = Path(__file__).parent / "results" / "coverage_of_the_guarantee"
OF_COUNTS = {
    "unconditional": unconditional,
    "mcnemar": mcnemar,
    "hoeffding": lambda a, b, n, _: hoeffding_curve((a - b) / n, n),
}


@dataclass(frozen=True)
class Config:
    draws: int = 20_000
    betting_draws: int = 2_000
    """Fewer, since this bound depends on the order of the examples and every draw is new."""
    sizes: tuple[int, ...] = (100, 250, 500, 1000)
    gains: tuple[float, ...] = (0.02, 0.04, 0.06, 0.1, 0.2)
    min_gains: tuple[float, ...] = (0.0, 0.02)
    delta: float = 0.05
    seed: int = 0


@cache
def rejects(bound: str, a: int, b: int, n: int, level: float, gain: float) -> bool:
    return OF_COUNTS[bound](a, b, n, level)(gain) <= level


def scenarios(config: Config):
    """Yield name, true gains and regressions by threshold (mild to strong), and nestedness."""
    for gain in config.min_gains:  # no threshold exceeds min_gain: certifying any is an error
        for name, nested in (("nested null", 1.0), ("independent null", 0.0)):
            yield name, gain, np.full(10, gain), np.full(10, 0.05), nested
    rise = np.sin(np.pi / 2 * np.arange(1, 7) / 6)
    for gain in config.gains:  # a hump: best at the sixth threshold, harmful at the last
        shape = np.concatenate((rise, [0.85, 0.5, 0.0, -0.5]))
        yield "hump", gain, gain * shape, (0.5 * gain + 0.02) * np.arange(1, 11) / 6, 0.8


def rejected(bound: str, row: np.ndarray, level: float, gains: tuple[float, ...]) -> list[bool]:
    if bound == "betting":
        curve = betting(row, level)
        return [curve(gain) <= level for gain in gains]
    table = int((row > 0).sum()), int((row < 0).sum()), len(row), level
    return [rejects(bound, *table, gain) for gain in gains]


def simulate(config: Config, bound: str, n: int, true: np.ndarray, lost: np.ndarray, nested: float):
    """Return how often a bound was wrong at any threshold, and how often it certified one."""
    rng, level = np.random.default_rng([config.seed, n]), config.delta / len(true)
    tally = []
    for _ in range(config.betting_draws if bound == "betting" else config.draws):
        shared, own = rng.random(n), rng.random((len(true), n))
        u = np.where(rng.random(n) < nested, shared, own)
        gains = (u < (true + lost)[:, None]).astype(int) - (u > 1 - lost[:, None])
        asked = ((float(gain), *config.min_gains) for gain in true)
        rows = zip(gains, asked, strict=True)
        tally.append(np.any([rejected(bound, row, level, ask) for row, ask in rows], axis=0))
    wrong, *certified = np.mean(tally, axis=0).tolist()
    shares = zip(config.min_gains, certified, strict=True)
    return {"draws": len(tally), "wrong": wrong} | {f"certified_{g:g}": s for g, s in shares}


def main(config: Config) -> None:
    records = []
    for n, bound in product(config.sizes, (*OF_COUNTS, "betting")):
        rejects.cache_clear()
        for name, gain, *rates in scenarios(config):
            record = {"scenario": name, "gain": gain, "n": n, "bound": bound}
            records.append(record | simulate(config, bound, n, *rates))
    write_records(RESULTS / f"{fingerprint(asdict(config))}.jsonl", records)


if __name__ == "__main__":
    main(tyro.cli(Config))
