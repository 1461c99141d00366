"""mera_tl steers a language model away from its own errors, only when that can be shown to help.

One idea: steering = probe x direction x rule x space, and it is nothing but a list of
TransformerLens hooks. A linear probe reads the model's own error off `resid_post`; a rule says
how far to move an activation so that the probe predicts at most `threshold`; a calibration decides
on held-out data whether that helps, and otherwise abstains.

Axis names, the same in every signature and every einops string:
`example`, `option`, `layer`, `batch`, `pos`, `d_model`, `d_vocab`, `threshold`, `penalty`, `fold`.

Reference: Hedström et al., "To Steer or Not to Steer? Mechanistic Error Reduction with Abstention
for Language Models", ICML 2025, arXiv 2510.13290.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
