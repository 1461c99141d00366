"""One run, or a grid of runs, each in a folder that survives a kill.

A `RunConfig` says what is run; `open_run` holds the folder and computes what is missing in it;
`run_grid` does so over models, tasks, methods and seeds, in this process or on Ray.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
