"""The command `mera`.

`parsing` makes a command line one of the options of `steps` and `results`, which run themselves.
This is the one place that turns mistakes into exit codes: a
caller's mistake or a file that cannot be used is one sentence on stderr and exit code 2.
"""

import os
import sys
from importlib.metadata import version

from mera_tl.cli.parsing import parse
from mera_tl.cli.terminal import console

RESUMES = ("run", "demo", "benchmark", "preflight", "collect", "fit", "calibrate", "evaluate")
"""Commands that go on from what they have in their folder."""


def main() -> None:
    """Parse the command line and run the command; MERA_DEBUG=1 shows tracebacks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the core
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a log file gets lines, not bars
    try:
        if sys.argv[1:] in (["--version"], ["-V"], ["version"]):
            print(f"mera {version('mera-tl')}")
            return
        parse(sys.argv[1:])()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has enough; what Python flushes at exit must go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        resumes = "; start it again to resume" * (sys.argv[1] in RESUMES)
        print(f"mera: stopped{resumes}.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        said = _sentence(error)
        if said is None or os.environ.get("MERA_DEBUG"):
            raise
        # In a terminal words stay whole; elsewhere a message is one line.
        wide = not sys.stderr.isatty()
        console(stderr=True).print(f"mera: {said}", markup=False, soft_wrap=wide)
        sys.exit(2)


def _sentence(error: Exception) -> str | None:
    """Return a mistake or a damaged file in one sentence; None for what is a fault of ours."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}."
    if isinstance(error, ImportError) and error.name is None:
        return str(error)  # ours: it says what to install
    damaged = type(error).__module__.startswith("safetensors")
    return str(error) if damaged or isinstance(error, ValueError | OSError) else None


if __name__ == "__main__":
    main()
