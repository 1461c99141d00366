"""`python -m mera_tl.cli`: the command `mera`."""

from mera_tl.cli.app import main

main()
