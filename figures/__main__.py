"""Build the gallery: every script of this folder, then PNGs where a browser is found."""

import importlib
from pathlib import Path

import plotly.io

from figures import OUT, NoResults
from figures.pictures import find_browser, take_picture

SCRIPTS = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "__main__", "pictures")
)


def main() -> None:
    for name in SCRIPTS:
        try:
            importlib.import_module(f"figures.{name}").main()
        except NoResults as absent:
            print(f"{name} is left out: {absent}")
    browser = find_browser()
    for path in sorted(OUT.glob("*.json")):
        figure = plotly.io.from_json(path.read_text())
        if browser is not None:
            take_picture(figure, path.with_suffix(".png"), browser)
        path.unlink()
    without = "" if browser else "; no PNG, since neither chromium nor chrome was found"
    print(f"{len(SCRIPTS)} scripts, {len(list(OUT.iterdir()))} files in {OUT.name}{without}")


if __name__ == "__main__":
    main()
