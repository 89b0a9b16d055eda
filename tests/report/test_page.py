"""The files of a report: whole, self-contained, readable by programs."""

import csv
import json
import re
import warnings
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch
from cases import make_case
from matplotlib import pyplot

from densecal.labels import LabelSchema
from densecal.metrics import SegmentationEvaluation
from densecal.report import SCHEMA_VERSION, Example, page, write_report

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
    charts = ["history_dice", "history_ece", "history_loss", "reliability"]
    pictures = [f"figures/{name}.{kind}" for name in charts for kind in ("png", "svg")]
    assert names == sorted(["cases.csv", "report.html", "summary.json", "figures/example_case_0.png", "figures/example_case_1.png", *pictures])


def test_write_report_page_asks_for_nothing_outside(run):
    html = (run[0] / "report.html").read_text()
    links = Links()
    links.feed(html)
    assert links.open == []
    assert all(target.startswith(("#", "data:")) for target in links.targets)
    assert not re.search(r"url\((?!#)", html)
    assert "@import" not in html
    assert "<script" not in html
    assert links.images == 2 * 3 * 4
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
    assert set(content) == {
        "schema_version",
        "densecal_version",
        "run",
        "notes",
        "split",
        "classes",
        "settings",
        "definitions",
        "mean",
        "num_defined",
        "pooled",
        "bins",
        "cases",
    }
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
def test_write_report_of_unusual_results(tmp_path, what):
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


def test_write_report_too_few_case_ids(tmp_path):
    evaluation, _ = evaluated()
    with pytest.raises(ValueError, match="Expected `case_ids` to name every case"):
        write_report(tmp_path, evaluation, SCHEMA, {}, case_ids=["a"])


def test_write_report_worst_case_first(run):
    html = (run[0] / "report.html").read_text()
    table = html[html.index("Per case, worst first") : html.index("Training</h2>")]
    order = [int(i) for i in re.findall(r"<td>case/(\d)</td>", table)]
    dice = [run[1].cases[i]["dice"] for i in order]
    assert dice == sorted(dice)


def test_write_report_numpy_facts(tmp_path):
    evaluation, _ = evaluated(batch=1)
    facts = {"lr": np.float32(0.5), "seeds": (np.int64(1), 2), "folder": tmp_path, "resumed": False, "nothing": None}
    html = write_report(tmp_path, evaluation, SCHEMA, facts).read_text()
    assert "<dd>0.5</dd>" in html
    assert "<dd>1, 2</dd>" in html
    assert "<dd>no</dd>" in html
