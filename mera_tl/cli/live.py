"""The command that serves a model to try steerings on."""

import webbrowser
from dataclasses import dataclass
from pathlib import Path

from mera_tl.cli.terminal import console


@dataclass(frozen=True, kw_only=True)
class Explore:
    """Serve a page on this machine to try steerings on: prompts, thresholds, layers, live.

    For example:

      $ mera explore --run runs/demo/spam_cue-seed0
      $ mera explore -m organism --steering spam-steering

    Needs dash: pip install 'mera-tl[explore]'. Only this machine can open the page, and only at the
    address that is printed.
    """

    run: Path | None = None
    """Folder of a run: its certified steering, every direction, its test prompts."""
    steering: str | None = None
    """Folder of a saved steering, or the name of one on the hub; with --model."""
    model: str | None = None
    """The model. Default: that of the run."""
    port: int = 0
    """Port to listen on; 0 takes a free one."""
    open: bool = False
    """Open the page in a browser."""

    def __call__(self) -> None:
        from mera_tl.live.bench import open_bench
        from mera_tl.live.page import require_dash, serve

        require_dash()
        if self.run is not None and self.steering is not None:
            raise ValueError("--run brings its own steerings; pass --run or --steering, not both.")
        bench = open_bench(self.model, run=self.run, steering=self.steering)

        def ready(url: str) -> None:
            console().print(f"{bench.model} is at {url}\nStop with Ctrl-C.", soft_wrap=True)
            if self.open:
                webbrowser.open(url)

        serve(bench, ready=ready, port=self.port)
