"""The command `mera`: `parsing` makes a command line one of the dataclasses that run."""

from mera_tl.cli.app import main as main
