from .html import render as render
from .report import write_report as write_report
from .run_folder import RunFolder as RunFolder
from .run_folder import find_runs as find_runs
from .run_folder import records_frame as records_frame
