"""What a user installs: the wheel holds the configs and the cards and nothing of the checkout, and its commands run anywhere."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
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


def install(wheel: Path, scripts: Path) -> None:
    options = ("--no-deps", "--no-index", "--no-cache-dir", "--disable-pip-version-check")
    installed = run(sys.executable, "-m", "pip", "--python", scripts / "python", "install", *options, wheel, cwd=scripts)
    assert installed.returncode == 0, installed.stdout + installed.stderr


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The ``bin`` folder of an environment with the wheel in it, and this environment's other packages beside it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "env", symlinks=True, with_pip=False)
    scripts = folder / "env" / "bin"
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    install(wheel, scripts)
    # Plain lines are put on the path, but the .pth files there, the editable checkout's among them, are not read.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return scripts


def needed_by(*names: str) -> set[str]:
    """Distributions of this environment that those need without extras, those among them."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found.add(name)
            requirements = map(Requirement, importlib.metadata.requires(name) or [])
            waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def core(wheel, content, tmp_path_factory) -> Path:
    """The ``bin`` folder of an environment with what ``pip install densecal`` brings, and nothing else."""
    folder = tmp_path_factory.mktemp("core")
    venv.create(folder / "env", symlinks=True, with_pip=False)
    scripts = folder / "env" / "bin"
    (packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    metadata = Parser().parsestr(content[f"densecal-{densecal.__version__}.dist-info/METADATA"].decode())
    for name in needed_by(*(Requirement(line).name for line in metadata.get_all("Requires-Dist") if "extra ==" not in line)):
        distribution = importlib.metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    install(wheel, scripts)
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
    source = {str(path.relative_to(ROOT)) for path in (ROOT / "densecal").rglob("*") if path.suffix in (".py", ".j2", ".css", ".js", ".typed")}
    assert "densecal/py.typed" in source
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


def test_source_archive_makes_the_same_wheel(content, tmp_path):
    """It holds the checkout's own files, all that the tests read but the studies' scores, and no data, run or cache."""
    built = run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = tmp_path.iterdir()
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"densecal-{densecal.__version__}"
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    assert {str(file.parts[0]) for file in files} == {
        *(".ci", ".github", "densecal", "configs", "datasets", "docs", "tests", "tools"),
        *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "PKG-INFO", "README.md", "mkdocs.yml", "pyproject.toml", ".gitignore"),
    }
    assert {file.suffix for file in files if len(file.parts) > 1} <= {
        "",
        ".py",
        ".sh",
        ".j2",
        ".css",
        ".js",
        ".yaml",
        ".yml",
        ".md",
        ".typed",
        ".json",
        ".svg",
    }
    assert not {"__pycache__", "scores"} & {part for file in files for part in file.parts}
    assert path.stat().st_size < 5e6
    again = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "again", cwd=source)
    assert again.returncode == 0, again.stdout + again.stderr
    (wheel,) = (tmp_path / "again").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == content


def test_core_alone_trains_and_measures(core, tmp_path):
    """Every loss by its name, its gradient, and a metric, with torch, numpy and torchmetrics and no more."""
    code = """
        import importlib.util
        import torch
        import densecal
        import densecal.metrics, densecal.ops, densecal.perturbation, densecal.targets, densecal.terms

        print([name for name in ("hydra", "lightning", "matplotlib", "monai", "scipy", "segmentation_models_pytorch", "yaml") if importlib.util.find_spec(name)])
        print(densecal.__version__, len(densecal.list_losses()), len(densecal.list_metrics()))
        torch.manual_seed(0)
        logits = torch.randn(2, 3, 6, 6, 6, requires_grad=True)
        labels = torch.randint(0, 3, (2, 6, 6, 6))
        for name in ("svls", "nacl", "dml", "acls", "ml1_ace"):
            (gradient,) = torch.autograd.grad(densecal.create_loss(name)(logits, labels), logits)
            assert gradient.isfinite().all() and gradient.any(), name
        # Two pixels, confidence 0.75, one of them right: |0.75 - 0.5|.
        probs = torch.tensor([[[0.75, 0.75], [0.25, 0.25]]])
        print(densecal.metrics.expected_calibration_error(probs, torch.tensor([[0, 1]])).item())
    """
    result = run(core / "python", "-c", textwrap.dedent(code), cwd=tmp_path, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    absent, numbers, error = result.stdout.splitlines()
    assert absent == "[]"
    assert numbers == f"{densecal.__version__} {len(densecal.list_losses())} {len(densecal.list_metrics())}"
    assert float(error) == 0.25


def test_commands_of_the_core_say_what_to_install(core, tmp_path):
    commands = sorted(path.name for path in core.glob("densecal-*"))
    assert "densecal-train" in commands
    for name in set(commands) - {"densecal-benchmark"}:  # times losses and metrics, which are there
        result = run(core / name, "--help", cwd=tmp_path)
        assert result.returncode == 1
        assert re.fullmatch(rf"{name}: the package '\w+' is not installed. It comes with `pip install 'densecal\[train\]'`.\n", result.stderr)


def test_types_of_the_installed_package_are_seen(environment, tmp_path):
    """By a type checker of somebody else's code."""
    pytest.importorskip("mypy")
    (tmp_path / "code.py").write_text(
        textwrap.dedent("""
            import densecal
            from densecal.losses import SVLSLoss

            reveal_type(densecal.list_losses())
            SVLSLoss(sigma="wide")
        """)
    )
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = silent\n[mypy-torch.*,torchmetrics.*,numpy.*]\nfollow_imports = skip\n")
    checked = run(sys.executable, "-m", "mypy", "--python-executable", environment / "python", "code.py", cwd=tmp_path)
    revealed, error, _ = checked.stdout.splitlines()
    assert "list[str]" in revealed
    assert 'Argument "sigma" to "SVLSLoss" has incompatible type "str"' in error


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
