"""Questions with known answers, and their disjoint splits.

A `Task` is a list of `Example(prompt, options, label)`. `load_task` finds one by name (the built-in
data sets), as a file of the user's, or among those of the embedded organism; `Task.split` deals it
into training, calibration and test examples that share no text. Imports no model.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
