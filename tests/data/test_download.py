from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
from monai.apps import DecathlonDataset

from densecal.data.card import load_card, override_card, resolve_root
from densecal.data.download import download


def test_download_unpacks_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpack(url: str, filepath: Path, output_dir: Path, hash_val: str, hash_type: str) -> None:
        assert url == DecathlonDataset.resource["Task04_Hippocampus"]
        assert (hash_val, hash_type) == (DecathlonDataset.md5["Task04_Hippocampus"], "md5")
        filepath.touch()
        (output_dir / "Task04_Hippocampus").mkdir()
        (output_dir / "Task04_Hippocampus" / "dataset.json").write_text("{}")

    monkeypatch.setattr("monai.apps.download_and_extract", unpack)
    card = override_card(load_card("hippocampus"), {"download": True, "root": str(tmp_path / "data" / "here")})
    assert resolve_root(card) == tmp_path / "data" / "here"
    assert (tmp_path / "data" / "here" / "dataset.json").read_text() == "{}"
    assert [path.name for path in (tmp_path / "data").iterdir() if path.is_dir()] == ["here"]


@pytest.mark.parametrize(
    "error", [URLError("Name or service not known"), Exception("Error processing URL"), RuntimeError("md5 check failed")], ids=repr
)
def test_download_without_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("monai.apps.download_and_extract", offline)
    with pytest.raises(ConnectionError, match=r"Could not download Task04_Hippocampus from https://.*data\.root=DIR") as raised:
        download(load_card("hippocampus"), tmp_path / "set")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "set").exists()


def test_download_refuses_sets_that_are_no_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mni152 cannot be downloaded"):
        download(load_card("mni152"), tmp_path / "set")
    with pytest.raises(ValueError, match="No Decathlon task 'Task4'"):
        download(override_card(load_card("hippocampus"), {"decathlon_task": "Task4"}), tmp_path / "set")
