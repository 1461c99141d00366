"""Figures: one pure function each, from a data frame of records to a plotly figure.

No statistics here: what is drawn was computed where the records were written. Every figure has the
same template and the same colour per method; units and numbers of examples are in the axes or in
the line below the title. `guarantee` draws what a certificate promises, `reading` where errors can
be read, `steering` what one steering does, `comparing` methods, tasks and spaces side by side.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
