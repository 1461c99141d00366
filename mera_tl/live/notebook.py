"""The panel in a notebook: the same function, with ipywidgets for controls (extra `explore`)."""

from pathlib import Path
from typing import Any

from mera_tl.live.bench import THRESHOLDS, Bench, open_bench
from mera_tl.live.effects import panel, replies
from mera_tl.live.page import POSITIONS, choices_of
from mera_tl.models.model import Model
from mera_tl.steering.steering import Steering


def explore(
    model: Model | str | None = None,
    *,
    run: str | Path | None = None,
    steering: Steering | str | Path | None = None,
    prompt: str | None = None,
) -> Any:
    """Show a panel to try steerings on: a prompt, controls, what changes.

    As `mera explore`: from a run's folder, a steering (certified or not), or a model alone.

    Raises:
        ValueError: if ipywidgets is not installed, or as `open_bench`.
    """
    try:
        import ipywidgets as widgets
    except ImportError:
        raise ValueError(
            "The panel needs ipywidgets; run `pip install 'mera-tl[explore]'`."
        ) from None
    bench = open_bench(model, run=run, steering=steering)
    controls = _controls(widgets, bench, prompt)
    shown = widgets.Output()

    def show(*_: Any) -> None:
        values = {name: control.value for name, control in controls.items()}
        text, options = values.pop("prompt"), values.pop("options")
        named = tuple(o.strip() for o in options.split(",") if o.strip())
        try:
            choices = choices_of(**values)
            told, said = panel(bench, text, choices, options=named), replies(bench, text, choices)
        except ValueError as error:
            shown.outputs = (_text(str(error)),)
            return
        words = _text(f"{told.said}\nunsteered: {said[0]}\nsteered:   {said[1]}")
        figures = filter(None, (told.bars, told.layers, told.tokens))
        # As plotly shows its own figures.
        data = [figure._repr_mimebundle_() for figure in figures]
        kind = {"output_type": "display_data", "metadata": {}}
        shown.outputs = (words, *(kind | {"data": each} for each in data))

    for control in controls.values():
        control.observe(show, names="value")
    show()
    return widgets.VBox([*controls.values(), shown])


def _text(words: str) -> dict[str, Any]:
    return {"output_type": "stream", "name": "stdout", "text": words + "\n"}


def _controls(widgets: Any, bench: Bench, prompt: str | None) -> dict[str, Any]:
    start = bench.start
    first = bench.prompts[0] if bench.prompts else ""
    layers = [(str(n), n) for n in range(bench.model.n_layers)]
    # Replies to a scored task have no options, and the length at which they are scored.
    own = {"display": "none"} if bench.scored else {}
    # Sliders report when they are let go, text when it is left: a pass is not for every key.
    return {
        "prompt": widgets.Textarea(
            first if prompt is None else prompt, description="prompt", continuous_update=False
        ),
        "options": widgets.Text(
            ", ".join(bench.options), description="options", continuous_update=False, layout=own
        ),
        "way": widgets.Dropdown(
            options=[("none", ""), *((w, w) for w in bench.ways)],
            value=start.way,
            description="direction",
        ),
        "layers": widgets.SelectMultiple(options=layers, value=start.layers, description="layers"),
        "rule": widgets.ToggleButtons(options=["threshold", "strength"], description="move by"),
        "threshold": widgets.SelectionSlider(
            options=[(f"{t:g}", i) for i, t in enumerate(THRESHOLDS)],
            value=THRESHOLDS.index(start.threshold),
            description="threshold",
            continuous_update=False,
        ),
        "strength": widgets.FloatSlider(
            0.1, min=0, max=2, step=0.05, description="strength", continuous_update=False
        ),
        "positions": widgets.Dropdown(
            options=[(text, name) for name, text in POSITIONS.items()],
            value=start.positions,
            description="tokens",
        ),
        "n": widgets.IntSlider(
            16, min=4, max=64, step=4, description="reply", continuous_update=False, layout=own
        ),
    }
