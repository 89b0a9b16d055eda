from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from densecal.data import DataCard, DataProblems, SegmentationData, load_card, override_card
from densecal.data.dataset import CaseDataset, EpochSampler, ShardSampler

Batch = dict[str, Any]


def epoch(data: SegmentationData, number: int) -> list[Batch]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return list(loader)


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        x["case_id"] == y["case_id"] and all(x[k].equal(y[k]) for k in ("image", "label", "case_index", "spacing")) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_batches_are_plain_tensors(make_set: Callable[..., DataCard], soft: bool) -> None:
    data = SegmentationData(make_set(soft=soft, folder="here", shape=(9, 9, 9)), progress=False)
    for batch, size in ((epoch(data, 0)[0], 2), (next(iter(data.val_dataloader())), 1), (next(iter(data.test_dataloader())), 1)):
        spatial = (8, 16, 8) if size == 2 else batch["image"].shape[2:]
        assert batch["image"].shape == (size, 1, *spatial)
        assert batch["label"].shape == (size, 3 if soft else 1, *spatial)
        assert (batch["image"].dtype, batch["label"].dtype) == (torch.float32, torch.float32 if soft else torch.int64)
        assert (batch["case_index"].dtype, batch["spacing"].shape) == (torch.int64, (size, 3))
        assert all(type(value) is torch.Tensor for value in batch.values() if not isinstance(value, list))
        assert batch["spacing"][0].tolist() == [1, 1, 2]
    assert data.schema.names == ("background", "left", "right")


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_a_task_is_given_regions_made_of_what_the_loaders_give(make_set: Callable[..., DataCard], soft: bool) -> None:
    data = SegmentationData(make_set(soft=soft, regions={"both": [1, 2], "right": ["right"]}, ignore_index=7), progress=False)
    loaded = epoch(data, 0)[0]
    seen = data.on_after_batch_transfer(loaded, 0)
    assert loaded["label"].shape[1] == (3 if soft else 1)
    assert {key: value for key, value in seen.items() if key != "label"}.keys() == loaded.keys() - {"label"}
    label = loaded["label"]
    padding = (label.sum(1) == 0) if soft else (label[:, 0] == 7)
    assert 0 < padding.sum() < padding.numel()  # patches reach beyond these small volumes
    for region, classes in enumerate(([1, 2], [2])):
        found = seen["label"][:, region]
        assert (found[padding] == 7).all()
        expected = label[:, classes].sum(1) if soft else sum(label[:, 0] == c for c in classes)
        torch.testing.assert_close(found[~padding].float(), expected[~padding].float())


def test_patches_are_centred_on_a_region(make_set: Callable[..., DataCard]) -> None:
    """The structure is what is in a region, not what is in any class but the background."""
    card = make_set(8, regions={"right": [2]}, foreground_fraction=1.0, patch_size=[3, 3, 3], augment=False)
    for batch in epoch(SegmentationData(card, check=False, progress=False), 0):
        assert (batch["label"][:, 0].flatten(1) == 2).any(1).all()


def test_case_index_is_the_place_in_the_split(make_set: Callable[..., DataCard]) -> None:
    data = SegmentationData(make_set(12), progress=False)
    for batch in epoch(data, 2):
        assert [data.splits["train"][i].id for i in batch["case_index"]] == batch["case_id"]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers_cache_or_history(make_set: Callable[..., DataCard], workers: int) -> None:
    card = make_set(10, samples_per_case=2)
    alone = SegmentationData(card, seed=7, progress=False)
    first = [epoch(alone, n) for n in range(4)]
    other = SegmentationData(override_card(card, {"num_workers": workers, "cache": workers == 1}), seed=7, check=False, progress=False)
    assert same(epoch(other, 3), first[3])
    assert same(epoch(other, 1), first[1])
    assert not same(first[0], first[1])
    assert not same(epoch(SegmentationData(card, seed=8, check=False, progress=False), 3), first[3])


def test_persistent_workers_follow_the_epoch(make_set: Callable[..., DataCard]) -> None:
    card = make_set(6)
    loader = SegmentationData(override_card(card, {"num_workers": 2}), progress=False).train_dataloader()
    for number in (0, 1):
        loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
        assert same(list(loader), epoch(SegmentationData(card, check=False, progress=False), number))


def test_loading_leaves_the_global_generator_alone(make_set: Callable[..., DataCard]) -> None:
    data = SegmentationData(make_set(6), progress=False)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epoch(data, 0)
    list(data.test_dataloader())
    assert torch.get_rng_state().equal(before)


@pytest.mark.slow
def test_workers_beside_other_processes_give_the_same(make_set: Callable[..., DataCard], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not forked, and take a cache of more tensors than a process may hand over one by one."""
    card = make_set(6)
    alone = SegmentationData(card, progress=False)
    data = SegmentationData(override_card(card, {"num_workers": 2}), progress=False)
    monkeypatch.setattr(data, "_place", lambda: (1, 2))
    monkeypatch.setattr(alone, "_place", lambda: (1, 2))
    for each in (alone, data):
        dataset = each.dataset("train")
        dataset.cases = dataset.cases * 100
        dataset._cached = [{name: value.clone() for name, value in item.items()} for item in dataset._cached or () for _ in range(100)]
    loader = data.train_dataloader()
    assert loader.multiprocessing_context.get_start_method() == "forkserver"  # type: ignore[union-attr]
    assert same(list(islice(loader, 5)), list(islice(alone.train_dataloader(), 5)))


@pytest.mark.parametrize(("cases", "world_size"), [(7, 2), (8, 2), (7, 3), (2, 5)])
def test_evaluation_shards_hold_each_case_once(cases: int, world_size: int) -> None:
    shards = [list(ShardSampler(cases, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert sorted(index for shard in shards for index in shard) == list(range(cases))
    assert [len(ShardSampler(cases, rank=rank, world_size=world_size)) for rank in range(world_size)] == [len(shard) for shard in shards]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize(("cases", "world_size"), [(7, 2), (8, 4), (2, 5)])
def test_training_shards_are_equally_long_parts_of_one_order(cases: int, world_size: int) -> None:
    ids = [f"c{n}" for n in range(cases)]
    whole = list(EpochSampler(ids, samples_per_case=2, seed=3))
    samplers = [EpochSampler(ids, samples_per_case=2, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    shards = [list(sampler) for sampler in samplers]
    assert {len(shard) for shard in shards} == {len(samplers[0])}
    merged = [draw for step in zip(*shards, strict=True) for draw in step]
    assert merged == (whole * 2)[: len(merged)]
    assert len(set(whole)) == 2 * cases


def test_problems_stop_before_anything_is_loaded(make_set: Callable[..., DataCard]) -> None:
    card = make_set(8)
    labels = sorted(Path(card.root or "").glob("labelsTr/*"))
    labels[1].write_bytes(labels[1].read_bytes()[:50])
    labels[5].unlink()
    with pytest.raises(DataProblems) as error:
        SegmentationData(card, progress=False)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [str(labels[1]), str(labels[5])]
    assert [problem.case_id for problem in error.value.problems] == ["s002", "s006"]


def test_no_cases_is_a_problem_even_unchecked(tmp_path: Path) -> None:
    with pytest.raises(DataProblems, match="found no cases in the layout 'paired'"):
        SegmentationData(DataCard(name="x", classes=["a", "b"], root=str(tmp_path)), check=False)


def test_a_file_that_breaks_later_is_named(make_set: Callable[..., DataCard]) -> None:
    card = make_set(8, num_workers=1, cache=False)
    data = SegmentationData(card, progress=False)
    for case in data.splits["train"]:
        case.image[0].write_bytes(b"gone")
    with pytest.raises(RuntimeError, match=r"imagesTr/s\d+\.nii\.gz and .*labelsTr.*cannot be loaded"):
        epoch(data, 0)


def test_test_root_replaces_the_test_split(make_set: Callable[..., DataCard]) -> None:
    other = make_set(3, folder="other")
    card = make_set(8)
    plain = SegmentationData(card, progress=False)
    data = SegmentationData(override_card(card, {"test_root": other.root}), progress=False)
    assert [case.id for case in data.splits["test"]] == ["s001", "s002", "s003"]
    assert all(str(case.image[0]).startswith(str(other.root)) for case in data.splits["test"])
    assert (data.splits["train"], data.splits["val"]) == (plain.splits["train"], plain.splits["val"])
    assert len(list(data.test_dataloader())) == 3
    with pytest.raises(ValueError, match="another data set than"):
        SegmentationData(override_card(card, {"test_root": card.root}), progress=False)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SegmentationData(override_card(card, {"test_root": "nowhere"}), progress=False)


def test_dataset_refuses_training_without_a_seed(make_set: Callable[..., DataCard]) -> None:
    data = SegmentationData(make_set(8), progress=False)
    with pytest.raises(TypeError, match=r"\(index, seed\)"):
        data.dataset("train")[0]
    with pytest.raises(ValueError, match="'training'"):
        data.dataset("training")
    assert isinstance(data.dataset("val"), CaseDataset)


class Recorder(L.LightningModule):
    """Writes down what it is fed; its weight depends on all of it."""

    def __init__(self, asks_for_length: bool) -> None:
        super().__init__()
        self.asks_for_length = asks_for_length
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[str], float]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch["case_id"], float(batch["image"].double().sum())))
        return (self.weight - batch["image"].mean()).square().sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.asks_for_length:  # as schedules do; Lightning then makes the loader before it knows where it goes on
            assert self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("asks_for_length", [False, True], ids=["", "length-asked"])
@pytest.mark.parametrize("at_train_end", [True, False], ids=["saved-at-epoch-end", "saved-after-validation"])
def test_lightning_resumes_with_the_epochs_own_batches(
    make_set: Callable[..., DataCard], tmp_path: Path, at_train_end: bool, asks_for_length: bool
) -> None:
    card = make_set(10, num_workers=1)

    def fit(epochs: int, resume: Path | None = None) -> tuple[Recorder, Path]:
        model = Recorder(asks_for_length)
        saver = ModelCheckpoint(tmp_path / str(epochs), filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=at_train_end)
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            callbacks=[saver],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=1,
        )
        trainer.fit(model, datamodule=SegmentationData(card, seed=5, check=False, progress=False), ckpt_path=resume, weights_only=False)
        return model, Path(saver.best_model_path)

    whole, _ = fit(4)
    _, checkpoint = fit(2)
    resumed, _ = fit(4, resume=checkpoint)
    assert resumed.seen == [step for step in whole.seen if step[0] >= 2]
    assert resumed.weight.equal(whole.weight)
    reference = SegmentationData(override_card(card, {"num_workers": 0}), seed=5, check=False, progress=False)
    assert [step[1] for step in whole.seen if step[0] == 3] == [batch["case_id"] for batch in epoch(reference, 3)]


def test_hippocampus_loads(hippocampus: Path) -> None:
    card = override_card(load_card("hippocampus"), {"root": str(hippocampus), "num_workers": 0})
    data = SegmentationData(card, check=False, progress=False)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 1, 48, 64, 48)
    assert batch["label"].unique().tolist() == [-100, 0, 1, 2]
    people = {name: {case.subject for case in side} for name, side in data.splits.items()}
    assert not people["train"] & people["test"]
    assert not people["train"] & people["val"]
