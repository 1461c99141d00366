"""A language model with hooks on its residual stream.

`load_model` gives a `Model`: the network, the tokenizer that stays outside it, and the names of the
hook points. Everything that knows an architecture, a checkpoint or a library is in this room; the
rooms above see `resid_post` and token ids.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
