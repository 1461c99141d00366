"""Figures: one pure function each, from a data frame of records to a plotly figure.

No statistics here: what is drawn was computed where the records were written. Every figure has the
same template and the same colour per method; units and numbers of examples are in the axes or in
the line below the title. `guarantee` draws what a certificate promises, `reading` where errors can
be read, `steering` what one steering does, `comparing` methods, tasks and spaces side by side.
"""

from mera_tl.plots.comparing import (
    spi_dots,
    spi_heatmap,
    transitions,
)
from mera_tl.plots.guarantee import sample_size_curves
from mera_tl.plots.reading import (
    cloud,
    geometry,
    predicted_error,
    probe_error,
)
from mera_tl.plots.searching import foresight, search_table
from mera_tl.plots.steering import (
    calibration_evidence,
    error_before_after,
    error_by_layer,
    ledger,
    option_bars,
    steered_share,
    steering_curve,
)
from mera_tl.plots.style import colour_of

__all__ = [
    "calibration_evidence",
    "cloud",
    "colour_of",
    "error_before_after",
    "error_by_layer",
    "foresight",
    "geometry",
    "ledger",
    "option_bars",
    "predicted_error",
    "probe_error",
    "sample_size_curves",
    "search_table",
    "spi_dots",
    "spi_heatmap",
    "steered_share",
    "steering_curve",
    "transitions",
]
