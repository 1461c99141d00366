"""Linear probes that predict the model's own error from its residual stream.

`fit_error_probe` fits one linear map per layer on collected activations, with penalties and layers
chosen on shared folds. The solvers take all layers, penalties and folds at once.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
