"""How long does a certificate take on this machine?

Ten thresholds, every bound, processor time on one core. Expected: all bounds together under 1.5
seconds at 250 examples and under 5 at 3,000. Half a minute.
"""

import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time

import numpy as np
import tyro

from mera_tl.certificate import BOUNDS, DEFAULT_THRESHOLDS, Terms, certify
from mera_tl.storage import fingerprint, write_records

RESULTS = Path(__file__).parent / "results" / "speed_of_the_certificate"


@dataclass(frozen=True)
class Config:
    sizes: tuple[int, ...] = (250, 1000, 3000)
    repeats: int = 5
    seed: int = 0


def main(config: Config) -> None:
    rng, records = np.random.default_rng(config.seed), []
    for n in config.sizes:
        lost = 0.08 * np.arange(1, 11)[:, None] / 6
        u = rng.random((config.repeats, 10, n))
        gains = (u < 0.11).astype(float) - (u > 1 - lost)
        for bound in BOUNDS:
            times = []
            for draw in gains:
                start = process_time()
                certify(draw, terms=Terms(bound=bound), candidates=DEFAULT_THRESHOLDS)
                times.append(process_time() - start)
            record = {"n": n, "bound": bound, "seconds": float(np.median(times))}
            records.append(record | {"machine": platform.processor() or platform.machine()})
    write_records(RESULTS / f"{fingerprint(asdict(config))}.jsonl", records)


if __name__ == "__main__":
    main(tyro.cli(Config))
