"""Run folders read back: tables, figures, one page to look at.

`write_report` makes a page that opens anywhere; `plots` holds the figures, each a function from a
table to a plotly figure.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
