"""The files of a report: whole, self-contained, readable by programs."""

import base64
import csv
import hashlib
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from blank import print_blank
from cases import make_case
from evaluations import blobs, examples, full_evaluation
from matplotlib import pyplot

from densecal.labels import LabelSchema
from densecal.metrics import SegmentationEvaluation, class_prior_baseline
from densecal.report import SCHEMA_VERSION, Example, page, write_report
from densecal.report.drawing import Chart
from densecal.report.slices import PANELS
from densecal.report.summary import summary

SCHEMA = LabelSchema(("background", "anterior", "posterior"))
FACTS = {
    "title": "A <test> & run",
    "split": "test",
    "licence": "CC-BY",
    "seed": 3,
    "versions": {"torch": "2"},
    "notes": "Too small to mean anything.",
}
HISTORY = [{"epoch": e, "train/loss": 1 / (e + 1), "val/dice": 0.1 * e, "val/ece": None if e == 0 else 0.1} for e in range(4)]


def evaluated(spatial=(6, 7, 5), batch=3, schema=SCHEMA, soft=False):
    case = make_case(spatial, batch=batch)
    probs, label = case.logits.softmax(1), case.soft_labels if soft else case.label_map
    evaluation = SegmentationEvaluation(schema)
    evaluation.update(probs, label, torch.arange(batch))
    examples = [Example(f"case/{i}", case.logits[i, 0], label[i], probs[i], (1.0, 0.5, 2.0)[: len(spatial)]) for i in range(min(batch, 2))]
    return evaluation.compute(), examples


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    evaluation, examples = evaluated()
    path = write_report(folder, evaluation, SCHEMA, FACTS, examples, HISTORY, ["A demonstration."], case_ids=["case/0", "case/1", "case/2"])
    assert path == folder / "report.html"
    return folder, evaluation


@pytest.fixture
def no_charts(monkeypatch):
    """For tests of words and numbers: drawing takes a second per page."""
    monkeypatch.setattr(Chart, "save", lambda self, folder: None)
    monkeypatch.setattr(Chart, "inline", lambda self: [])


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets, self.ids, self.open, self.images = [], [], [], 0

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.targets.append(value)
            if name == "id":
                self.ids.append(value)
        self.images += tag == "img"
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_write_report_leaves_every_file_and_no_other(run):
    folder, _ = run
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    charts = ["classes", "dataset_reliability", "history_dice", "history_ece", "history_loss", "reliability"]
    pictures = [f"figures/{name}.{kind}" for name in charts for kind in ("png", "svg")]
    assert names == sorted(
        ["cases.csv", "report.html", "summary.json", "table.md", "table.tex", "figures/example_case_0.png", "figures/example_case_1.png", *pictures]
    )


def test_write_report_page_asks_for_nothing_outside(run):
    html = (run[0] / "report.html").read_text()
    links = Links()
    links.feed(html)
    assert links.open == []
    assert all(target.startswith(("#", "data:")) for target in links.targets)
    assert not re.search(r"url\((?!#)", html)
    assert "@import" not in html
    assert links.images == 2 * 3 * len(PANELS)
    # The page's own policy allows its one script, and nothing from outside.
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)[1]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy
    # References inside the charts find their targets, and only one of each.
    used = {target[1:] for target in links.targets if target.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", html))
    assert used <= set(links.ids)
    assert len({i for i in used if links.ids.count(i) > 1}) == 0


def test_write_report_page_says_what_a_reader_must_know(run):
    html = (run[0] / "report.html").read_text()
    for text in (
        "A &lt;test&gt; &amp; run",
        "A demonstration.",
        "Too small to mean anything.",
        "CC-BY",
        "How each number is computed",
        "anterior",
        "case/2",
    ):
        assert text in html
    assert f"{run[1].mean['dice']:.3f}" in html
    assert f"{run[1].pooled['foreground']['ece_top_label']:.3f}" in html
    assert "{num_bins}" not in html
    assert "nan" not in re.sub(r"<[^>]+>|data:[^\"]+", "", html).lower().split()


def test_write_report_summary_is_strict_json_with_every_key(run):
    folder, evaluation = run

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads((folder / "summary.json").read_text(), parse_constant=refuse)
    assert content["schema_version"] == SCHEMA_VERSION
    assert set(content) <= set(re.findall(r"- ``(\w+)``", summary.__doc__)) | {"num_defined"}
    assert content["intervals"] == content["curves"] == {}
    assert content["notes"] == ["A demonstration.", "Too small to mean anything."]
    assert content["classes"][1] == {"index": 1, "name": "anterior", "color": "#e69f00", "foreground": True}
    assert content["mean"]["dice"] == evaluation.mean["dice"]
    assert [row["case_id"] for row in content["cases"]] == ["case/0", "case/1", "case/2"]
    assert None in content["bins"]["all"]["top_label"]["accuracy"]  # empty bins


def test_write_report_cases_csv_has_a_row_per_case(run):
    folder, evaluation = run
    with open(folder / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["dice"]) for row in rows] == [row["dice"] for row in evaluation.cases]
    assert rows[0]["case_id"] == "case/0"


@pytest.mark.parametrize("broken", ["example_figure", "_save", "summary"])
def test_write_report_that_fails_leaves_no_page(tmp_path, monkeypatch, broken):
    evaluation, examples = evaluated()
    (tmp_path / "report.html").write_text("an older run")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(page, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, evaluation, SCHEMA, FACTS, examples)
    assert not (tmp_path / "report.html").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize("what", ["2d", "soft", "no background", "no cases", "nothing valid"])
def test_write_report_of_unusual_results(tmp_path, monkeypatch, what):
    if what not in ("no cases", "nothing valid"):  # there is less to draw in these
        print_blank(monkeypatch.setattr)
    schema = LabelSchema(("road", "car", "tree"), background=None) if what == "no background" else SCHEMA
    evaluation, examples = evaluated((9, 7) if what == "2d" else (6, 7, 5), schema=schema, soft=what == "soft")
    if what in ("no cases", "nothing valid"):
        metric, examples = SegmentationEvaluation(SCHEMA), []
        if what == "nothing valid":
            metric.update(torch.full((1, 3, 4), 1 / 3), torch.full((1, 4), -100), torch.tensor([0]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics: computed before any update
            evaluation = metric.compute()
    html = write_report(tmp_path, evaluation, schema, {}, examples).read_text()
    assert ("Soft Dice" in html) == (what == "soft")
    assert ("In and near the structure" in html) == (what != "no background")


def test_write_report_leaves_pyplot_as_it_was(tmp_path):
    backend, settings, numbers = matplotlib.get_backend(), dict(matplotlib.rcParams), pyplot.get_fignums()
    evaluation, examples = evaluated(batch=1)
    write_report(tmp_path, evaluation, SCHEMA, FACTS, examples)
    assert (matplotlib.get_backend(), pyplot.get_fignums()) == (backend, numbers)
    assert dict(matplotlib.rcParams) == settings


def test_write_report_too_few_case_ids(tmp_path, no_charts):
    evaluation, _ = evaluated()
    with pytest.raises(ValueError, match="Expected `case_ids` to name every case"):
        write_report(tmp_path, evaluation, SCHEMA, {}, case_ids=["a"])


def test_write_report_worst_case_first(run):
    html = (run[0] / "report.html").read_text()
    table = html[html.index("Per case, worst first") : html.index("Training</h2>")]
    order = [int(i) for i in re.findall(r'data-value="case/(\d)"', table)]
    assert len(order) == 3
    dice = [run[1].cases[i]["dice"] for i in order]
    assert dice == sorted(dice)


def test_write_report_numpy_facts(tmp_path, no_charts):
    evaluation, _ = evaluated(batch=1)
    facts = {"lr": np.float32(0.5), "seeds": (np.int64(1), 2), "folder": tmp_path, "resumed": False, "nothing": None}
    html = write_report(tmp_path, evaluation, SCHEMA, facts).read_text()
    assert "<dd>0.5</dd>" in html
    assert "<dd>1, 2</dd>" in html
    assert "<dd>no</dd>" in html


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """A street scene: every class counts, and the class shares of the training labels are known."""
    schema = LabelSchema(("sky", "road", "car", "never there"), ignore_index=255, background=None)
    probs, label = blobs(schema, (24, 48), 4)
    label[:, :3] = 255
    evaluation = full_evaluation(schema, probs, label, unit="voxels")
    colored = [Example(str(i), np.full((24, 48, 3), 90, np.uint8), label[i], probs[i]) for i in range(2)]
    folder = tmp_path_factory.mktemp("street")
    baseline = class_prior_baseline(evaluation, [0.25, 0.5, 0.25, 0])
    history = [{"epoch": e, "val/dice": 0.1 * e, "val/iou_dataset": 0.1 * e} for e in range(3)]
    write_report(folder, evaluation, schema, {}, colored, history, baseline=baseline)
    return folder, evaluation, baseline


def test_write_report_of_a_scene_leads_with_mean_iou(street):
    folder, evaluation, baseline = street
    html = (folder / "report.html").read_text()
    tiles = re.findall(r'<span class="muted small">([^<]+)</span><b>([^<]+)</b>', html)
    assert [name for name, _ in tiles] == [
        "mIoU, whole data set (D)",
        "mIoU, per image (I)",
        "mIoU, per class (C)",
        "Pixel accuracy",
        "ECE, everywhere",
        "ECE, along boundaries",
        "ECE, classwise",
        "Negative log-likelihood",
    ]
    assert tiles[0][1] == f"{evaluation.fine_grained['iou_dataset']:.3f}"
    assert "near the structure" not in html
    assert "background" not in re.sub(r"<style>.*?</style>|style=\"[^\"]*\"", "", html, flags=re.DOTALL)
    table = html[html.index("Per case, worst first") : html.index("Training</h2>")]
    iou = [evaluation.cases[int(i)]["iou"] for i in re.findall(r'<th scope="row" data-value="(\d)"', table)]
    assert len(iou) == 4
    assert iou == sorted(iou)
    assert (folder / "figures" / "history_iou_dataset.png").exists()
    assert not (folder / "figures" / "history_dice.png").exists()
    assert "data:image/jpeg" in html
    assert "IoU in this image" in html
    table = (folder / "table.md").read_text()
    assert f"| mIoU, whole data set (D) | {evaluation.fine_grained['iou_dataset']:.3f} | {baseline.scores['iou_dataset']:.3f} |" in table


def test_summary_holds_the_class_prior_baseline(street, full):
    folder, evaluation, baseline = street
    content = json.loads((folder / "summary.json").read_text())["baseline"]
    assert content["class_shares"] == [0.25, 0.5, 0.25, 0]
    assert content["scores"]["iou_dataset"] == baseline.scores["iou_dataset"]
    assert content["scores"].keys() <= evaluation.scalars().keys()
    assert json.loads((full[0] / "summary.json").read_text())["baseline"] is None  # shares not known


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    schema = LabelSchema(("background", "left <b>lobe</b>", "a $x_1$ & b", "never --> there"))
    probs, label = blobs(schema, (14, 16, 12), 4)
    evaluation = full_evaluation(schema, probs, label)
    names = [f"<i>case</i> {i} $ _" for i in range(4)]
    folder = tmp_path_factory.mktemp("full")
    write_report(folder, evaluation, schema, {"title": "Full"}, examples(schema, probs, label, names[:2]), case_ids=names)
    return folder, evaluation, schema


def test_write_report_shows_all_that_is_there(full):
    folder, evaluation, _ = full
    html = (folder / "report.html").read_text()
    names = {path.stem for path in (folder / "figures").glob("*.svg")}
    assert names == {"reliability", "dataset_reliability", "risk_coverage", "boundary_distance", "classes"}
    for text in (
        "Along boundaries",
        "Maximum calibration error",
        "Hausdorff distance, 95 %",
        "Worst 10 % of images",
        "95 % interval",
        "of the errors lie right at a boundary",
    ):
        assert text in html
    low, high = evaluation.intervals["dice"]
    assert f"{evaluation.mean['dice']:.3f} ({low:.2f} to {high:.2f})" in html
    assert "Along boundaries" in (folder / "table.md").read_text()


def test_write_report_escapes_names_everywhere(full):
    html = (full[0] / "report.html").read_text()
    links = Links()
    links.feed(html)
    assert links.open == []
    assert "<b>lobe" not in html
    assert "<i>case" not in html
    assert "left &lt;b&gt;lobe&lt;/b&gt;" in html
    assert "a $x_1$ &amp; b" in html


@pytest.mark.parametrize("which", ["full", "street"])
def test_summary_has_only_documented_keys(which, request):
    folder = request.getfixturevalue(which)[0]
    page = (Path(__file__).parents[2] / "docs" / "summary.md").read_text()
    documented = {key.strip() for quoted in re.findall(r"`([^`]+)`", page) for key in quoted.split(",")}
    regions = {"all", "foreground", "boundary"}

    def keys(value):
        if isinstance(value, dict):
            for key, item in value.items():
                yield key
                yield from keys(item)
        elif isinstance(value, list):
            for item in value:
                yield from keys(item)

    content = json.loads((folder / "summary.json").read_text())
    del content["definitions"], content["run"]
    for key in set(keys(content)) - regions:
        for name in (entry["name"] for entry in content["classes"]):
            key = key.replace(f"/{name}", "/<class>")
        general = re.sub(r"_(foreground|boundary)$", "", key) if key not in documented else key
        # A pooled measure is named by its region, `ece` is the top-label one.
        assert {key, general, "ece_top_label" if general == "ece" else general} & documented, key
    assert set(content) <= set(re.findall(r"``(\w+)``", summary.__doc__))


def test_summary_keeps_intervals_and_curves(full):
    folder, evaluation, _ = full
    content = json.loads((folder / "summary.json").read_text())
    assert content["intervals"]["ece_foreground"] == list(evaluation.intervals["ece_foreground"])
    assert content["curves"]["boundary_distance"]["unit"] == "mm"
    assert content["curves"]["risk_coverage"] == evaluation.curves["risk_coverage"]


def test_write_report_of_images_speaks_of_pixels(tmp_path, no_charts):
    probs, label = blobs(SCHEMA, (20, 24), 3)
    html = write_report(tmp_path, full_evaluation(SCHEMA, probs, label), SCHEMA, {}).read_text()
    assert "Number of pixels" in html
    assert not re.search(r"[^_/]voxels", re.sub(r"<dt>.*?</dt>", "", html))


def test_write_report_shows_the_worst_example_first(tmp_path, no_charts):
    evaluation, shown = evaluated(batch=2)
    best_first = sorted(shown, key=lambda example: -evaluation.cases[int(example.case_id[-1])]["dice"])
    html = write_report(tmp_path, evaluation, SCHEMA, {}, best_first, case_ids=["case/0", "case/1"]).read_text()
    assert re.findall(r"<h3>(case/\d)", html) == [example.case_id for example in reversed(best_first)]
