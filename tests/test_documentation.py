"""What the pages beside the code promise: examples run, every method has its row, what was tested is pinned."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib

import pytest
from conftest import ROOT

import densecal
from densecal.registry import CALIBRATORS, LOSSES, METRICS, TARGETS, TERMS

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


def test_every_calibrator_has_its_row():
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    for name in CALIBRATORS.list():
        cells = (f"`posthoc.{CALIBRATORS[name].__name__}`", f"`posthoc={name}`")
        assert any(all(cell in row for cell in cells) for row in rows), f"README.md has no row with {' and '.join(cells)}."


def test_every_metric_is_named():
    for name in METRICS.list():
        assert f"`{METRICS[name].__name__}`" in README, f"README.md does not name {METRICS[name].__name__}."


def test_every_recipe_has_its_row():
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    for path in (ROOT / "configs" / "experiment").glob("*.yaml"):
        assert any(row.startswith(f"| `{path.stem}` |") for row in rows), f"README.md has no row for experiment={path.stem}."


def test_every_perturbation_has_its_row():
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    for path in (ROOT / "configs" / "perturbation").glob("*.yaml"):
        assert any(f"`perturbation={path.stem}`" in row for row in rows), f"README.md has no row with perturbation={path.stem}."


def test_files_that_the_pages_link_to_are_there():
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "datasets/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_what_was_tested_is_pinned():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = content["project"]
    extras = [name for extra in project["optional-dependencies"].values() for name in extra]
    groups = [name for group in content["dependency-groups"].values() for name in group]
    needed = [*project["dependencies"], *extras, *groups]
    names = {re.split(r"[\[>=<; ]", line)[0] for line in needed} - {"densecal"}
    pins = [*content["tool"]["uv"]["constraint-dependencies"], *content["dependency-groups"]["dev"]]
    assert names <= {line.split("==")[0] for line in pins if "==" in line}


def test_citation_is_that_of_the_package():
    """The fields that the format requires, and the version and title of the package, which the README's entry has too."""
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    assert all(author.keys() & {"name", "family-names"} for author in citation["authors"])
    assert set(citation) <= {"cff-version", "message", "type", "title", "version", "license", "authors", "abstract", "keywords", "date-released"}
    assert citation["type"] == "software"
    assert (citation["version"], citation["license"]) == (densecal.__version__, project["license"])
    assert citation["title"].startswith(f"{project['name']}: ")
    assert citation["keywords"] == project["keywords"]
    assert f"title = {{{citation['title']}}}" in README
    assert f"version = {{{densecal.__version__}}}" in README


def test_workflow_checks_every_python_that_is_promised():
    yaml = pytest.importorskip("yaml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    checks = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]["checks"]
    promised = re.findall(r"Python :: (3\.\d+)$", "\n".join(project["classifiers"]), flags=re.MULTILINE)
    assert checks["strategy"]["matrix"]["python"] == promised
    assert any(step.get("run") == ".ci/run" for step in checks["steps"])


def test_a_method_takes_one_file_and_its_config(tmp_path):
    """Those of the guide, in a copy of the package: found by name, on the command line too, and working."""
    pytest.importorskip("hydra")
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for folder in ("densecal", "configs", "datasets"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (code,) = python_blocks(guide)
    (config,) = re.findall(r"^[ ]*```yaml\n(.*?)^[ ]*```", guide, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "densecal" / "terms" / "shrink.py").write_text(textwrap.dedent(code))
    (tmp_path / "configs" / "term" / "shrink.yaml").write_text(textwrap.dedent(config))
    script = """
        import hydra, torch, densecal
        from densecal.cli.configuration import prepare_arguments
        from densecal.cli.settings import register_settings
        from densecal.registry import TERMS
        from densecal.targets import one_hot_target

        register_settings()
        line = prepare_arguments(["loss=compound", "term=[ce,shrink]", "loss.terms.shrink.weight=0.5"], "train")
        with hydra.initialize_config_dir(densecal.resources.configs_dir().as_posix(), version_base="1.3"):
            loss = hydra.utils.instantiate(hydra.compose("train", line).loss)
        print(densecal.__file__)
        print(TERMS.create("shrink")(torch.tensor([[[1.0, 3.0], [1.0, 3.0]]]), one_hot_target(torch.tensor([[0, -100]]), 2)).item(), loss.weights)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    where, values = result.stdout.splitlines()
    assert where == str(tmp_path / "densecal" / "__init__.py")
    assert values == "1.0 {'ce': 1.0, 'shrink': 0.5}"
