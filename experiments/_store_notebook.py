"""Run the notebook and keep its outputs, every figure as a picture too: GitHub runs no scripts.

python -m experiments._store_notebook [a real model's folder]
"""

import base64
import sys
import tempfile
from pathlib import Path

import nbformat
import plotly.graph_objects as go
from nbclient import NotebookClient

from figures.pictures import find_browser, take_picture

PATH = Path(__file__).with_name("quickstart.ipynb")
FIGURE, PICTURE = "application/vnd.plotly.v1+json", "image/png"


def main() -> None:
    notebook, browser = nbformat.read(PATH, as_version=4), find_browser()
    if browser is None:
        raise SystemExit("The pictures need Chromium or Chrome; neither was found.")
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            (Path(folder) / "model").symlink_to(Path(sys.argv[1]).resolve())
        NotebookClient(notebook, timeout=900, kernel_name="python3").execute(cwd=folder)
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day
            for output in cell.get("outputs", ()):
                if FIGURE in output.get("data", {}):
                    path = Path(folder) / "figure.png"
                    figure = go.Figure(output.data[FIGURE]["data"], output.data[FIGURE]["layout"])
                    take_picture(figure, path, browser)
                    output.data[PICTURE] = base64.b64encode(path.read_bytes()).decode()
                    # The picture is what is kept: the figure itself comes back with a run.
                    del output.data[FIGURE]
                    output.data.pop("text/html", None)
            cell.outputs = [o for o in cell.get("outputs", ()) if o.get("name") != "stderr"]
            if cell.cell_type == "markdown":
                del cell["outputs"]
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, PATH)


if __name__ == "__main__":
    main()
