"""``densecal-compare``: runs become methods, and methods a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from blob_run import make_blob_run

from densecal.cli import compare


def make_run(
    folder: Path, *, choices: dict[str, str], seed: int, dice: float, ece: float, started: str = "", data: str = "set", **settings: Any
) -> Path:
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"seed": seed, "output_dir": str(folder), "data": {"name": data, "root": "/x"}, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"started": started or f"2026-01-01T00:00:{seed:02}", "choices": choices}))
    summary = {
        "classes": [{"name": "background"}, {"name": "lesion"}],
        "split": "3 test cases",
        "mean": {"dice": dice, "dice/lesion": dice, "nsd": None},
        "fine_grained": {},
        "pooled": {"all": {"ece_top_label": ece, "num_voxels": 7}, "foreground": {"ece_top_label": 2 * ece}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def run_compare(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["densecal-compare", *arguments])
    compare.main()
    return capsys.readouterr().out


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Cross-entropy with and without a perturbation, two seeds each."""
    for seed, dice, ece in ((0, 0.80, 0.10), (1, 0.84, 0.12)):
        make_run(
            tmp_path / f"ce{seed}", choices={"loss": "ce", "perturbation": "null"}, seed=seed, dice=dice, ece=ece, loss={"a": 1}, perturbation=None
        )
    for seed, dice, ece in ((0, 0.81, 0.05), (1, 0.83, 0.09)):
        node = {"eta": 0.002}
        make_run(
            tmp_path / f"aslp{seed}",
            choices={"loss": "ce", "perturbation": "aslp"},
            seed=seed,
            dice=dice,
            ece=ece,
            loss={"a": 1},
            perturbation=node,
            started=f"2026-01-02T00:00:0{seed}",
        )
    return tmp_path


def test_means_spreads_and_paired_differences(study, monkeypatch, capsys):
    page = run_compare(monkeypatch, capsys, f"runs={study}", "measures=[dice,ece]")
    assert "set (background, lesion): 3 test cases" in page
    assert "| method | runs | Dice ↑ | ECE ↓ |" in page
    # The mean of 0.80 and 0.84 is 0.82, their standard deviation 0.04 / sqrt(2) = 0.0283.
    assert "| perturbation=null | 2 | **0.8200 ± 0.0283** | 0.1100 ± 0.0141 |" in page
    assert "| perturbation=aslp | 2 | **0.8200 ± 0.0141** | **0.0700 ± 0.0283** |" in page
    # ECE falls by 0.05 and 0.03: 0.04 on average, give or take 12.706 (Student's t, 1 degree of freedom) times 0.01.
    assert "| minus perturbation=null | pairs | Dice ↑ | ECE ↓ |" in page
    assert "−0.0400 (−0.1671 to +0.0871)" in page


def test_pairs_are_of_one_seed(study, monkeypatch, capsys):
    make_run(
        study / "more",
        choices={"loss": "ce", "perturbation": "aslp"},
        seed=7,
        dice=0.1,
        ece=0.9,
        loss={"a": 1},
        perturbation={"eta": 0.002},
        started="2027",
    )
    page = run_compare(monkeypatch, capsys, f"runs={study}", "measures=[ece]")
    assert "| perturbation=aslp | 3 |" in page
    assert "| perturbation=aslp | 2 | −0.0400" in page


def test_settings_that_differ_within_a_choice_are_named(study, monkeypatch, capsys):
    make_run(
        study / "eta",
        choices={"loss": "ce", "perturbation": "aslp"},
        seed=0,
        dice=0.5,
        ece=0.5,
        loss={"a": 1},
        perturbation={"eta": 0.1},
        started="2027",
    )
    page = run_compare(monkeypatch, capsys, f"runs={study}", "measures=[ece]", "baseline='perturbation=null'")
    assert "| perturbation=aslp perturbation.eta=0.1 | 1 |" in page
    assert "| perturbation=aslp perturbation.eta=0.002 | 2 |" in page
    assert "| perturbation=null | 2 |" in page


def test_data_sets_have_tables_of_their_own_and_unfinished_runs_are_told(study, monkeypatch, capsys, tmp_path):
    make_run(study / "other", choices={"loss": "ce"}, seed=0, dice=0.5, ece=0.5, data="another")
    (make_run(study / "cut", choices={"loss": "ce"}, seed=0, dice=0.5, ece=0.5) / "summary.json").unlink()
    page = run_compare(monkeypatch, capsys, f"runs={study}", f"output={tmp_path / 'out'}")
    assert page.count("Mean and standard deviation over runs") == 2
    assert f"Not finished, and left out: {study / 'cut'}." in page
    assert (tmp_path / "out" / "comparison.md").read_text() == page
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert len(rows) == 5
    assert rows[0]["scores"]["ece_foreground"] in (0.2, 1.0)


def test_a_run_of_densecal_can_be_read(tmp_path, monkeypatch, capsys):
    run = make_blob_run(tmp_path)
    page = run_compare(monkeypatch, capsys, f"runs=[{run}]")
    assert "blobs (background, left, right)" in page
    summary = json.loads((run / "summary.json").read_text())
    assert f"| {summary['pooled']['all']['ece_top_label']:.4f} |" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs={root}", "baseline=ce"], "baseline: no method 'ce'.*Valid: perturbation=aslp, perturbation=null"),
        (["runs={root}", "measures=[ecee]"], "measures: .* has no 'ecee'. Did you mean 'ece'"),
        (["runs={root}/none"], "No run in .*none"),
        (["runs={root}/ce0", "measure=[ece]"], "Unknown setting 'measure'"),
    ],
    ids=["baseline", "measure", "place", "setting"],
)
def test_errors_are_one_line(study, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["densecal-compare", *(argument.format(root=study) for argument in arguments)])
    with pytest.raises(SystemExit, match=message) as error:
        compare.main()
    assert str(error.value).count("\n") == 0


def test_a_damaged_summary_is_named(study, monkeypatch):
    (study / "ce0" / "summary.json").write_text("{")
    monkeypatch.setattr(sys, "argv", ["densecal-compare", f"runs={study}"])
    with pytest.raises(SystemExit, match=r"ce0/summary\.json: cannot be read"):
        compare.main()
