"""A model to try steerings on, live: type a prompt, move a threshold, see what changes.

`open_bench` gathers a model and what it can be steered by, `panel` tells what one choice does to
one prompt; `serve` shows it as a page on this machine (dash, extra `explore`), `explore` in a
notebook (ipywidgets, the same extra).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
