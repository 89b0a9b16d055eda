"""What the pages beside the code promise: examples run, every method has its row, what was tested is pinned."""

from __future__ import annotations

import re
import tomllib

import pytest
from conftest import ROOT

from densecal.registry import LOSSES, TARGETS, TERMS

README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^[ ]*```python\n(.*?)^[ ]*```", page, flags=re.DOTALL | re.MULTILINE)


def test_examples_of_the_readme_run_as_pasted(capsys):
    names: dict[str, object] = {}
    blocks = python_blocks(README)
    assert len(blocks) >= 2
    for block in blocks:
        exec(block, names)
    assert re.fullmatch(r"ECE 0\.\d{3}\n", capsys.readouterr().out)
    assert set(names["parts"]) == {"ce", "dml", "neighbour"}


@pytest.mark.parametrize(("registry", "package"), [(LOSSES, "losses"), (TARGETS, "targets"), (TERMS, "terms")], ids=["losses", "targets", "terms"])
def test_every_method_has_its_row(registry, package):
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    for name in registry.list():
        cells = [f"`{package}.{registry[name].__name__}`"]
        if (ROOT / "configs" / registry.kind / f"{name}.yaml").exists():  # deep supervision has none: the network decides
            cells.append(f"`{registry.kind}={name}`")
        assert any(all(cell in row for cell in cells) for row in rows), f"README.md has no row with {' and '.join(cells)}."


def test_files_that_the_pages_link_to_are_there():
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "datasets/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_what_was_tested_is_pinned():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = content["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["train"], *content["dependency-groups"]["dev"]]
    names = {re.split(r"[\[>=<; ]", line)[0] for line in needed} - {"densecal"}
    assert names <= {line.split("==")[0] for line in content["tool"]["uv"]["constraint-dependencies"]}
