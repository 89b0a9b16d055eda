"""A data set as Lightning takes it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, default_collate

from densecal.data.card import SPLITS, DataCard, override_card, resolve_root
from densecal.data.dataset import CaseDataset, EpochSampler, ShardSampler
from densecal.data.layouts import Case, Companion, find_cases
from densecal.data.medium import medium_of
from densecal.data.split import split_cases
from densecal.data.validate import CaseFacts, DataProblems, find_problems, survey
from densecal.ops.region_maps import region_maps

__all__ = ["SegmentationData"]


class SegmentationData(L.LightningDataModule):
    """Find, check, split and load the data set of a card.

    Batches are dictionaries of plain tensors: ``image`` float32 ``(N, C, *spatial)``; ``label`` int64 ``(N, 1, *spatial)``, or float32 ``(N, K, *spatial)`` for soft
    labels; ``case_index`` int64 ``(N,)``, the position in ``splits[...]``; ``case_id``, a list of strings; of volumes, ``spacing`` float32 ``(N, 3)``, in mm; the
    companions of the cases under their names, int64 ``(N, R, *spatial)`` or float32 ``(N, K, *spatial)``. Training batches hold patches; the others one whole volume or
    image each, sharded over ranks without repeats. Of a card with regions the loaders give the same, which is smaller, and what a task sees has one map per region,
    made on its device, see :func:`densecal.ops.region_maps`: a companion's label maps are then ``(N, R, K, *spatial)``.

    All randomness follows from (seed, epoch, case id, draw), whatever the number of workers; see :mod:`densecal.data.dataset`.

    Args:
        card: The data set.
        seed: Seed of order, patches and augmentation. The split has its own, ``card.split_seed``.
        check: Read every file first. Under DDP the first process does so for all.
        progress: Show progress bars while checking and loading.
        training_companions: Further maps of a training case, which its patches then hold.

    Attributes:
        card: The card.
        schema: Names, numbers and colours of the classes, or of the regions.
        root: Folder of the set.
        splits: ``train``, ``val`` and ``test``, each a list of cases sorted by id. With ``card.test_root``, ``test`` is all of that set.

    Raises:
        DataProblems: If ``check`` finds any, before anything is written.
        FileNotFoundError: If there is no such folder.
        ValueError: If the cases cannot be split as the card says, or patches cannot be varied as it says.

    Example:
        >>> data = SegmentationData(load_card("hippocampus"), seed=0)  # doctest: +SKIP
        >>> next(iter(data.train_dataloader()))["image"].shape  # doctest: +SKIP
        torch.Size([4, 1, 48, 64, 48])
    """

    def __init__(
        self,
        card: DataCard,
        seed: int = 0,
        check: bool = True,
        progress: bool = True,
        training_companions: Callable[[Case], Sequence[Companion]] | None = None,
    ) -> None:
        super().__init__()
        self.card = card
        self.seed = seed
        first = getattr(rank_zero_only, "rank", None) in (0, None)
        self.progress = progress and first
        self.schema = card.schema
        medium_of(card).loading(card, train=True)  # what an augmentation is refused for shows before the files are read
        # A rank without a case of its own has an empty loader; Lightning takes that for a mistake unless told.
        self.allow_zero_length_dataloader_with_multiple_devices = True

        self._facts: dict[Case, CaseFacts] = {}
        self.root = resolve_root(card)
        cases = self._find(self.root, check and first, training_companions)
        self.splits = split_cases(cases, card)
        if card.test_root is not None:
            test_root = resolve_root(override_card(card, {"root": card.test_root, "download": False, "prepare": None}))
            if test_root.resolve() == self.root.resolve():
                raise ValueError(
                    f"Expected `data.test_root` to be another data set than `data.root`, but both are {self.root}: training cases would be tested on."
                )
            self.splits["test"] = self._find(test_root, check and first)
        self._datasets: dict[str, CaseDataset] = {}
        self._first_epoch = 0

    def _find(self, root: Path, check: bool, training_companions: Callable[[Case], Sequence[Companion]] | None = None) -> list[Case]:
        cases = find_cases(root, self.card)
        if not cases:
            raise DataProblems(find_problems(cases, self.card, root=root))
        if training_companions is not None:
            trained_on = {case.id for case in split_cases(cases, self.card)["train"]}
            cases = [replace(case, companions=(*case.companions, *training_companions(case))) if case.id in trained_on else case for case in cases]
        facts = survey(cases, self.card, self.progress) if check else []
        if problems := [problem for fact in facts for problem in fact.problems]:
            raise DataProblems(problems)
        self._facts |= dict(zip(cases, facts, strict=False))
        return cases

    def facts(self, split: str) -> list[CaseFacts]:
        """What the files of a split hold, as the check saw them; read now if they were not checked."""
        cases = self.splits[split]
        return [self._facts[case] for case in cases] if self._facts else survey(cases, self.card, self.progress)

    def dataset(self, split: str) -> CaseDataset:
        """The split as a torch data set, loaded into memory if the card says so."""
        if split not in self._datasets:
            if split not in SPLITS:
                raise ValueError(f"Expected `split` to be one of {SPLITS}, but got {split!r}.")
            self._datasets[split] = CaseDataset(self.splits[split], self.card, train=split == "train")
            if self.card.cache:
                self._datasets[split].fill_cache(self.progress)
        return self._datasets[split]

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        dataset = self.dataset("train")
        rank, world_size = self._place()
        ids = [case.id for case in dataset.cases]
        sampler = EpochSampler(ids, samples_per_case=self.card.samples_per_case, seed=self.seed, rank=rank, world_size=world_size)
        sampler.set_epoch(max(self._first_epoch, self._finished_epochs()))
        return self._loader(dataset, sampler, self.card.batch_size, self.card.num_workers)

    def state_dict(self) -> dict[str, Any]:
        """The epoch a resumed run begins with.

        Lightning tells samplers the epoch after it has made the first iterator, whose workers have begun to load by then; and where a schedule asks for the length of
        training, it makes the loader even before it restores its own count of epochs. What a data module saves is restored before that.
        """
        return {"first_epoch": self._finished_epochs()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._first_epoch = state_dict["first_epoch"]

    def _finished_epochs(self) -> int:
        return self.trainer.fit_loop.epoch_progress.current.processed if self.trainer is not None else 0  # type: ignore[attr-defined]

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self.whole_cases("val")

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self.whole_cases("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self.whole_cases("test")

    def whole_cases(self, split: str) -> DataLoader[dict[str, Any]]:
        """The cases of a split one by one, those of this rank."""
        dataset = self.dataset(split)
        rank, world_size = self._place()
        # Cached cases are as good as ready; sending them through a worker would only copy them.
        return self._loader(dataset, ShardSampler(len(dataset), rank=rank, world_size=world_size), 1, 0 if self.card.cache else self.card.num_workers)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Labels as the schema says: regions are made of label maps, those of companions too. Shares of a companion are of what a network tells apart already."""
        maps = {"label": region_maps(batch["label"], self.schema)}
        if self.schema.regions:
            label_maps = {companion.name for cases in self.splits.values() for case in cases for companion in case.companions if not companion.shares}
            for name in label_maps & batch.keys():
                maps[name] = torch.stack([region_maps(one.unsqueeze(1), self.schema) for one in batch[name].unbind(1)], dim=1)
        return {**batch, **maps}

    def _loader(self, dataset: CaseDataset, sampler: EpochSampler | ShardSampler, batch_size: int, workers: int) -> DataLoader[dict[str, Any]]:
        return _Loader(
            dataset,
            collate_fn=_collate,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context=_fork_server() if workers and self._place()[1] > 1 else None,
            worker_init_fn=_begin_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each epoch would take a number from the global generator
        )

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch in which the numbers of the cases are no tensor yet: each tensor of a worker takes a file handle, which for a few numbers is slow."""
    cases = np.array([item["case_index"] for item in items])
    return {**default_collate([{key: value for key, value in item.items() if key != "case_index"} for item in items]), "case_index": cases}


class _Loader(DataLoader[dict[str, Any]]):
    """Finishes batches here: label maps become int64, since of a small type they travel faster from the workers."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        for batch in super().__iter__():
            batch["case_index"] = torch.from_numpy(batch["case_index"])
            for name, value in batch.items():
                if isinstance(value, torch.Tensor) and value.dtype in (torch.int16, torch.int32):
                    batch[name] = torch.empty(value.shape, dtype=torch.int64, pin_memory=value.is_pinned())
                    np.copyto(batch[name].numpy(), value.numpy())  # torch's threads would spin beside the workers
            yield batch


def _fork_server() -> BaseContext:
    """Forks workers from a process without threads.

    A process that talks to others has threads at work, and a worker forked while one of them holds a lock of Python's waits for it for ever.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "densecal.data"])  # else each worker would import it all by itself, one after the other
    return context


def _begin_worker(worker: int) -> None:
    """Give a worker one thread and an end."""
    if "cv2" in sys.modules:  # and so in use
        sys.modules["cv2"].setNumThreads(0)  # else each worker takes as many as there are cores; torch does the same with its own
    run = multiprocessing.parent_process()
    assert run is not None

    def watch() -> None:
        run.join()
        os._exit(1)

    # Torch watches the process above, which for a worker of the fork server is that and not the run: it would not see the run being killed.
    threading.Thread(target=watch, daemon=True).start()
