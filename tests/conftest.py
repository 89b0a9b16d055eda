"""Options, markers and the folders that tests may read."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("default"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def shared_folder(variable: str, name: str) -> Path | None:
    """The folder that an environment variable names, else one beside the checkout, else None."""
    folder = Path(os.environ.get(variable) or ROOT.parent / "shared" / name)
    return folder if folder.is_dir() else None


def real_set(name: str) -> Path:
    folder = shared_folder("DENSECAL_DATA", "data")
    if folder is None or not (folder / name).is_dir():
        pytest.skip(f"no {name} under $DENSECAL_DATA")
    return folder / name


@pytest.fixture(scope="session")
def hippocampus() -> Path:
    """Root of the real hippocampus volumes; the test skips where they are absent."""
    return real_set("Task04_Hippocampus")


@pytest.fixture(scope="session")
def camvid() -> Path:
    """Root of the real street scenes; the test skips where they are absent."""
    return real_set("CamVid")
