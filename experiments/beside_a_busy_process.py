"""How much longer does the demo take beside another busy process?

Expected: at most 2.2 times as long on two cores. A small model runs on one thread, so it has a core
to itself; with a thread per core, threads wait for each other's turn and the ratio is 4.5. The two
runs follow each other on the same cores, so only their ratio counts. Five minutes.
"""

import os
import subprocess
import sys
import tempfile
import time

import tyro

BUSY = "while True: pass"


def demo(environment: dict[str, str]) -> float:
    """Return the seconds that a demo takes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mera_tl.cli", "demo", "--quiet", "--out", folder]
        started = time.perf_counter()
        subprocess.run(command, check=True, env=environment, capture_output=True)
        return time.perf_counter() - started


def main(busy: int = 1) -> None:
    """Time the demo alone, then beside `busy` processes that never rest."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    alone = demo(environment)
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        beside = demo(environment)
    finally:
        for other in others:
            other.kill()
    print(f"alone {alone:.0f} s, beside {busy} busy {beside:.0f} s: {beside / alone:.2f} times")


if __name__ == "__main__":
    tyro.cli(main)
