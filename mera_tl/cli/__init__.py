"""The command `mera`: `options` says what there is to ask for, `commands` does it."""

from mera_tl.cli.app import main as main
