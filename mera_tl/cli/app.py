"""The command `mera`.

`subcommands` says what there is to ask for, `commands` does it and is imported when it is needed:
`mera --help` answers at once. A caller's mistake is one sentence on stderr and exit code 2.
"""

import os
import sys
from typing import Annotated, Any

import tyro

from mera_tl.cli.options import COMMANDS

DESCRIPTION = (
    "Steer a language model away from its own errors, only when that can be shown to help."
)


def main() -> None:
    """Parse the command line and run the command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    union: Any = None
    for kind in COMMANDS:
        named = Annotated[kind, tyro.conf.subcommand(kind.__name__.lower())]
        union = named if union is None else union | named
    command = tyro.cli(union, prog="mera", description=DESCRIPTION)
    from mera_tl.cli import commands

    try:
        getattr(commands, type(command).__name__.lower())(command)
    except ValueError as error:
        print(f"mera: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("mera: stopped; start it again to go on.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
