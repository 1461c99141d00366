"""Sparse autoencoders as a space to read and steer in: load, train, fit probes on latents.

Needs sae-lens (the extra `sae`), imported only when an SAE is loaded or trained.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
