"""The site: it builds without a warning, its pages' code runs, and its cards and pictures say what the code does."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_documentation import python_blocks

import densecal.losses
import densecal.metrics
import densecal.targets
import densecal.terms
from densecal.registry import LOSSES, TARGETS, TERMS

pytest.importorskip("matplotlib")
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if python_blocks(path.read_text(encoding="utf-8")))


@pytest.fixture(scope="module", autouse=True)
def path_of_the_sites_code():
    sys.path.insert(0, str(ROOT / "docs" / "_site"))
    yield
    sys.path.remove(str(ROOT / "docs" / "_site"))


@pytest.fixture(scope="module")
def methods():
    return importlib.import_module("method_table").read_methods()


@pytest.fixture(scope="module")
def pictures():
    return importlib.import_module("method_pictures")


@pytest.fixture(scope="module")
def cards():
    pytest.importorskip("griffe")
    return importlib.import_module("method_cards")


def test_pages_with_code_are_found():
    assert {"index.md", "audit.md", "integrations.md"} <= {path.name for path in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=[str(path.relative_to(ROOT / "docs")) for path in PAGES])
def test_code_of_the_page_runs(page):
    names: dict[str, object] = {}
    for block in python_blocks(page.read_text(encoding="utf-8")):
        exec(block, names)


def test_every_method_has_a_card(methods):
    entries = {entry for method in methods for entry in method.entries}
    assert {registry[name] for registry in (LOSSES, TARGETS, TERMS) for name in registry.list()} <= entries
    slugs = [method.slug for method in methods]
    assert len(set(slugs)) == len(slugs)


def test_cards_have_formula_source_defaults_and_code_that_runs(methods, cards):
    for method in methods:
        page = cards.card(method, has_picture=True)
        assert not re.search(r":(?:math|func|class|meth):`|\.\. math::", page), method.slug
        for config in method.configs:
            assert f'```yaml title="configs/{config.replace("=", "/")}.yaml"' in page
        for block in python_blocks(page):
            names: dict[str, object] = {}
            exec(block, names)
            assert isinstance(names.get("loss_function", names.get("calibrator")), torch.nn.Module)
    svls = cards.card(next(method for method in methods if method.slug == "svls"), has_picture=True)
    assert "$$\nq_c(x) = \\frac" in svls
    assert "Islam and Glocker" in svls
    assert "from densecal.losses import SVLSLoss" in svls


def test_docstrings_become_markdown(cards):
    docstrings = importlib.import_module("docstrings")
    assert doctest.testmod(docstrings) == (0, 1)
    assert docstrings.to_markdown("See :class:`Loss`, :math:`x_1`.", lambda name: f"a.{name}") == (
        'See <autoref optional identifier="a.Loss"><code>Loss</code></autoref>, \\(x_1\\).'
    )


def test_cards_say_what_is_needed(methods, cards):
    page = cards.card(next(method for method in methods if method.slug == "rater_mean"), has_picture=False)
    assert "`rater_labels`" in page
    assert "![" not in page


def test_pull_of_cross_entropy_is_what_is_missing_to_one(pictures):
    labels = pictures.label_map()
    pull = pictures.pull(pictures.whole_loss(densecal.terms.CrossEntropy()), labels, {})
    torch.testing.assert_close(pull, (1 - pictures.CONFIDENCES)[:, None].expand(-1, 2))


def test_pull_of_a_target_ends_at_the_share_that_it_leaves(pictures):
    target = densecal.targets.SVLSTarget()
    labels = pictures.label_map()
    shares = target(labels, 3).probs.gather(1, labels[:, None])[0, 0]
    inside, edge = shares[pictures.INSIDE], shares[pictures.EDGE]
    assert inside == 1.0
    assert edge < 1.0
    pull = pictures.pull(pictures.whole_loss(target), labels, {})
    torch.testing.assert_close(pull, torch.stack([inside, edge]) - pictures.CONFIDENCES[:, None])


def test_pictures_are_the_same_each_time(methods, pictures):
    for slug in ("svls", "random_rater"):
        method = next(method for method in methods if method.slug == slug)
        assert pictures.picture(method) == pictures.picture(method)


def test_site_builds_without_a_warning(tmp_path):
    """Every page, card, picture and public name, and nothing of the code that makes it."""
    pytest.importorskip("mkdocs")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    site = tmp_path / "site"
    assert not list(site.rglob("*.py"))
    for path in (ROOT / "docs").rglob("*.md"):
        assert (site / path.relative_to(ROOT / "docs")).with_suffix(".html").is_file()
    card = (site / "methods" / "svls.html").read_text(encoding="utf-8")
    assert 'src="svls.svg"' in card
    assert (site / "methods" / "svls.svg").read_bytes().startswith(b"<?xml")
    assert 'href="../reference/densecal.losses.html#densecal.losses.SVLSLoss"' in card
    for package in (densecal.losses, densecal.targets, densecal.terms, densecal.metrics):
        page = (site / "reference" / f"{package.__name__}.html").read_text(encoding="utf-8")
        for name in filter(lambda name: callable(getattr(package, name)), package.__all__):
            assert f'id="{package.__name__}.{name}"' in page
        assert not re.search(r":(?:math|func|class|meth):|\.\. math::|&gt;&gt;&gt; [^<]*</p>", page)
