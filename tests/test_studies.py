"""What pages say of the studies is what their scores say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from conftest import ROOT

from densecal.cli.study import Study

_spec = importlib.util.spec_from_file_location("studies", ROOT / "docs" / "_site" / "studies.py")
assert _spec is not None
assert _spec.loader is not None
site = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(site)

pytestmark = pytest.mark.skipif(not site.studies(), reason="a source archive is without the studies' scores")


def test_there_are_pages_with_studies():
    assert ROOT / "docs" / "studies" / "hippocampus-small.md" in site.pages()
    assert "hippocampus_small" in site.studies()


@pytest.mark.parametrize("page", [path.relative_to(ROOT) for path in site.pages()], ids=str)
def test_tables_are_those_of_the_scores(page):
    text = (ROOT / page).read_text()
    assert text == site.filled(text), f"{page} is out of date: uv run docs/_site/studies.py"
    assert not re.search(r"^<!-- (value|gap|front)", text, re.M), "at the beginning of a line a comment ends the paragraph"


def test_a_number_that_was_changed_is_noticed():
    text = (ROOT / "docs" / "studies" / "hippocampus-small.md").read_text()
    block = re.search(r"<!-- study: .*?<!-- /study -->", text, re.S)
    assert block is not None
    number = re.search(r"\d\.\d{3,}", block[0])
    assert number is not None
    changed = block[0].replace(number[0], "9.876", 1)
    assert site.filled(changed) != changed
    sentence = "<!-- value: hippocampus_small ce dice -->9.876<!-- /value -->"
    assert re.fullmatch(r"<!-- value: hippocampus_small ce dice -->0\.\d{3}<!-- /value -->", site.filled(sentence))


@pytest.mark.parametrize("study", site.studies())
def test_scores_are_of_the_study_as_it_is(study):
    """Each file's settings are those of its method now, and no other run is among them."""
    expected = Study.load(study.partition("/")[0])
    for runs in site.methods_of(study).values():
        for run in runs:
            assert list(run.facts["settings"]) == list(expected.runs[run.method]), run.file_name
            assert run.replicate["seed"] in expected.seeds
            assert run.posthoc in ("", *expected.posthoc)


def test_charts_that_are_kept_are_shown():
    pages = "".join(page.read_text() for page in site.pages())
    charts = [path.relative_to(site.STUDIES).as_posix() for path in site.STUDIES.rglob("*.svg")]
    assert {Path(chart).name for chart in charts} == {"front.svg", "reliability.svg", "length.svg", "size.svg"}
    assert [chart for chart in charts if f"{chart})" not in pages] == []
