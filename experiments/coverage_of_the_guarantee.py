"""Is the guarantee kept, and what does it cost?

Whole calibrations over ten thresholds are simulated. Expected: a lower bound exceeds its true gain
in at most delta of them; at 250 examples the exact test certifies most six-point gains, and
Hoeffding's bound none. About 15 minutes on one core.
"""

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import tyro

from mera_tl.certificate import betting, hoeffding_curve, lower_bound, mcnemar, unconditional
from mera_tl.storage import fingerprint, write_records

RESULTS = Path(__file__).parent / "results" / "coverage_of_the_guarantee"
BATCH = 200
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
    sizes: tuple[int, ...] = (100, 250, 500)
    gains: tuple[float, ...] = (0.02, 0.04, 0.06, 0.1, 0.2)
    min_gains: tuple[float, ...] = (0.0, 0.02)
    delta: float = 0.05
    seed: int = 0


@cache
def lower(bound: str, a: int, b: int, n: int, level: float) -> float:
    """Bound each table once: twenty thousand draws hold but few different ones."""
    return lower_bound(OF_COUNTS[bound](a, b, n, level), level)


def scenarios(config: Config):
    """Yield name, true gains and regressions by threshold (mild to strong), and nestedness."""
    for gain in config.min_gains:  # no threshold exceeds min_gain: certifying any is an error
        for name, nested in (("nested null", 1.0), ("independent null", 0.0)):
            yield name, gain, np.full(10, gain), np.full(10, 0.05), nested
    rise = np.sin(np.pi / 2 * np.arange(1, 7) / 6)
    for gain in config.gains:  # a hump: best at the sixth threshold, harmful at the last
        shape = np.concatenate((rise, [0.85, 0.5, 0.0, -0.5]))
        yield "hump", gain, gain * shape, (0.5 * gain + 0.02) * np.arange(1, 11) / 6, 0.8


def exceeds(bound: str, gains: np.ndarray, level: float, asked: tuple[float, ...]) -> np.ndarray:
    """Return, by draw and gain asked for, whether the lower bound of one threshold reaches it."""
    if bound == "betting":
        curves = [betting(row, level) for row in gains]
        return np.array([[curve(gain) <= level for gain in asked] for curve in curves])
    tables = zip((gains > 0).sum(1).tolist(), (gains < 0).sum(1).tolist(), strict=True)
    bounds = [lower(bound, a, b, gains.shape[1], level) for a, b in tables]
    return np.array(bounds)[:, None] >= np.array(asked)


def simulate(config: Config, n: int, true: np.ndarray, lost: np.ndarray, nested: float):
    """Yield, by bound, how often it was wrong at any threshold, and how often it certified one."""
    rng, level = np.random.default_rng([config.seed, n]), config.delta / len(true)
    tallies = {bound: [] for bound in (*OF_COUNTS, "betting")}
    for first in range(0, config.draws, BATCH):
        shared, own = rng.random((BATCH, 1, n)), rng.random((BATCH, len(true), n))
        u = np.where(rng.random((BATCH, 1, n)) < nested, shared, own)
        gains = (u < (true + lost)[:, None]).astype(int) - (u > 1 - lost[:, None])
        for bound, tally in tallies.items():
            if bound == "betting" and first >= config.betting_draws:
                continue
            asked = [(float(gain), *config.min_gains) for gain in true]
            reached = [exceeds(bound, gains[:, k], level, ask) for k, ask in enumerate(asked)]
            tally.append(np.any(reached, axis=0))
    for bound, tally in tallies.items():
        wrong, *certified = np.concatenate(tally).mean(0).tolist()
        shares = zip(config.min_gains, certified, strict=True)
        record = {"bound": bound, "draws": BATCH * len(tally), "wrong": wrong}
        yield record | {f"certified_{gain:g}": share for gain, share in shares}


def main(config: Config) -> None:
    records = []
    for n in config.sizes:
        for name, gain, *rates in scenarios(config):
            for record in simulate(config, n, *rates):
                records.append({"scenario": name, "gain": gain, "n": n} | record)
    write_records(RESULTS / f"{fingerprint(asdict(config))}.jsonl", records)


if __name__ == "__main__":
    main(tyro.cli(Config))
