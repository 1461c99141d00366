"""Do the tests bite? Break the code in one place at a time and see whether they fail.

`mutants.toml` lists changes that a plausible mistake would make, each with the tests that must
notice. A mutant that survives is a law that nobody wrote down. Expected: all killed. Some ten
seconds each on one core; `make mutate`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from mera_tl.storage import write_records

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "mutations.jsonl"


@dataclass(frozen=True)
class Mutant:
    says: str
    """The mistake, in words."""
    file: str
    old: str
    new: str
    tests: str
    """What must fail: arguments of pytest."""


@dataclass(frozen=True)
class Config:
    only: str = ""
    """Only mutants whose words or file contain this."""
    workers: int = 2
    """Mutants tried side by side, one thread each."""
    timeout: float = 300.0
    """Seconds after which a run counts as killed: an endless loop is noticed, too."""


def mutants() -> list[Mutant]:
    listed = tomllib.loads((HERE / "mutants.toml").read_text(encoding="utf-8"))["mutant"]
    return [Mutant(**each) for each in listed]


def mutate(mutant: Mutant, tree: Path) -> None:
    """Change one place of a tree; refuse a mutant that does not name exactly one."""
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.file} holds {mutant.old!r} {text.count(mutant.old)} times, not once; mend "
            f"the mutant {mutant.says!r} in mutants.toml."
        )
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def passes(tests: str, tree: Path, timeout: float) -> bool:
    """Run tests on a tree; they fail if anything but success comes back."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode in (2, 3, 4, 5) and b"error" not in done.stdout.lower():
        raise ValueError(f"{tests!r} names no test: {done.stdout[-300:].decode()}")
    return done.returncode == 0


def try_one(mutant: Mutant, timeout: float) -> bool:
    """Return whether the tests noticed the mutant."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        for part in ("mera_tl", "tests", "experiments", "figures"):
            ignored = shutil.ignore_patterns("__pycache__", "results", "out")
            shutil.copytree(ROOT / part, tree / part, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", tree)
        if (ROOT.parent / "shared").exists():
            (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")
        mutate(mutant, tree)
        return not passes(mutant.tests, tree, timeout)


def main(config: Config) -> None:
    chosen = [m for m in mutants() if config.only in m.says or config.only in m.file]
    with ThreadPoolExecutor(config.workers) as pool:
        killed = list(pool.map(lambda mutant: try_one(mutant, config.timeout), chosen))
    for mutant, dead in zip(chosen, killed, strict=True):
        print(f"{'killed  ' if dead else 'SURVIVED'}  {mutant.file}: {mutant.says}")
    print(f"\n{sum(killed)} of {len(killed)} mutants killed")
    if not config.only:
        rows = [asdict(m) | {"killed": dead} for m, dead in zip(chosen, killed, strict=True)]
        write_records(RESULTS, rows)
    if not all(killed):
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Config))
