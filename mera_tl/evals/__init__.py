"""Standard benchmarks on a steered model, through lm-evaluation-harness (extra `evals`).

`SteeredLM` is a model of the harness around our own engine; `compare_on_tasks` runs its tasks
unsteered and steered and pairs the answers: the side effects of a steering on what it was not made
for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
