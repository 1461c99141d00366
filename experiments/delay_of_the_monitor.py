"""How often does the monitor cry wolf, and how soon does it see harm?

Streams of audited pairs, some steady and some that turn. Expected: while steering helps, no alarm;
at a mean gain of 0, false alarms in at most 5 % of streams for the e-process; after a late change
the restarted process is several times quicker. About three minutes on one core.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro

from mera_tl.certificate import Monitor
from mera_tl.storage import fingerprint, write_records

RESULTS = Path(__file__).parent / "results" / "delay_of_the_monitor"
BEFORE = (0.10, 0.04)  # recoveries and regressions of a good threshold
CASES = {
    "no change, +6 points": (BEFORE, 0),
    "0 points from the start": ((0.07, 0.07), 0),
    "-2 points from the start": ((0.06, 0.08), 0),
    "-6 points from the start": ((0.04, 0.10), 0),
    "-12 points from the start": ((0.04, 0.16), 0),
    "-6 points from pair 500": ((0.04, 0.10), 500),
    "-12 points from pair 500": ((0.04, 0.16), 500),
}


@dataclass(frozen=True)
class Config:
    streams: int = 500
    pairs: int = 4000
    seed: int = 0


def stream(rng: np.random.Generator, rates: tuple[float, float], pairs: int) -> np.ndarray:
    u = rng.random(pairs)
    return (u < rates[0]).astype(float) - (u > 1 - rates[1])


def alarms(gains: np.ndarray) -> tuple[int | None, int | None]:
    """Return the pair of either alarm; stop at the second."""
    monitor = Monitor()
    for gain in gains:
        monitor = monitor.update(float(gain))
        if monitor.harmful_at and monitor.changed_at:
            break
    return monitor.harmful_at, monitor.changed_at


def main(config: Config) -> None:
    records = []
    for case, (rates, change) in CASES.items():
        rng = np.random.default_rng(config.seed)
        found = []
        for _ in range(config.streams):
            before = stream(rng, BEFORE, change)
            after = stream(rng, rates, config.pairs - change)
            found.append(alarms(np.concatenate((before, after))))
        for process, raised in zip(
            ("e-process", "restarted"), zip(*found, strict=True), strict=True
        ):
            pairs = [at for at in raised if at is not None]
            record = {"case": case, "process": process, "alarmed": len(pairs) / config.streams}
            record["median_pair"] = float(np.median(pairs)) if pairs else None
            record["delay"] = record["median_pair"] - change if pairs else None
            records.append(record)
    write_records(RESULTS / f"{fingerprint(asdict(config))}.jsonl", records)


if __name__ == "__main__":
    main(tyro.cli(Config))
