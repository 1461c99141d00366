"""Figures show what their data say: every mark in its place, certified or not, moved or not."""

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from plotly.colors import hex_to_rgb

from mera_tl import plots
from mera_tl.methods import methods
from mera_tl.plots import style

sys.path.insert(0, str(Path(__file__).parents[1]))

from figures import probe_error_by_layer, sae_or_raw  # noqa: E402


def evidence(*, certified: bool = True) -> pd.DataFrame:
    """Three thresholds, of which the lower two are certified, or none is."""
    lower = [0.03, 0.01, -0.02] if certified else [-0.01, -0.02, -0.03]
    return pd.DataFrame(
        {
            "threshold": [0.01, 0.1, 0.5],
            "recoveries": [30, 12, 1],
            "regressions": [4, 2, 3],
            "gain": [0.065, 0.025, -0.005],
            "lower": lower,
            "chosen": [certified, False, False],
            "method": "optimal_probe",
            "knob": "threshold",
            "n": 400,
            "min_gain": 0.0,
            "confidence": 0.95,
            "base": 0.7,
        }
    )


def records() -> pd.DataFrame:
    rows = []
    for task in ("clear", "hopeless"):
        for method, recovered, lost in (("no_steering", 0, 0), ("optimal_probe", 40, 10)):
            off = task == "hopeless" and method == "optimal_probe"
            moved = {"0->1": 0 if off else recovered, "1->0": 0 if off else lost}
            still = {"0->0": 100 - moved["0->1"], "1->1": 100 - moved["1->0"]}
            rows.append(
                {
                    "model": "organism",
                    "task": task,
                    "method": method,
                    "seed": 0,
                    "space": "raw",
                    "n": 200,
                    "spi": 0.0 if off else (recovered - lost) / 100,
                    "decision": None if method == "no_steering" else "ABSTAIN" if off else "STEER",
                    "transitions": moved | still,
                }
            )
    return pd.DataFrame(rows)


def probes() -> pd.DataFrame:
    rows = [
        {"layer": i, "probe": p, "rmse": 0.3 - 0.05 * i, "rmse_sd": 0.01, "rmse_dummy": 0.4}
        for p in ("ridge, last", "lasso, last")
        for i in range(3)
    ]
    return pd.DataFrame(rows)


def cloud(*, moved: bool = True) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"score": rng.normal(size=50), "other": rng.normal(size=50)})
    frame["correct"] = frame["score"] < 0.3
    above = (frame["score"] > 0.5) & moved
    frame["score_after"] = np.where(above, 0.5, np.nan)
    frame["other_after"] = np.where(above, frame["other"] - 1, np.nan)
    return frame.assign(in_plane=np.where(above, 0.25, np.nan))


def overlay() -> pd.DataFrame:
    rows = [
        {"place": place, "layer": i, "features": f, "position": p, "value": 0.6 + 0.1 * i}
        for place in ("clear", "hopeless")
        for f in (("raw",) if place == "clear" else ("raw", "sae"))
        for p in ("last", "exact")
        for i in range(2)
    ]
    return pd.DataFrame(rows).assign(sd=0.02, dummy=0.5, n=100, n_test=80)


def reach() -> pd.DataFrame:
    rows = [
        {"layer": i, "position": p, "further": p == -24, "n": 50, "share": s, "shift": 0.1 * s}
        for i in range(2)
        for p, s in ((-24, 0.1), (-1, 0.2), (0, 0.8), (1, 0.5))
    ]
    return pd.DataFrame(rows)


def grid(columns: tuple[str, str], value: str) -> pd.DataFrame:
    rows = [
        {columns[0]: a, columns[1]: b, value: 0.5 + 0.1 * i + 0.2 * j, "place": "clear"}
        for i, a in enumerate(("one", "two"))
        for j, b in enumerate(("one", "two"))
    ]
    return pd.DataFrame(rows).assign(n_test=80)


def tokens() -> pd.DataFrame:
    rows = [
        {"pos": p, "token": t, "layer": i, "before": 0.2, "after": 0.1, "shift": 0.01 * p}
        | {"valid": p == 3}
        for p, t in enumerate(["is", "it", "it", "?"])
        for i in range(2)
    ]
    return pd.DataFrame(rows)


def errors() -> pd.DataFrame:
    change = ["0->0", "0->1", "1->0", "1->1", "0->1"]
    return pd.DataFrame({"before": [0.9, 0.8, 0.2, 0.1, 0.7], "after": 0.4, "change": change})


def predicted() -> pd.DataFrame:
    correct = {"correct_before": [True, False, False], "correct_after": [True, True, False]}
    return pd.DataFrame({"before": [0.1, 0.6, 0.9], "after": [0.1, 0.5, 0.5], **correct})


def every_figure() -> dict[str, go.Figure]:
    both = pd.concat([records(), records().assign(space="sae", spi=0.1)])
    return {
        "curve": plots.steering_curve(evidence()),
        "abstained": plots.steering_curve(evidence(certified=False)),
        "evidence": plots.calibration_evidence(evidence()),
        "heatmap": plots.spi_heatmap(records()),
        "dots": plots.spi_dots(records()),
        "transitions": plots.transitions(records()),
        "probes": plots.probe_error(probes(), n=1000),
        "overlay": probe_error_by_layer.probe_overlay(overlay()),
        "observed": probe_error_by_layer.predicted_against_observed(
            pd.DataFrame(
                {"place": "clear", "predicted": [0.1, 0.8], "observed": [0.2, 0.7], "n_bin": 40}
            ).assign(n_test=80)
        ),
        "positions": probe_error_by_layer.layer_by_position(grid(("layer", "position"), "auroc")),
        "transfer": probe_error_by_layer.transfer_matrix(
            grid(("fitted_on", "measured_on"), "auroc")
        ),
        "predicted": plots.predicted_error(
            predicted(), method="optimal_probe", layer=1, threshold=0.5
        ),
        "geometry": plots.geometry(cloud(), method="optimal_probe", layer=1, limit=0.5),
        "errors": plots.error_before_after(errors(), method="optimal_probe"),
        "share": plots.steered_share(reach(), method="optimal_probe", n=50),
        "ledger": plots.ledger(tokens(), title="Row 7"),
        "spaces": sae_or_raw.raw_against_sae(both),
        "option_bars": plots.option_bars(("ham", "spam"), (0.7, 0.3), (0.2, 0.8)),
        "error_by_layer": plots.error_by_layer(tokens()),
    }


FIGURES = every_figure()


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_the_template_a_title_and_units(name):
    figure = FIGURES[name]
    assert isinstance(figure, go.Figure)
    assert figure.layout.template.layout.paper_bgcolor == "#fff"
    assert figure.layout.title.text
    assert len(figure.data) > 0
    axes = [axis.title.text for axis in figure.select_yaxes()]
    axes += [axis.title.text for axis in figure.select_xaxes()]
    assert any(axes) or name == "heatmap"  # whose axes are names
    assert "nan" not in str(figure.layout.title.subtitle.text)


@pytest.mark.parametrize("name", FIGURES)
def test_figures_say_how_many_examples_they_rest_on(name):
    caption = str(FIGURES[name].layout.title.subtitle.text)
    one = name in ("ledger", "option_bars", "error_by_layer")  # they draw a single prompt
    assert one or any(character.isdigit() for character in caption)


def test_drawing_is_pure_and_repeatable():
    for name, figure in every_figure().items():
        assert figure.to_json() == FIGURES[name].to_json(), name


def _traces(figure: go.Figure) -> dict[str, object]:
    return {trace.name: trace for trace in figure.data}


def test_the_curve_marks_the_choice_and_the_certified_thresholds():
    figure = FIGURES["curve"]
    traces = _traces(figure)
    star = traces["chosen: 0.01"]
    assert star.y[0] == pytest.approx(0.765)  # base .7, gain .065
    assert star.x[0] == pytest.approx(np.log(0.01 / 0.99))
    (band,) = figure.layout.shapes
    inside = [band.x0 < x < band.x1 for x in traces["observed"].x]
    assert inside == [True, True, False]
    assert "2 of 3" in figure.layout.title.subtitle.text


def test_an_abstention_has_no_certified_region_and_no_choice():
    figure = FIGURES["abstained"]
    assert not figure.layout.shapes
    assert not any(str(name).startswith("chosen") for name in _traces(figure))
    assert "abstain" in figure.layout.title.text


def test_without_a_base_the_curve_is_in_points():
    figure = plots.steering_curve(evidence().assign(base=np.nan))
    assert list(_traces(figure)["observed"].y) == pytest.approx([6.5, 2.5, -0.5])
    assert figure.layout.yaxis.title.text == "gain (points)"


def test_a_grid_of_strengths_and_a_single_threshold_are_drawn_too():
    strengths = evidence().assign(knob="strength", threshold=[0.5, 1.0, 2.0])
    assert "strength" in plots.steering_curve(strengths).layout.xaxis.title.text
    x, _ = style.knob_axis([0.5, 1.0, 2.0], "strength")
    assert np.isfinite(x).all()  # the logit of 1.0 would not be
    single = plots.steering_curve(evidence()[:1])
    assert len(single.layout.shapes) == 1


def test_evidence_bars_are_the_counts():
    traces = _traces(FIGURES["evidence"])
    assert list(traces["recoveries"].y) == [30, 12, 1]
    assert list(traces["regressions"].y) == [-4, -2, -3]


def test_the_heat_map_tells_abstaining_from_no_effect():
    (heat,) = FIGURES["heatmap"].data
    cells = {
        (method, task): heat.text[i][j]
        for i, method in enumerate(heat.y)
        for j, task in enumerate(heat.x)
    }
    assert cells["optimal_probe", "clear"] == "+0.30"
    assert cells["optimal_probe", "hopeless"] == "-"
    assert cells["no_steering", "hopeless"] == "0.00"


def test_transitions_of_a_method_add_up_to_all_examples():
    bars = [trace for trace in FIGURES["transitions"].data if trace.legendgroup in style.CHANGES]
    for panel in (bars[:4], bars[4:]):
        assert sum(np.array(bar.x) for bar in panel) == pytest.approx(100)
        assert sum(np.array(bar.customdata) for bar in panel).tolist() == [200, 200]


def luminance(colour, page):
    """WCAG's, of a colour on a page, of which it lets through what its alpha says."""
    parts = re.findall(r"[\d.]+", colour) if "(" in colour else hex_to_rgb(colour)
    *rgb, alpha = (*map(float, parts), 1.0)[:4]
    mixed = [(alpha * c + (1 - alpha) * p) / 255 for c, p in zip(rgb, page, strict=True)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in mixed]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("page", [(255, 255, 255), (20, 23, 26)], ids=["light", "dark"])
def test_marks_of_examples_show_on_light_and_dark(page):
    def contrast(colour):
        ends = sorted(luminance(each, page) + 0.05 for each in (colour, "rgba(0,0,0,0)"))
        return ends[1] / ends[0]

    for change in style.CHANGES:
        assert contrast(style.mark(change)["line"]["color"]) >= 3, change
    assert contrast(style.CHANGES["1->1"][1]) < 3  # what a pale one would be without its edge
    drawn = {t.marker.line.color for n in ("transitions", "errors") for t in FIGURES[n].data}
    assert {style.CORRECT, style.INCORRECT} <= drawn


@pytest.mark.parametrize("name", ["dots", "transitions"])
def test_no_method_is_cut_off(name):
    for axis in FIGURES[name].select_yaxes():
        low, high = axis.range
        assert low < -0.5 and high > len(axis.categoryarray) - 0.5


def test_colours_belong_to_methods_whatever_else_is_drawn():
    alone = plots.spi_dots(records()[records()["method"] == "optimal_probe"])
    together = FIGURES["dots"]
    used = {trace.y[0]: trace.marker.color for trace in together.data}
    assert used["optimal_probe"] == alone.data[0].marker.color == plots.colour_of("optimal_probe")
    looks = {(plots.colour_of(name), style.symbol_of(name)) for name in methods.METHODS}
    assert len(looks) == len(methods.METHODS)  # every method has a look of its own


def test_geometry_moves_examples_to_where_they_land_and_leaves_the_others_alone():
    traces = _traces(FIGURES["geometry"])
    (shift,) = [trace for name, trace in traces.items() if str(name).startswith("shift")]
    ends, n_moved = np.array(shift.x).reshape(-1, 3), int((cloud()["score"] > 0.5).sum())
    assert len(ends) == len(traces["where they land"].x) == n_moved > 0
    assert (ends[:, 0] > 0.5).all() and (ends[:, 1] == 0.5).all()
    falls = np.array(shift.y).reshape(-1, 3)
    assert falls[:, 1] - falls[:, 0] == pytest.approx(-1)
    alone = [len(t.x) for name, t in traces.items() if "left alone" in str(name)]
    assert sum(alone) == len(cloud()) - n_moved
    still = plots.geometry(cloud(moved=False), method="optimal_probe", layer=1)
    assert "abstained" in still.layout.title.subtitle.text
    assert not any("moved" in str(trace.name) for trace in still.data)


def test_predicted_errors_are_counted_before_and_after():
    figure = FIGURES["predicted"]
    counts = [int(sum(trace.y)) for trace in figure.data]
    assert counts == [1, 2, 2, 1]  # before: correct, incorrect; after: correct, incorrect
    assert "2 above the threshold before, 0 after" in figure.layout.title.subtitle.text
    assert sum(bool(shape.showlegend) for shape in figure.layout.shapes) == 1


def test_axes_are_labelled_with_one_bin_and_with_many_layers():
    """Left alone plotly labels the only bin's centre; every second of 30 layers fits no phone."""
    axis = FIGURES["predicted"].layout.xaxis2
    assert (axis.tick0, axis.dtick, axis.range) == (0, 0.2, (0, 1))
    few = pd.concat([probes().assign(layer=layer) for layer in range(4)])
    many = pd.concat([probes().assign(layer=layer) for layer in range(30)])
    assert list(plots.probe_error(few).layout.xaxis.tickvals) == [0, 1, 2, 3]
    assert plots.probe_error(many).layout.xaxis.tickvals is None


@pytest.mark.parametrize("threshold", [0.001, 0.01, 0.05, 0.35, 0.5, 0.7, 0.99])
def test_no_bar_straddles_the_threshold(threshold):
    """The bars on its right hold exactly what the caption counts as above it."""
    rng = np.random.default_rng(0)
    before = rng.uniform(size=400)
    df = pd.DataFrame({"before": before, "after": np.minimum(before, threshold)})
    df = df.assign(correct_before=rng.random(400) < 0.5, correct_after=True)
    figure = plots.predicted_error(df, method="m", layer=1, threshold=threshold)
    above = {"before": 0, "after": 0}
    for trace in figure.data:
        left, right = np.array(trace.x) - trace.width / 2, np.array(trace.x) + trace.width / 2
        assert ((right <= threshold + 1e-9) | (left >= threshold - 1e-9)).all()
        stage = "before" if trace.yaxis in (None, "y") else "after"
        above[stage] += int(np.array(trace.y)[left >= threshold - 1e-9].sum())
    n_above = int((before > threshold + 1e-3).sum())
    assert above == {"before": n_above, "after": 0} and n_above > 0 or threshold > 0.98
    caption = figure.layout.title.subtitle.text
    assert f"{n_above:,} above the threshold before, 0 after" in caption


def test_a_shift_of_fixed_length_is_told_from_the_rule_that_lowers_the_prediction():
    for draw in (
        lambda fixed: plots.predicted_error(predicted(), method="m", layer=1, fixed=fixed),
        lambda fixed: plots.geometry(cloud(), method="m", layer=1, fixed=fixed),
    ):
        assert "fixed length" in draw(True).layout.title.subtitle.text
        assert "fixed length" not in draw(False).layout.title.subtitle.text


def test_spaces_are_told_apart_on_one_scale_and_so_is_abstaining_from_no_effect():
    both = pd.concat([records(), records().assign(space="sae", decision=None)])
    figure = sae_or_raw.raw_against_sae(pd.concat([both.assign(layer=1), both.assign(layer=2)]))
    titles = [note.text for note in figure.layout.annotations]
    assert titles == [f"{task}, layer {i}" for task in ("clear", "hopeless") for i in (1, 2)]
    assert {tuple(axis.range) for axis in figure.select_xaxes()} == {(-1.05, 1.05)}
    raw = [t for t in figure.data if t.name == "residual stream"]
    assert [list(t.marker.symbol) for t in raw] == 2 * [["circle"]] + 2 * [["circle-open"]]
    sae = [t for t in figure.data if t.name == "SAE latents"]
    assert all(list(t.marker.symbol) == ["diamond"] for t in sae)


def test_the_steered_share_stands_at_its_layer_and_token():
    (heat,) = FIGURES["share"].data
    assert list(heat.x) == ["≤ -24", "-1", "final", "+1"]
    assert np.array(heat.z)[:, 2].tolist() == [80, 80]
    late = reach().assign(share=lambda df: df["share"] * (df["position"] >= 0))
    assert list(plots.steered_share(late, method="m", n=50).data[0].x) == ["-1", "final", "+1"]


def test_the_overlay_tells_positions_by_dash_and_features_by_colour():
    lines = {t.name: t.line for t in FIGURES["overlay"].data if t.showlegend}
    assert len(lines) == 5  # and each is named once for both panels
    last, answer = (lines[f"residual stream, {p}"] for p in ("final prompt token", "answer token"))
    assert last.color == answer.color != lines["SAE latents, answer token"].color
    assert last.dash != answer.dash


def test_a_transfer_matrix_has_what_was_fitted_in_rows():
    (heat,) = FIGURES["transfer"].data
    assert np.array(heat.z)[0, 1] == pytest.approx(0.7)  # fitted on one, measured on two


def test_the_ledger_keeps_tokens_that_occur_twice_apart():
    figure = FIGURES["ledger"]
    assert np.array(figure.data[0].z).shape == (2, 4)
    assert list(figure.layout.xaxis3.ticktext) == ["is", "it", "it", "?"]


def test_a_long_prompt_is_drawn_from_where_something_is_read_or_moved():
    rows = [
        {"pos": pos, "token": f"t{pos}", "layer": layer, "before": 0.5, "after": 0.5, "shift": 0.0}
        for pos in range(40)
        for layer in (0, 1)
    ]
    long = pd.DataFrame(rows).assign(valid=lambda df: df["pos"] == 39)
    figure = plots.ledger(long, title="Row 7")
    assert list(figure.layout.xaxis3.ticktext) == [f"t{pos}" for pos in range(31, 40)]
    assert "from token 31 on" in figure.layout.title.subtitle.text
    long.loc[long["pos"] == 20, "shift"] = 0.1  # what is moved is shown, valid or not
    assert plots.ledger(long, title="Row 7").layout.xaxis3.ticktext[0] == "t12"
    for whole in (long.assign(valid=True), long.assign(valid=False, shift=0.0)):
        assert len(plots.ledger(whole, title="Row 7").layout.xaxis3.ticktext) == 40


def test_a_map_without_any_shift_is_pale_and_no_prediction_is_grey():
    still = plots.ledger(tokens().assign(shift=0.0), title="Row 7").data[2]
    assert still.zmin == 0 < still.zmax and not np.array(still.z).any()
    assert still.colorscale[0][1].endswith(".06)")
    for _, colour in FIGURES["ledger"].data[0].colorscale:
        rgb = hex_to_rgb(colour) if colour[0] == "#" else re.findall(r"\d+", colour)[:3]
        assert max(map(int, rgb)) - min(map(int, rgb)) > 100  # of grey all three are alike


def test_predictions_where_the_probe_is_not_valid_are_greyed_out():
    figure = FIGURES["ledger"]
    greyed = sorted((shape.x0 + 0.5, shape.xref) for shape in figure.layout.shapes)
    assert greyed == [(0, "x"), (0, "x2")]  # not the shifts; one rectangle over tokens 0 to 2
    assert {shape.x1 - 0.5 for shape in figure.layout.shapes} == {2}
    assert "grey" in figure.layout.title.subtitle.text
    for heat, drawn in zip(figure.data, (1, 1, 4), strict=True):  # shifts are shown everywhere
        assert np.isfinite(np.array(heat.z, dtype=float)).sum(1).tolist() == [drawn, drawn]
    everywhere = plots.ledger(tokens().assign(valid=True), title="Row 7")
    assert not everywhere.layout.shapes
