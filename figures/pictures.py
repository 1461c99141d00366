"""Pictures of figures, taken by a Chromium without a window."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import plotly.graph_objects as go

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, SCALE = 900, 1.5


def find_browser() -> str | None:
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def take_picture(figure: go.Figure, path: Path, browser: str) -> None:
    """Draw a figure on a transparent ground, so that light and dark pages may hold it."""
    height = int(figure.to_dict()["layout"].get("height", 440))
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        plot = figure.to_html(
            full_html=False, default_width=WIDTH, config={"displayModeBar": False}
        )
        page.write_text(f'<body style="margin:0">{plot}</body>')
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder}/profile", f"--force-device-scale-factor={SCALE}"]
        command += ["--default-background-color=00000000", "--virtual-time-budget=10000"]
        command += [f"--window-size={WIDTH},{height}", f"--screenshot={path}", page.as_uri()]
        subprocess.run(command, check=True, timeout=120, capture_output=True)
