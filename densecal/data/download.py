"""Fetch a task of the Medical Segmentation Decathlon, where there is internet."""

from __future__ import annotations

from pathlib import Path

from densecal.data.card import DataCard
from densecal.data.prepare import build_once
from densecal.registry import near_matches

__all__ = ["download"]


def download(card: DataCard, root: Path) -> None:
    """Download ``card.decathlon_task`` with MONAI's downloader and put it at ``root``.

    Raises:
        ValueError: If the card names no task, or one that MONAI does not know.
        ConnectionError: If the download fails, with what to do instead.
    """
    from monai.apps import DecathlonDataset, download_and_extract

    task = card.decathlon_task
    if task is None:
        raise ValueError(f"The data set {card.name} cannot be downloaded by densecal. {card.how_to_get}".rstrip())
    if task not in DecathlonDataset.resource:
        raise ValueError(f"No Decathlon task {task!r}. {near_matches(task, DecathlonDataset.resource)}")
    url, md5 = DecathlonDataset.resource[task], DecathlonDataset.md5[task]

    def build(folder: Path) -> Path:
        try:
            download_and_extract(url, filepath=folder / f"{task}.tar", output_dir=folder, hash_val=md5, hash_type="md5")
        except Exception as error:  # MONAI raises bare Exceptions when a server cannot be reached
            raise ConnectionError(
                f"Could not download {task} from {url} ({type(error).__name__}: {error}). "
                f"Without internet, copy the folder from another machine and give it as data.root=DIR. {card.how_to_get}".rstrip()
            ) from error
        return folder / task

    build_once(root, build)
