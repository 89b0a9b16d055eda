"""The page of suspicious labels: sorted, escaped, with pictures that show the region."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest
from browser import EXECUTABLE, Browser

from densecal.data.corrupted_copy import KnownError
from densecal.label_errors import SCORES, Region, Suspicion
from densecal.labels import LabelSchema
from densecal.report import Example
from densecal.report.label_errors import FLAGGED_COLORS, finding_panels, known_summary, write_label_errors

SCHEMA = LabelSchema(("background", "<b>head</b>", "tail"), ignore_index=255)
BRIGHT, DIM = (np.array(color) for color in FLAGGED_COLORS.values())


def suspicion(case_id: str, value: float, size: int = 3) -> Suspicion:
    region = Region(size, ((1, 2), (3, 4), (0, 5)), given=0, suggested=1) if size else None
    return Suspicion(case_id, dict.fromkeys(SCORES, value) | {"dice": 1 - value}, num_pixels=1000, num_flagged=size, region=region)


SUSPICIONS = [suspicion("a<script>alert(1)</script>", 0.1), suspicion("b", 0.2, size=0), suspicion("c", 0.3), suspicion("d", 0.4)]
KNOWN = {name: KnownError(name, kind, 2.0, 0, 5, 0.8) for name, kind in ((SUSPICIONS[0].case_id, "shift"), ("c", "flip"), ("elsewhere", "flip"))}


def example(case_id: str, shape: tuple[int, ...] = (12, 14, 10), image: bool = True) -> tuple[Example, np.ndarray]:
    rng = np.random.default_rng(0)
    label = np.zeros(shape, int)
    label[0] = 255
    probs = np.zeros((3, *shape), np.float32)
    probs[0] = 1
    flagged = np.zeros(shape, bool)
    flagged[(slice(3, 6),) * len(shape)] = True
    probs[0][flagged], probs[1][flagged] = 0, 1
    return Example(case_id, rng.random(shape) if image else None, label, probs, (1.0, 1.0, 2.0)[: len(shape)]), flagged


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    shown = [example(one.case_id) for one in SUSPICIONS[:2]]
    facts = {"title": "Labels & <errors>", "runs": ["r" * 200]}
    write_label_errors(folder, SCHEMA, SUSPICIONS, "margin", [[0, 6, 0], [0, 0, 0], [3, 0, 0]], shown, facts, ["Mind <this>."], known=KNOWN)
    return folder


def test_table_has_every_case_and_score_in_order(folder):
    with (folder / "label_errors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case_id"] for row in rows] == [one.case_id for one in SUSPICIONS]
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[0]["region_box"] == "1:2 3:4 0:5"
    assert (rows[0]["region_given"], rows[0]["region_suggested"]) == ("background", "<b>head</b>")
    assert rows[1]["region_size"] == "0"
    assert [row["known_error"] for row in rows] == ["shift", "", "flip", ""]
    assert all(float(rows[2][score]) == pytest.approx(0.7 if score == "dice" else 0.3) for score in SCORES)


def test_page_is_escaped_and_says_what_was_found(folder):
    page = (folder / "report.html").read_text()
    assert "<script>alert" not in page
    assert "<b>head</b>" not in page
    assert "a&lt;script&gt;" in page
    assert "Labels &amp; &lt;errors&gt;" in page
    assert len(re.findall(r"<img src=\"data:image/png;base64,", page)) == 8
    headings = re.findall(r"<h3>(\d)\. ", page)
    assert headings == ["1", "2"]
    assert "6 of 4,000 voxels" not in page
    assert "9 of 4,000 voxels are flagged" in page
    assert "background, where the models see &lt;b&gt;head&lt;/b&gt;" in page
    assert "known error: shift" in page


def test_known_errors_are_counted():
    """Ranks 1 and 3 of 4: one of the first two, (1 / 1 + 2 / 3) / 2; by Dice the order is the reverse, ranks 2 and 4."""
    lines = known_summary(SUSPICIONS, "margin", KNOWN)
    assert lines[0] == "2 known errors in 4 cases: precision at 2 0.500, average precision 0.833 (by chance 0.500)"
    assert lines[1:3] == ["flip 2: rank 3", "shift 2: rank 1"]
    assert "by dice: precision at 2 0.500, average precision 0.500" in lines
    assert lines[-1] == "1 more known errors are in cases that were not looked at"
    assert known_summary(SUSPICIONS, "margin", {}) == ["none of the known errors is in a case that was looked at"]


def test_volume_is_cut_through_the_region():
    case, flagged = example("a")
    region = np.zeros_like(flagged)
    region[4, 4:6, 3:5] = True
    panels = finding_panels(case, flagged, SCHEMA, region)
    assert panels.names == ("Image", "Label", "Prediction", "Flagged")
    assert panels.title == "slice 5 of 12 across axis 1"
    marked = panels.images[-1].reshape(-1, 3)
    bright, dim = (int((marked == color).all(1).sum()) for color in (BRIGHT, DIM))
    assert bright / dim == pytest.approx(4 / 5, rel=0.1)  # 4 voxels of the region, 5 of the others in that slice
    assert all(image.shape == panels.images[0].shape for image in panels.images)


def test_large_image_is_shown_around_the_region_and_in_its_place():
    label = np.zeros((400, 600), int)
    probs = np.zeros((3, 400, 600), np.float32)
    probs[0] = 1
    flagged = np.zeros((400, 600), bool)
    flagged[390:400, 20:40] = True
    photo = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    panels = finding_panels(Example("a", photo, label, probs), flagged, SCHEMA)
    assert panels.names == ("Place in the whole", "Image", "Label", "Prediction", "Flagged")
    frame = (panels.images[0] == BRIGHT).all(2)
    rows, columns = np.flatnonzero(frame.any(1)), np.flatnonzero(frame.any(0))
    height = panels.images[0].shape[0]
    assert rows[-1] == height - 1
    assert columns[0] == 0
    assert (rows[-1] - rows[0]) / height == pytest.approx(0.35, abs=0.02)
    assert panels.images[1].shape[0] / panels.images[1].shape[1] == pytest.approx(400 / 600, rel=0.01)
    share = (panels.images[-1] == BRIGHT).all(2).mean()
    assert share == pytest.approx(200 / (140 * 210), rel=0.1)


def test_large_region_is_shown_whole():
    label = np.zeros((400, 600), int)
    probs = np.zeros((3, 400, 600), np.float32)
    probs[0] = 1
    flagged = np.zeros((400, 600), bool)
    flagged[:200, 20:40] = True
    assert finding_panels(Example("a", np.zeros((400, 600)), label, probs), flagged, SCHEMA).names == ("Image", "Label", "Prediction", "Flagged")


def test_small_image_without_its_photograph():
    case, flagged = example("a", (9, 11), image=False)
    panels = finding_panels(case, flagged, SCHEMA)
    assert panels.names == ("Label", "Prediction", "Flagged")
    assert panels.title == ""


def test_nothing_flagged_shows_the_structure():
    case, flagged = example("a")
    label = np.zeros_like(case.label)
    label[:, 9, 2:5] = 1
    shown = finding_panels(Example("a", case.image, label, case.probs), np.zeros_like(flagged), SCHEMA)
    assert shown.title == "slice 10 of 14 across axis 2"


def test_shapes_that_do_not_fit():
    case, flagged = example("a")
    with pytest.raises(ValueError, match="Expected image, label and flagged pixels of 'a' of the shape"):
        finding_panels(case, flagged[1:], SCHEMA)


@pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium")
def test_page_fits_in_a_browser_and_fetches_nothing(folder):
    browser = Browser()
    try:
        for width in (1280, 375):
            browser.open(folder / "report.html", width=width, dark=False)
            assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [width, True]
        assert browser.problems == []
        assert {url for url in browser.requests if not url.startswith("data:")} == {(folder / "report.html").as_uri()}
    finally:
        browser.close()
