"""Prompts through a model: answers, outcomes, activations.

`evaluate` answers a task under hooks and returns `Outcomes`, `collect` also keeps `resid_post` of
every layer. How an answer is read is in `answers`, how tokens flow in batches and on caches in
`decoding`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
