"""A report is read back from folders alone: whole, self-contained, honest about what is gone."""

import json
import re
import shutil
from dataclasses import replace
from html import escape
from importlib.util import find_spec

import pandas as pd
import plotly.graph_objects as go
import pytest
from chromium import BROWSER, Chromium
from conftest import run_in
from plotly.offline import get_plotlyjs

from mera_tl import storage
from mera_tl.benchmark import RunConfig
from mera_tl.certificate import percent
from mera_tl.report import RunFolder, find_runs, html, records_frame, render, report, write_report

METHODS = ("no_steering", "additive_probe", "optimal_probe")
CONFIG = RunConfig(
    model="organism",
    task="choice_hint",
    train="300",
    calibration="200",
    test="120",
    layers="1",
    positions="last",
    batch_size=60,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A real run on the organism; made once."""
    return run_in(tmp_path_factory.mktemp("runs") / "choice_hint", CONFIG, METHODS)


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    return write_report(folder, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the run, to be changed."""
    return shutil.copytree(folder, tmp_path / "run")


def change_records(run, change):
    records = storage.read_records(run / "records.jsonl")
    storage.write_records(run / "records.jsonl", [change(record) for record in records])


def specs(page):
    text = page.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', text, re.S)
    return json.loads(data)


def test_the_page_is_small_self_contained_and_holds_plotly_once(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) < 6e6
    assert text.count(get_plotlyjs()) == 1
    ours = text.replace(get_plotlyjs(), "")
    assert not re.search(r'(src|href)="https?:', ours)


def test_every_figure_has_its_place_and_its_files(page):
    text, figures = page.read_text(encoding="utf-8"), specs(page)
    wanted = {"curve_optimal_probe", "probe_rmse", "spi", "transitions"}
    assert wanted | {"predicted", "share", "geometry"} <= set(figures)
    assert text.count('role="img" aria-label="') == len(figures)
    for name in figures:
        assert text.count(f'id="{name}"') == 1
        json.loads((page.with_name("report_files") / f"{name}.json").read_text())
        assert len(pd.read_csv(page.with_name("report_files") / f"{name}.csv"))


def test_it_says_what_was_asked_decided_and_found(page, folder):
    text = page.read_text(encoding="utf-8")
    assert re.search(r"\d\xa0%", text)  # no line ends between a number and its sign
    text = text.replace("\xa0%", " %")
    record = RunFolder.open(folder).record("optimal_probe")
    for words in ("organism", "choice_hint", "300", "disjoint", record["certificate"][:60]):
        assert words in text
    for line in record["certificate"].splitlines():  # a sentence and its terms do not run together
        assert f"<p>{escape(line)}</p>" in text
    share = RunFolder.open(folder).changes("no_steering")["label"].value_counts(normalize=True)
    assert f"would get {100 * share.max():.1f} %" in text
    assert record["hashes"]["model"] in text and record["versions"]["torch"] in text


def test_the_command_makes_the_same_configuration(folder):
    command = RunFolder.open(folder).command
    assert command.startswith("mera run --model organism --task choice_hint")
    assert "--layers 1" in command and "--batch-size 60" in command
    assert "--dtype" not in command  # what is default is left out


def explorer(page) -> dict:
    text = page.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="explorer-rows">(.*?)</script>', text)
    return json.loads(data)


def test_the_explorer_holds_the_test_examples_as_they_were_answered(page, folder):
    run, told = RunFolder.open(folder), explorer(page)
    assert run.main_method is not None
    changes = run.changes(run.main_method).set_index("row")
    assert len(told["rows"]) == len(changes) == 120
    prompts = {example.row: example.prompt for example in run.test_task().examples}
    for row in told["rows"]:
        there = changes.loc[row["row"]]
        assert (row["change"], row["prompt"]) == (there["change"], prompts[row["row"]])
        assert row["p_after"] == pytest.approx(there["probs_after"], abs=1e-4)
        assert row["p_before"][told["options"].index(row["label"])] == pytest.approx(
            1 - row["error_before"], abs=2e-4
        )


def test_of_many_examples_those_that_changed_are_kept_and_it_is_said(folder, monkeypatch):
    monkeypatch.setattr(report, "MOST_EXAMPLES", 20)
    run = RunFolder.open(folder)
    changes = run.changes(str(run.main_method))
    told = report._examples(run, changes)["explorer"]
    changed = set(changes[changes["change"].isin(["0->1", "1->0"])]["row"])
    assert 0 < len(changed) < 20 == len(told["rows"])
    assert changed <= {row["row"] for row in told["rows"]}
    assert "of 120" in told["drawn"]


def test_changes_agree_with_the_record(folder):
    run = RunFolder.open(folder)
    for method in METHODS:
        counts = run.changes(method)["change"].value_counts().to_dict()
        wanted = {k: v for k, v in run.record(method)["transitions"].items() if v}
        assert counts == wanted


def test_a_shift_of_fixed_length_is_called_so_and_nothing_is_claimed_of_it(page, folder):
    run = RunFolder.open(folder)
    assert run.main_method == "additive_probe" and run.verdict.method is None
    text = page.read_text(encoding="utf-8")
    captions = {
        name: re.findall(rf'id="at-{name}">.*?<figcaption>(.*?)</figcaption>', text, re.S)[0]
        for name in ("predicted", "geometry")
    }
    assert all("fixed length" in caption for caption in captions.values())
    assert "It is not certified; it is shown because" in text
    other = replace(run, records=tuple(r | {"details": {}} for r in run.records))
    block = report._moved(other, report.Figures(page.parent / "other"))["by_layer"][0][1]
    assert "fixed length" not in block.caption  # the control


@pytest.fixture(scope="module")
def several(folder, tmp_path_factory):
    """A page of two runs, as a grid leaves them."""
    path = tmp_path_factory.mktemp("several")
    shutil.copytree(folder, path / "one")
    shutil.copytree(folder, path / "two")
    shutil.copy(folder / "records.jsonl", path)  # as a grid keeps them
    page = write_report(path)
    assert page == path / "report.html"
    return page


def test_several_runs_are_compared_and_each_is_there(several):
    names = set(specs(several))
    assert {"spi_heatmap", "spi_dots", "run0_spi", "run1_spi"} <= names


IN_SIGHT = """[...document.querySelectorAll(".plot")].filter(e =>
  !e.closest("details:not([open]), [hidden]")).every(e => e.dataset.drawn === "yes")"""
FOLDED = """[...new Set([...document.querySelectorAll("details:not([open]) .plot")]
  .map(e => "drawn" in e.dataset))]"""
RIGHT = """[...document.querySelectorAll("th")].filter(e => e.textContent === "decision"
  && e.checkVisibility()).map(e => e.getBoundingClientRect().right)"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_on_a_phone_decisions_are_in_sight_and_the_page_does_not_scroll_sideways(page, several):
    with Chromium() as browser:
        for path in (page, several):
            tab = browser.tab(path.as_uri(), width=400, dark=True)
            tab.wait(IN_SIGHT)
            # Single runs are folded, and drawn when they are opened: so that many load at once.
            assert tab.run(FOLDED) == ([False] if path == several else [])
            tab.run("document.querySelectorAll('details').forEach(fold => { fold.open = true })")
            assert tab.run("document.documentElement.scrollWidth") <= 400
            ends = tab.run(RIGHT)
            assert ends and max(ends) <= 400
            assert tab.run("document.documentElement.dataset.problems") is None


def test_a_run_without_activations_or_probes_still_opens(copy):
    shutil.rmtree(copy / "activations")
    shutil.rmtree(copy / "probes")
    assert "has fitted no probe" in write_report(copy).read_text("utf-8")


def test_changed_data_is_said_and_its_prompts_are_not_shown(copy):
    other = {"test": "0" * 16}
    change_records(copy, lambda r: r | {"hashes": r["hashes"] | {"data": other}})
    text = write_report(copy).read_text("utf-8")
    assert "prompts cannot be shown" in text and "explorer-rows" not in text


def test_records_from_before_intervals_and_free_text_still_open(copy):
    later = {"spi_interval", "accuracy_interval", "p_value", "free_text"}
    assert later <= RunFolder.open(copy).records[0].keys()
    change_records(copy, lambda record: {k: v for k, v in record.items() if k not in later})
    assert "spi" in specs(write_report(copy))


@pytest.mark.parametrize("number", [0, 99])
def test_another_format_says_what_to_do(copy, number):
    change_records(copy, lambda record: record | {"format": number})
    with pytest.raises(ValueError, match="run it again into a new folder"):
        write_report(copy)


def test_geometry_is_that_of_the_steering_that_was_used(folder):
    run = RunFolder.open(folder)
    cloud = run.cloud("additive_probe")
    assert cloud is not None
    plane, probe = cloud.plane(), cloud.steering.probe
    length = 0.1 * float(probe.resid_norm[1]) * float(probe.weights[1].norm())
    assert (plane["score"] - plane["score_after"]).to_numpy() == pytest.approx(length, rel=1e-3)
    assert plane["in_plane"].to_numpy() == pytest.approx(1, abs=1e-3)  # it moves along the probe
    resid = cloud.activations.resid("last")[1, plane.index]
    score = probe.score(resid.expand(4, -1, -1))[1]
    assert plane["score"].to_numpy() == pytest.approx(score, abs=1e-4)
    abstained = run.record("optimal_probe")["threshold"] is None
    assert (run.cloud("optimal_probe").plane()["score_after"].isna().all()) == abstained


def test_a_direction_that_is_not_kept_is_found_again(folder):
    """MERA along another direction lands on its limit, and mostly outside of the plane."""
    run = RunFolder.open(folder)
    *others, last = run.records
    details = last["details"] | {"direction": "controlled_contrastive"}
    turned = last | {"details": details, "threshold": 0.2}
    cloud = replace(run, records=(*others, turned)).cloud("optimal_probe")
    assert cloud is not None and cloud.limit is not None
    moved = cloud.plane().dropna()
    assert len(moved) and (moved["score"] > cloud.limit).all()
    assert moved["score_after"].to_numpy() == pytest.approx(cloud.limit, abs=1e-4)
    assert (moved["in_plane"] < 0.95).all()


@pytest.mark.skipif(find_spec("kaleido") is None, reason="kaleido is not installed")
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_figures_are_written_as_svg_and_png_where_there_is_a_browser(folder, tmp_path):
    page = write_report(folder, tmp_path / "page.html", images=True)
    assert "The figures also lie in page_files/ as SVG and PNG." in page.read_text("utf-8")
    assert "<svg" in (tmp_path / "page_files" / "spi.svg").read_text()
    assert (tmp_path / "page_files" / "spi.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_browser_a_sentence_says_so(page, folder, tmp_path, monkeypatch):
    def said() -> str:
        return write_report(folder, tmp_path / "page.html", images=True).read_text("utf-8")

    assert "write the report with --images" in page.read_text("utf-8")
    monkeypatch.setattr(html, "_WRITE_IMAGES", "raise SystemExit('there is no browser')")
    assert "SVG and PNG files were not written: there is no browser" in said()
    monkeypatch.setattr(html, "find_spec", lambda name: None)
    assert "pip install mera-tl[images]" in said()


def test_a_folder_without_runs_is_said(tmp_path):
    with pytest.raises(ValueError, match="records.jsonl"):
        find_runs(tmp_path)


def test_a_changed_certificate_is_refused(copy):
    path = copy / "certificates" / "optimal_probe" / "steering.json"
    path.write_text(path.read_text().replace('"n": 200', '"n": 2000'))
    with pytest.raises(ValueError, match="changed after it was saved"):
        write_report(copy)


def test_what_was_not_steered_has_no_interval(folder):
    frame = records_frame(RunFolder.open(folder).records).set_index("method")
    assert frame.loc["additive_probe", ["spi_low", "spi_high"]].notna().all()
    assert frame.loc["no_steering", ["spi_low", "spi_high"]].isna().all()
    steered = frame["spi_low"].notna()
    assert (frame["spi_low"] <= frame["spi"])[steered].all()
    assert (frame["spi"] <= frame["spi_high"])[steered].all()


def test_a_script_in_the_data_cannot_leave_its_place():
    figure = go.Figure(go.Scatter(x=["</script><script>alert(1)</script>"], y=[1]))
    text = render("<b>", {"a": figure}, prompt="</pre><script>alert(2)</script>")
    assert "<script>alert" not in text
    assert "<title>&lt;b&gt;</title>" in text


def test_the_verdict_comes_first_and_says_what_steers(page, folder):
    text, run = page.read_text(encoding="utf-8"), RunFolder.open(folder)
    assert text.index('class="card verdict') < text.index('id="evidence"') < text.index("<figure")
    shown = "leave the model alone" if run.verdict.method is None else run.verdict.method
    assert shown in text[: text.index('id="evidence"')]


def test_a_page_named_like_its_run_leaves_the_run_alone(folder, copy, tmp_path):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    page = write_report(copy, tmp_path / "run.html")
    assert page.is_file() and (tmp_path / "run_files" / "spi.json").exists()
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    shutil.copytree(folder, tmp_path / "other_files")
    with pytest.raises(ValueError, match="is the folder of a run"):
        write_report(copy, tmp_path / "other.html")
    with pytest.raises(ValueError, match="is a folder"):
        write_report(copy, copy)


def test_the_slider_counts_what_the_certificate_counted(folder):
    run = RunFolder.open(folder)
    told = report._slider(run, "", "optimal_probe")
    assert told is not None
    rows = run.certificates["optimal_probe"].evidence
    assert len(told["says"]) == len(told["marks"]) == len(told["labels"]) == len(rows)
    for row, said in zip(rows, told["says"], strict=True):
        assert said.startswith(f"{row.recoveries} recovered, {row.regressions} regressed of 200")


def test_after_a_search_the_slider_moves_only_the_threshold():
    tried = pd.DataFrame(
        {
            "direction": ["pattern", "pattern", "pattern", "contrastive"],
            "penalty": [3.0, 3.0, 0.03, None],
            "layers": [[1], [1], [1], [1]],
            "positions": "last",
            "strength": [None, None, None, 2.0],
            "threshold": [0.5, 0.2, 0.2, 0.5],
        }
    )
    chosen = {"direction": "pattern", "penalty": 3.0, "layers": [1], "positions": "last"}
    assert report._siblings(tried, chosen)["threshold"].tolist() == [0.2, 0.5]
    chosen |= {"direction": "contrastive", "penalty": None, "strength": 2.0}
    assert report._siblings(tried, chosen).index.tolist() == [3]


def test_a_last_error_is_not_rounded_away():
    assert [percent(share) for share in (0.998, 1.0, 0.692, 0.001, 0.0)] == [
        *("99.8 %", "100 %", "69 %", "0.1 %", "0 %")
    ]
