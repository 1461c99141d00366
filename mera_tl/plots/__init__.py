"""Figures: one pure function each, from a data frame of records to a plotly figure.

No statistics here: what is drawn was computed where the records were written. Every figure has the
same template and the same colour per method; units and numbers of examples are in the axes or in
the line below the title. `guarantee` draws what a certificate promises, `reading` where errors can
be read, `steering` what one steering does, `comparing` methods, tasks and spaces side by side.
"""

from mera_tl.plots.comparing import (
    number_table,
    raw_against_sae,
    spi_dots,
    spi_heatmap,
    transitions,
)
from mera_tl.plots.costs import stage_costs
from mera_tl.plots.guarantee import coverage, sample_size_curves, size_of_the_test
from mera_tl.plots.reading import (
    geometry,
    layer_by_position,
    predicted_against_observed,
    predicted_error,
    probe_error,
    probe_overlay,
    transfer_matrix,
)
from mera_tl.plots.searching import search_table
from mera_tl.plots.steering import (
    calibration_evidence,
    error_before_after,
    ledger,
    steered_share,
    steering_curve,
)
from mera_tl.plots.style import colour_of

__all__ = [
    "calibration_evidence",
    "colour_of",
    "coverage",
    "error_before_after",
    "geometry",
    "layer_by_position",
    "ledger",
    "number_table",
    "predicted_against_observed",
    "predicted_error",
    "probe_error",
    "probe_overlay",
    "raw_against_sae",
    "sample_size_curves",
    "search_table",
    "size_of_the_test",
    "spi_dots",
    "spi_heatmap",
    "stage_costs",
    "steered_share",
    "steering_curve",
    "transfer_matrix",
    "transitions",
]
