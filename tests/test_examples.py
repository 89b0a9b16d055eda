"""Every example runs: on the data it makes, with small settings, and on real data where there are any and slow tests are asked for."""

from __future__ import annotations

import ast
import re
import runpy
import sys

import pytest
from conftest import ROOT, real_set

EXAMPLES = {
    "plain_pytorch": ["--epochs", "1", "--limit", "4", "--batch-size", "4", "--size", "32", "64", "--amp"],
    "lightning_hippocampus": ["--epochs", "1", "--limit", "4"],
    "smp_camvid": ["--epochs", "1", "--limit", "2", "--batch-size", "2", "--size", "32", "64"],
    "huggingface_segformer": ["--epochs", "1", "--limit", "4", "--batch-size", "2", "--accumulate", "2", "--size", "32", "64"],
    "monai_spleen": ["--epochs", "1", "--roi", "16"],
    "nnunet_hippocampus": ["--epochs", "1", "--iterations", "2", "--limit", "6"],
}
"""Small settings of each."""
REAL = {
    "plain_pytorch": "CamVid",
    "lightning_hippocampus": "Task04_Hippocampus",
    "smp_camvid": "CamVid",
    "huggingface_segformer": "CamVid",
    "monai_spleen": "Task09_Spleen",
    "nnunet_hippocampus": "Task04_Hippocampus",
}
NEEDS = {
    "plain_pytorch": ["torchvision"],
    "lightning_hippocampus": ["lightning", "monai"],
    "smp_camvid": ["albumentations", "segmentation_models_pytorch"],
    "huggingface_segformer": ["transformers", "accelerate"],
    "monai_spleen": ["monai"],
    "nnunet_hippocampus": ["nnunetv2", "hydra"],
}
SLOW = ("nnunet_hippocampus",)
"""Minutes, even with small settings."""
BUNDLE = "configs/monai_bundle/configs/train.yml"
"""tests/integrations/test_monai_bundle.py runs it."""


def run(name, arguments, monkeypatch, tmp_path, capsys):
    """Run an example as a script, from an empty folder, and return what it printed last."""
    for module in NEEDS[name]:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # lightning.seed_everything leaves it behind
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out.splitlines()[-1]


def scores(line):
    found = re.fullmatch(r"validation: ECE (\d\.\d{3}), (?:IoU|Dice) (\d\.\d{3})", line)
    assert found, line
    return [float(value) for value in found.groups()]


def test_every_example_is_run():
    """The data of the examples are no example."""
    names = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"example_data"}
    assert names == set(EXAMPLES) == set(REAL) == set(NEEDS)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in EXAMPLES])
def test_example_runs_on_made_data(name, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("DENSECAL_DATA", raising=False)
    ece, quality = scores(run(name, EXAMPLES[name], monkeypatch, tmp_path, capsys))
    assert 0 < ece < 1
    assert 0 <= quality <= 1


@pytest.mark.slow
def test_nnunet_example_runs_on_real_data(monkeypatch, tmp_path, capsys):
    """Plan, preprocess, train, predict with probabilities and audit ten volumes. That it learns would take an hour on two cores: 160 steps are too few."""
    monkeypatch.setenv("DENSECAL_DATA", str(real_set(REAL["nnunet_hippocampus"]).parent))
    settings = ["--epochs", "2", "--iterations", "2", "--limit", "10"]
    ece, quality = scores(run("nnunet_hippocampus", settings, monkeypatch, tmp_path, capsys))
    assert 0 < ece < 1
    assert 0 <= quality <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in SLOW])
def test_example_learns_on_real_data(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DENSECAL_DATA", str(real_set(REAL[name]).parent))
    ece, quality = scores(run(name, ["--epochs", "8"], monkeypatch, tmp_path, capsys))
    assert 0 < ece < 0.3
    assert quality > 0.1


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_says_how_it_is_run(name):
    text = ast.get_docstring(ast.parse((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")))
    assert f"python examples/{name}.py" in text
    assert "$DENSECAL_DATA" in text


def test_the_two_lines_of_the_spleen_example_are_its_lines():
    """What its docstring puts in stands in the code, what it takes out does not, and both are MONAI's and ours as they are."""
    tree = (ROOT / "examples" / "monai_spleen.py").read_text(encoding="utf-8")
    text, code = ast.get_docstring(ast.parse(tree)), tree.split('"""', 2)[2]
    added, removed = (re.findall(rf"^ *{re.escape(sign)}(\S.*|    .*)$", text, flags=re.MULTILINE) for sign in "+-")
    assert len(added) == len(removed) == 2
    assert all(f"\n{line}\n" in code for line in added)
    assert not any(line in code for line in removed)
    for import_line, made_line in (added, removed):
        names: dict[str, object] = {}
        exec(f"{import_line}\n{made_line.strip()}", names)
        assert "loss_function" in names


def test_integration_table_links_to_files_that_are_run():
    (table,) = re.findall(r"^\| library \|.*\n\|[-|]+\n((?:\|.*\n)+)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    run_here = {f"examples/{name}.py" for name in EXAMPLES} | {BUNDLE}
    linked = [re.findall(r"\]\((.*?)\)", row.rsplit("|", 2)[1]) for row in table.splitlines()]
    assert all(linked), table
    assert {file for row in linked for file in row} == run_here
    assert all((ROOT / file).is_file() for file in run_here)
