from .html import figure_block as figure_block
from .html import write_page as write_page
from .report import write_report as write_report
from .run_folder import RunFolder as RunFolder
from .run_folder import evidence_frame as evidence_frame
from .run_folder import find_runs as find_runs
from .run_folder import records_frame as records_frame
