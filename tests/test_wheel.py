"""What a user installs: the wheel holds the configs and the cards and nothing of the checkout, and its commands run anywhere."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from volumes import blob, save

import densecal

pytest.importorskip("hatchling")
pytest.importorskip("pip")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command without the checkout on its path."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "DENSECAL_DATA")}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def content(wheel) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The ``bin`` folder of an environment with the wheel in it, and this environment's other packages beside it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "env", symlinks=True, with_pip=False)
    scripts = folder / "env" / "bin"
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    installed = run(
        sys.executable,
        *("-m", "pip", "--python", scripts / "python", "install", "--no-deps", "--no-index", "--no-cache-dir", "--disable-pip-version-check", wheel),
        cwd=folder,
    )
    assert installed.returncode == 0, installed.stdout + installed.stderr
    # Plain lines are put on the path, but the .pth files there, the editable checkout's among them, are not read.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return scripts


@pytest.fixture(scope="module")
def blobs(tmp_path_factory) -> Path:
    """Six volumes and a card for them."""
    root = tmp_path_factory.mktemp("blobs")
    for n in range(6):
        image, label = blob((9, 10, 8), seed=n)
        save(root / "images" / f"b{n}.nii.gz", image)
        save(root / "labels" / f"b{n}.nii.gz", label)
    (root / "blobs.yaml").write_text(yaml.safe_dump({"classes": ["background", "left", "right"], "patch_size": [8, 8, 8]}))
    return root


def test_wheel_holds_the_configs_and_the_cards(content):
    for folder in ("configs", "datasets"):
        source = {f"densecal/{path.relative_to(ROOT)}": path.read_bytes() for path in (ROOT / folder).rglob("*.*") if path.suffix != ".pyc"}
        assert len(source) >= 2
        assert {name: content.get(name) for name in source} == source


def test_wheel_holds_every_module_and_template(content):
    source = {str(path.relative_to(ROOT)) for path in (ROOT / "densecal").rglob("*") if path.suffix in (".py", ".j2", ".css", ".js")}
    assert source <= set(content)


def test_wheel_holds_nothing_else(content):
    """No tests, no folders of the checkout, nothing compiled or hidden."""
    info = f"densecal-{densecal.__version__}.dist-info"
    assert {name.partition("/")[0] for name in content} == {"densecal", info}
    parts = {part for name in content for part in name.split("/")}
    assert not {part for part in parts if part.startswith(".") or part in ("tests", "__pycache__", "tools", "runs")}
    assert {Path(name).suffix for name in content if name.startswith("densecal/")} <= {
        ".py",
        ".j2",
        ".css",
        ".js",
        ".yaml",
        ".yml",
        ".md",
        ".typed",
        ".json",
    }


def test_wheel_names_no_folder_of_this_machine(content):
    for name, data in content.items():
        text = data.decode()
        for folder in (str(ROOT), str(ROOT.parent), str(Path.home()), sys.prefix):
            if len(Path(folder).parts) > 2:
                assert folder not in text, name
        assert not re.search(r"(?:^|[\s\"'=(])/(?:home|root|Users|work|mnt)/\w", text), name


def test_wheel_says_what_it_needs(content):
    metadata = Parser().parsestr(content[f"densecal-{densecal.__version__}.dist-info/METADATA"].decode())
    needed = {re.split(r"[>=<; ]", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert needed == {"numpy", "torch", "torchmetrics"}
    assert "train" in metadata.get_all("Provides-Extra")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("licenses/LICENSE") for name in content)


def test_installed_package_is_the_wheels(environment, tmp_path):
    code = "import densecal, densecal.resources as r; print(densecal.__file__, r.configs_dir(), r.cards_dir(), sep='\\n')"
    result = run(environment / "python", "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    package, configs, cards = map(Path, result.stdout.splitlines())
    assert package.parent.resolve().is_relative_to(environment.parent.resolve())
    assert not package.is_relative_to(ROOT)
    assert (configs, cards) == (package.parent / "configs", package.parent / "datasets")


def test_installed_check_reads_a_set(environment, blobs, tmp_path):
    """A card by its path, and the wheel's own by their names, from a folder that has nothing to do with densecal."""
    result = run(environment / "densecal-check", blobs / "blobs.yaml", "--root", blobs, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "cases    6" in result.stdout
    assert "no problems" in result.stdout
    listed = run(environment / "densecal-check", "--list", cwd=tmp_path)
    assert {path.stem for path in (ROOT / "datasets").glob("*.yaml")} <= set(re.split(r"[\s:]+", listed.stdout))
    assert not list(tmp_path.iterdir())


def test_installed_check_reports_problems(environment, blobs, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(blobs, copy)
    (copy / "images" / "b3.nii.gz").write_bytes(b"no image")
    result = run(environment / "densecal-check", copy / "blobs.yaml", "--root", copy, cwd=tmp_path)
    assert result.returncode == 1
    assert "b3.nii.gz" in result.stdout
    missing = run(environment / "densecal-check", "hippocampus", cwd=tmp_path)
    assert missing.returncode == 2
    assert "DENSECAL_DATA" in missing.stderr


@pytest.mark.parametrize(("command", "setting"), [("densecal-train", "monitor_mode: auto"), ("densecal-predict", "checkpoint: best")])
def test_installed_command_finds_its_configs(command, setting, environment, tmp_path):
    shown = run(environment / command, "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert setting in shown.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_installed_train_and_predict_run(environment, blobs, tmp_path):
    settings = ["model.channels=[4,8]", "trainer.max_epochs=1", "trainer.accelerator=cpu", "data.num_workers=0", "data.batch_size=1"]
    trained = run(environment / "densecal-train", f"data={blobs / 'blobs.yaml'}", f"data.root={blobs}", *settings, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    (report,) = (tmp_path / "runs").glob("blobs_dice_ce/*/report.html")
    image = blobs / "images" / "b0.nii.gz"
    predicted = run(environment / "densecal-predict", f"run={report.parent}", f"input={image}", "output=out", "device=cpu", cwd=tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"b0_label.nii.gz", "b0_probs.nii.gz", "b0_confidence.nii.gz"}
