"""From paired gains to a decision with a guarantee: steer, or abstain and say why.

`calibrate` steers held-out examples and certifies one candidate or none; `certify` decides from
gains alone. The bounds are exact or hold for every sample size, and everything but `min_gain` is
fixed in the terms before an outcome is seen. Planning and monitoring are here, too.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
