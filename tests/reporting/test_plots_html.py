"""Plots are real pictures of the figures; the page is complete, self-contained and safe."""

from __future__ import annotations

import html as standard_html
import io
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from peftkit.reporting import html, plots, run_report
from tests.reporting.test_formatting import ASSESSMENT, BASELINES

pytestmark = pytest.mark.usefixtures("drawn_plots")
LOG = [{"step": step, "epoch": step / 100, "loss": 2.0 / step, "learning_rate": 1e-3} for step in range(10, 410, 10)]
LOG += [{"step": 200, "epoch": 2, "split": "validation", "loss": 0.4, "accuracy": 0.8},
        {"step": 400, "epoch": 4, "split": "validation", "loss": 0.3, "accuracy": 0.9},
        {"step": 400, "event": "best", "message": "saved"}]  # fmt: skip
BINS = [{"low": 0.5, "high": 0.6, "count": 10, "confidence": 0.55, "accuracy": 0.4}]
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"


def test_curves_hold_the_logged_points():
    losses, scores = plots.learning_curves(LOG).axes
    lines = {line.get_label(): line for line in losses.get_lines()}
    np.testing.assert_array_equal(lines["validation"].get_xydata(), [[200, 0.4], [400, 0.3]])
    np.testing.assert_array_equal(scores.get_lines()[0].get_ydata(), [0.8, 0.9])
    assert scores.get_title(loc="left") == "validation accuracy"


def test_the_smoothed_curve_is_a_mean_of_its_neighbours():
    lines = {line.get_label(): line for line in plots.learning_curves(LOG).axes[0].get_lines()}
    smooth, raw = lines["training (smoothed)"].get_ydata(), np.array([row["loss"] for row in LOG[:40]])
    assert smooth[20] == pytest.approx(raw[18:23].mean())
    assert smooth[0] == pytest.approx(raw[:3].mean())


@pytest.mark.parametrize("metric", [None, "loss"])
def test_the_second_panel_is_never_the_loss_again(metric):
    assert plots.learning_curves(LOG, metric).axes[1].get_title(loc="left") == "validation accuracy"


def test_curves_of_nothing_and_of_figures_that_are_missing():
    assert len(plots.learning_curves([]).axes) == 1
    plots.png(plots.learning_curves([{"step": 1, "split": "validation", "loss": None, "f1": None}]))


@pytest.mark.parametrize("classes", [2, 20])
def test_a_confusion_matrix_of_any_size_is_a_picture(classes, tmp_path):
    counts = np.random.default_rng(0).integers(0, 2000, (classes, classes))
    figure = plots.confusion_matrix(counts, [f"class {number}" for number in range(classes)])
    picture = imread(io.BytesIO(plots.png(figure)))
    assert min(picture.shape[:2]) > 400
    assert picture.std() > 0.01
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert shown == ({str(count) for count in counts.flat} - {"0"} if classes <= 20 else set())


def test_class_names_are_not_read_as_formulas():
    figure = plots.confusion_matrix([[1, 0], [0, 0]], ["$5_{", r"\frac{"])
    assert plots.png(figure).startswith(b"\x89PNG")


def test_the_same_figure_gives_the_same_bytes():
    assert plots.png(plots.reliability_diagram(BINS, 0.15)) == plots.png(plots.reliability_diagram(BINS, 0.15))


def test_reliability_and_scatter_hold_the_figures():
    top, bottom = plots.reliability_diagram(BINS, 0.15).axes
    assert top.patches[0].get_height() == 0.4
    assert bottom.patches[0].get_height() == 10
    assert "0.150" in top.get_title(loc="left")
    points = plots.scatter([[1, 2], [3, 4]]).axes[0].collections[0].get_offsets()
    np.testing.assert_array_equal(points, [[1, 2], [3, 4]])


def test_the_notebooks_backend_is_left_alone():
    before = matplotlib.get_backend()
    plots.png(plots.scatter([[1, 2]]))
    assert matplotlib.get_backend() == before


class Page(HTMLParser):
    """Collects tags, what they load, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.handlers, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in {"src", "href", "action"}]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def full(text="a text"):
    mistakes = [{**ASSESSMENT["mistakes"][0], "text": text, "gold": text, "file": text}]
    one = {**ASSESSMENT, "mistakes": mistakes, "labels": [text, "b"], "calibration": {"bins": BINS},
           "per_class": [{**ASSESSMENT["per_class"][0], "label": text}]}  # fmt: skip
    return html.Report(
        title=text, recipe=f"name: {text}", summary=text, assessments={"validation": one, "test": one},
        baselines=[{**BASELINES[0], "note": text, "verdict": text}, BASELINES[1]],
        splits=[{"split": text, "rows": 5400}],
        cleaning=[{"name": text, "split": "train", "action": "dropped", "rows": 3, "examples": [text]}],
        trainable=[{"part": text, "parameters": 10, "trainable": True, "dtype": "float32", "bytes": 40}],
        log=LOG, samples=[{"prompt": text, "after": text}], notes=[text], commands=[("predict", text)],
        environment={"python": text, "packages": {text: text}},
    )  # fmt: skip


def test_the_page_holds_everything():
    page = Page(html.render(full()))
    for said in ("0.9125 [0.9000, 0.9200]", "Did finetuning help?", "Worst mistakes", "10 of 10 parameters (100.00%)",
                 "5,400", "3 dropped", "name: a text", "99.3%", "python"):  # fmt: skip
        assert said in page.text, said
    assert page.tags.count("img") == 3


def test_the_page_loads_nothing_and_runs_nothing():
    page = Page(html.render(full()))
    assert all(source.startswith("data:image/png;base64,") for source in page.loads)
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert "default-src 'none'" in html.render(full())


def test_users_texts_stay_texts_wherever_they_stand():
    rendered = html.render(full(EVIL))
    page, harmless = Page(rendered), Page(html.render(full()))
    assert page.tags == harmless.tags
    assert page.handlers == []
    assert page.text.count("<script>") >= 15
    assert standard_html.escape(EVIL, quote=False)[:20] in rendered


def test_an_almost_empty_report_is_a_page():
    page = Page(html.render(html.Report(title="x", recipe="name: x")))
    assert "Result" not in page.text
    assert "name: x" in page.text


def test_a_regression_and_several_labels_are_pages():
    shared = {"split": "test", "rows": 2, "confidence": 0.95, "metrics": ASSESSMENT["metrics"]}
    nowhere = {"text": "t", "file": None, "line": None}
    numbers = {
        **shared, "problem_type": "regression", "labels": ["score"], "pairs": [[1.0, 2.0], [3.0, 3.0]],
        "mistakes": [{**nowhere, "gold": 1.0, "predicted": 2.0, "error": 1.0}],
    }  # fmt: skip
    sets = {
        **shared, "problem_type": "multi_label_classification", "labels": ["a", "b"],
        "per_class": ASSESSMENT["per_class"],
        "mistakes": [{**nowhere, "gold": ["a", "b"], "predicted": [], "confidence": 0.5}],
    }  # fmt: skip
    assert set(html.plots_of(html.Report("x", "", assessments={"test": numbers}))) == {"scatter.png"}
    assert "1.0000" in Page(html.render(html.Report("x", "", assessments={"test": numbers}))).text
    said = Page(html.render(html.Report("x", "", assessments={"test": sets}))).text
    assert "a, b" in said
    assert "none" in said


def test_a_notebook_gets_the_inside_only():
    page = Page(html.render(full(), standalone=False))
    assert {"html", "head", "body"}.isdisjoint(page.tags)
    assert "Did finetuning help?" in page.text


def test_the_file_is_utf8(tmp_path, monkeypatch):
    monkeypatch.setattr(run_report, "read", lambda path: html.Report(title="naïve 文", recipe=""))
    run_report.write(tmp_path)
    assert "naïve 文" in (tmp_path / "report.html").read_text(encoding="utf-8")
