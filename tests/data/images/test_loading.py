"""Images through :class:`densecal.data.SegmentationData`, as tests/data/test_module.py does with volumes."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from painted import COLORS, painted_set, tiles

from densecal.data import SegmentationData, override_card
from densecal.data.dataset import CaseDataset
from densecal.data.images.files import read_label

Batch = dict[str, Any]


def epoch(data: SegmentationData, number: int) -> list[Batch]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return list(loader)


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        x["case_id"] == y["case_id"] and all(x[k].equal(y[k]) for k in ("image", "label", "case_index")) for x, y in zip(a, b, strict=True)
    )


def test_batches_are_patches_and_whole_images(tmp_path: Path) -> None:
    data = SegmentationData(painted_set(tmp_path), progress=False)
    batch = epoch(data, 0)[0]
    assert (batch["image"].shape, batch["image"].dtype) == ((2, 3, 32, 48), torch.float32)
    assert (batch["label"].shape, batch["label"].dtype) == ((2, 1, 32, 48), torch.int64)
    assert batch["image"].is_contiguous()
    assert set(batch) == {"image", "label", "case_index", "case_id"}
    for whole in data.val_dataloader():
        n = int(whole["case_id"][0][1:])
        assert whole["label"][0, 0].numpy().tolist() == tiles((40 + n, 60 - n), seed=n).tolist()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        expected = (torch.from_numpy(COLORS[tiles((40 + n, 60 - n), seed=n)]) / 255 - mean) / std
        torch.testing.assert_close(whole["image"][0], expected.movedim(-1, 0))


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers_cache_or_history(tmp_path: Path, workers: int) -> None:
    card = painted_set(tmp_path, 10, samples_per_case=2)
    alone = SegmentationData(card, seed=7, progress=False)
    first = [epoch(alone, n) for n in range(4)]
    other = SegmentationData(override_card(card, {"num_workers": workers, "cache": workers == 1}), seed=7, check=False, progress=False)
    assert same(epoch(other, 3), first[3])
    assert same(epoch(other, 1), first[1])
    assert not same(first[0], first[1])
    assert not same(epoch(SegmentationData(card, seed=8, check=False, progress=False), 3), first[3])


def test_loading_leaves_the_global_generators_alone(tmp_path: Path) -> None:
    import random

    data = SegmentationData(painted_set(tmp_path), progress=False)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    epoch(data, 0)
    list(data.test_dataloader())
    assert torch.get_rng_state().equal(before[0])
    assert (str(np.random.get_state()), random.getstate()) == before[1:]


@pytest.mark.slow
def test_workers_beside_other_processes_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not forked: pipeline and cache travel to them."""
    card = painted_set(tmp_path, 6)
    alone, data = (SegmentationData(override_card(card, {"num_workers": workers}), progress=False) for workers in (0, 2))
    for each in (alone, data):
        monkeypatch.setattr(each, "_place", lambda: (1, 2))
    loader = data.train_dataloader()
    assert loader.multiprocessing_context.get_start_method() == "forkserver"  # type: ignore[union-attr]
    assert same(list(islice(loader, 2)), list(islice(alone.train_dataloader(), 2)))


class CountsThreads(CaseDataset):
    def __getitem__(self, key: Any) -> Any:
        resized = cv2.resize(np.zeros((600, 600, 3), np.uint8), (900, 900))  # would wait for ever for threads that were not forked
        return super().__getitem__(key) | {"threads": cv2.getNumThreads(), "resized": resized.shape[0]}


def test_workers_use_one_thread_of_opencv_and_the_main_process_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cv2.getNumThreads()
    cv2.setNumThreads(4)
    try:
        cv2.resize(np.zeros((600, 600, 3), np.uint8), (900, 900))  # starts them
        monkeypatch.setattr("densecal.data.module.CaseDataset", CountsThreads)
        data = SegmentationData(painted_set(tmp_path, num_workers=1), progress=False)
        assert {int(n) for batch in epoch(data, 0) for n in batch["threads"]} == {1}
        assert cv2.getNumThreads() == 4
    finally:
        cv2.setNumThreads(before)


def test_what_albumentations_refuses_shows_before_files_are_read(tmp_path: Path) -> None:
    card = painted_set(tmp_path, pipeline={"RandomCrop": {"hight": 5}})
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"data\.pipeline\.RandomCrop\.hight: not an argument of RandomCrop\. Did you mean 'height'"):
        SegmentationData(card, progress=False)


def test_a_pipeline_of_another_size_names_the_image_and_the_setting(tmp_path: Path) -> None:
    data = SegmentationData(painted_set(tmp_path, pipeline={"HorizontalFlip": {}}), progress=False)
    with pytest.raises(
        RuntimeError, match=r"images/p0\d\.png: cannot be transformed .*data\.pipeline gives .* instead of data\.patch_size \(32, 48\)"
    ):
        epoch(data, 0)


def test_labels_of_pictures_stay_bytes_from_file_to_memory(tmp_path: Path) -> None:
    """Every wider type is time and memory."""
    card = painted_set(tmp_path)
    data = SegmentationData(card, progress=False)
    case = data.splits["train"][0]
    assert case.label is not None
    assert read_label(case.label).values.dtype == np.uint8
    assert data.dataset("train").loading.load(case)["label"].dtype == torch.uint8


def test_a_loss_in_millimetres_says_that_images_have_no_spacing(tmp_path: Path) -> None:
    from densecal.inference import SlidingWindow
    from densecal.losses import SVLSLoss
    from densecal.tasks import SegmentationTask

    data = SegmentationData(painted_set(tmp_path), progress=False)
    batch = epoch(data, 0)[0]
    model = torch.nn.Conv2d(3, 5, 1)
    loss = SVLSLoss(unit="mm", ignore_index=255)
    task = SegmentationTask(model, loss, data.schema, SlidingWindow([32, 48]), optimizer=torch.optim.SGD)
    with pytest.raises(ValueError, match="Expected the side input 'spacing', which SVLSTarget needs"):
        task.losses(task(batch["image"]), batch)


def test_a_resumed_run_goes_on_with_the_epochs_own_patches(tmp_path: Path) -> None:
    card = painted_set(tmp_path)
    whole = [epoch(SegmentationData(card, seed=3, check=False, progress=False), n) for n in range(3)]
    resumed = SegmentationData(card, seed=3, check=False, progress=False)
    resumed.load_state_dict({"first_epoch": 2})
    assert same(list(resumed.train_dataloader()), whole[2])
    assert not same(whole[2], whole[0])
