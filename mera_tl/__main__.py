"""`python -m mera_tl`: the command `mera`."""

from mera_tl.cli.app import main

main()
