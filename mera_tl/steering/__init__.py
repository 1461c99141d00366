"""Steering = probe x direction x rule x space, as a list of hooks.

The probe says whether and how far, the direction which way, the rule turns both into a shift, the
space (residual stream or SAE latents) writes it back. `Steering.attach` puts it on any model, also
on one of transformers, for the length of a `with` block. `explain` shows what a steering does to
one prompt, token by token.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
