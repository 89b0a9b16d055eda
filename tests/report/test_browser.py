"""The pages as a browser shows them: nothing breaks, nothing is fetched, tables sort, nothing sticks out."""

import pytest
from browser import EXECUTABLE, Browser
from evaluations import blobs, examples, full_evaluation

from densecal.labels import LabelSchema
from densecal.metrics import SegmentationEvaluation, class_prior_baseline
from densecal.report import Example, write_comparison, write_report

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium")

STRUCTURES = LabelSchema(("background", "anterior_and_a_long_name_without_any_place_to_break_it", "<b>posterior</b>", "never there"))
STREET = LabelSchema(tuple(f"class {i}" for i in range(19)), background=None, ignore_index=255)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A folder per page: all that there is, street scenes, what training gives today, a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    probs, label = blobs(STRUCTURES, (16, 18, 14), 5)
    full = full_evaluation(STRUCTURES, probs, label)
    names = [f"case_{'x' * 60}_{i}" for i in range(5)]
    facts = {"title": "A_title_" * 20, "folder": "/a" * 100}
    write_report(folder / "full", full, STRUCTURES, facts, examples(STRUCTURES, probs, label, names[:1]), notes=["n" * 300], case_ids=names)
    street_probs, street = blobs(STREET, (24, 48), 3)
    street[:, :3] = 255
    scenes = full_evaluation(STREET, street_probs, street, unit="voxels")
    colored = Example("0", (street_probs[0, :3].movedim(0, -1) * 255).byte(), street[0], street_probs[0])
    write_report(folder / "street", scenes, STREET, {}, [colored], baseline=class_prior_baseline(scenes, [1 / 19] * 19))
    metric = SegmentationEvaluation(STRUCTURES)
    metric.update(probs, label, probs.new_tensor(range(5)).long())
    write_report(folder / "plain", metric.compute(), STRUCTURES, {})
    differences = {"b": {"dice": (0.1, 0.05, 0.2), "ece_foreground": (0.0, -0.1, 0.1)}}
    write_comparison(folder / "comparison", {"a" * 80: full, "b": full}, STRUCTURES, facts, differences=differences, case_ids=names)
    return folder


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("name", ["full", "street", "plain", "comparison"])
def test_page_fits_and_keeps_quiet(browser, pages, name, width, dark):
    page = pages / name / "report.html"
    browser.open(page, width=width, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach((d) => d.open = true)")
    assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [width, True]
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    # Charts follow the colours of the page.
    ink = browser.evaluate("[...document.querySelectorAll('svg [style*=--ink]')].map((e) => getComputedStyle(e).fill)")
    assert ("rgb(232, 237, 242)" if dark else "rgb(28, 39, 51)") in ink
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(18, 23, 29)" if dark else "rgb(245, 247, 249)")


COLUMN = "[...document.querySelector('#table-cases').tBodies[0].rows].map((row) => row.cells[{}].dataset.value)"
HEAD = "document.querySelector('#table-cases').tHead.rows[0].cells[{}]"


def test_table_sorts_by_click_up_and_down(browser, pages):
    browser.open(pages / "full" / "report.html")
    assert browser.evaluate(HEAD.format(1) + ".getAttribute('aria-sort')") == "ascending"  # worst first, as written
    dice = [float(value) for value in browser.evaluate(COLUMN.format(1))]
    assert dice == sorted(dice)
    browser.evaluate(HEAD.format(1) + ".querySelector('button').click()")
    assert [float(value) for value in browser.evaluate(COLUMN.format(1))] == sorted(dice, reverse=True)
    assert browser.evaluate(HEAD.format(1) + ".getAttribute('aria-sort')") == "descending"
    browser.evaluate(HEAD.format(0) + ".querySelector('button').click()")
    names = browser.evaluate(COLUMN.format(0))
    assert names == sorted(names)
    assert browser.evaluate(f"[{HEAD.format(0)}, {HEAD.format(1)}].map((head) => head.getAttribute('aria-sort'))") == ["ascending", "none"]


def test_table_sorts_by_keyboard(browser, pages):
    browser.open(pages / "full" / "report.html")
    browser.evaluate(HEAD.format(0) + ".querySelector('button').focus()")
    browser.press("Tab")  # on to the next header
    browser.press("Enter")
    assert browser.evaluate(HEAD.format(1) + ".getAttribute('aria-sort')") == "descending"
    dice = [float(value) for value in browser.evaluate(COLUMN.format(1))]
    assert dice == sorted(dice, reverse=True)


def test_table_keeps_undefined_values_last(browser, pages):
    browser.open(pages / "full" / "report.html")
    column = "[...document.querySelector('#table-classes').tBodies[0].rows].map((row) => row.cells[1].dataset.value)"
    for _ in range(2):
        browser.evaluate("document.querySelector('#table-classes thead th:nth-child(2) button').click()")
        values = browser.evaluate(column)
        assert values[-1] == ""
        assert all(values[:-1])
    numbers = [float(value) for value in values[:-1]]
    assert numbers == sorted(numbers, reverse=True)


def test_wide_tables_scroll_in_their_box(browser, pages):
    browser.open(pages / "full" / "report.html", width=375)
    box = "document.querySelector('#table-cases').parentElement"
    assert browser.evaluate(f"{box}.scrollWidth > {box}.clientWidth")
    assert browser.evaluate(f"[{box}.tabIndex, getComputedStyle({box}).overflowX]") == [0, "auto"]  # reached by keyboard


@pytest.mark.parametrize("width", [1280, 375])
def test_scores_of_classes_beside_an_image_stay_on_one_line(browser, pages, width):
    browser.open(pages / "street" / "report.html", width=width)
    heights = browser.evaluate("[...document.querySelectorAll('.of-classes li')].map((item) => item.clientHeight)")
    assert len(heights) > 5
    assert max(heights) < 40


def test_policy_of_the_page_stops_foreign_scripts(browser, pages, tmp_path):
    html = (pages / "plain" / "report.html").read_text()
    copy = tmp_path / "copy.html"
    copy.write_text(html.replace("</body>", "<script>document.title = 'taken over'</script></body>"))
    browser.open(copy)
    assert browser.evaluate("document.title") != "taken over"
    assert browser.problems
