"""Cases as a torch data set, and the samplers that say what to draw from them.

Randomness travels with the index: a training item is asked for as ``(case, seed)``, and the seed is a hash of (run seed, epoch, case id, draw). A loader worker keeps
no state between items, so the batches depend neither on the number of workers nor on what was loaded before.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler
from tqdm import tqdm

from densecal.data.card import DataCard
from densecal.data.layouts import Case
from densecal.data.medium import medium_of
from densecal.seeds import derive_seed

__all__ = ["CaseDataset", "EpochSampler", "ShardSampler"]


class CaseDataset(Dataset[dict[str, Any]]):
    """Items of one split.

    Args:
        cases: The cases, in the order that ``case_index`` counts.
        card: How to load them.
        train: Give random patches for keys ``(index, seed)`` instead of whole cases for keys ``index``.

    Example:
        >>> dataset = CaseDataset(cases, card, train=True)  # doctest: +SKIP
        >>> dataset[0, 1234]["image"].shape  # doctest: +SKIP
        torch.Size([1, 48, 64, 48])
    """

    def __init__(self, cases: Sequence[Case], card: DataCard, *, train: bool) -> None:
        self.cases = list(cases)
        self.train = train
        self.loading = medium_of(card).loading(card, train=train)
        self._cached: Sequence[dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.cases)

    def fill_cache(self, progress: bool = False) -> None:
        """Load every case once. Do so before workers are started: they then share the memory."""
        if self._cached is None:
            with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
                loaded = pool.map(self._load, range(len(self)))
                self._cached = list(tqdm(loaded, total=len(self), desc="Loading data", unit="case", disable=not progress, leave=False))

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is not forked: the cache goes into shared memory, where each piece takes a file handle, of which a process has few."""
        if self._cached is not None and not isinstance(self._cached, _EndToEnd):
            self._cached = _EndToEnd(self._cached)
        return dict(self.__dict__)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        if self.train and seed is None:
            raise TypeError(f"Expected a training item to be asked for as (index, seed), but got {key!r}. Use the EpochSampler.")
        case = self.cases[index]
        data = self._cached[index] if self._cached is not None else self._load(index)
        try:
            with _one_thread():
                item = self.loading.whole(data) if seed is None else self.loading.patch(data, seed)
        except Exception as error:
            raise RuntimeError(f"{case.image[0]}: cannot be transformed ({type(error).__name__}: {error}).") from error
        return {**item, "case_index": index, "case_id": case.id}

    def _load(self, index: int) -> dict[str, Tensor]:
        case = self.cases[index]
        try:
            with _one_thread():
                return self.loading.load(case)
        except Exception as error:
            cause = error.__cause__ or error
            files = " and ".join(str(path) for path in case.files)
            raise RuntimeError(f"{files}: cannot be loaded ({type(cause).__name__}: {cause}). `densecal-check` looks at every file.") from error


class _EndToEnd(Sequence[dict[str, Tensor]]):
    """Items whose tensors of one name lie end to end in one tensor."""

    def __init__(self, items: Sequence[dict[str, Tensor]]) -> None:
        names = list(items[0]) if len(items) else []
        self.length = len(items)
        self.shapes = {name: [item[name].shape for item in items] for name in names}
        self.ends = {name: list(itertools.accumulate(shape.numel() for shape in self.shapes[name])) for name in names}
        self.flat = {name: torch.cat([item[name].flatten() for item in items]) for name in names}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        return {
            name: flat[self.ends[name][index] - self.shapes[name][index].numel() : self.ends[name][index]].view(self.shapes[name][index])
            for name, flat in self.flat.items()
        }


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """What to draw in an epoch: every case ``samples_per_case`` times, in an order of the epoch's own.

    Yields ``(case index, seed of the draw)``. It is a DistributedSampler so that Lightning tells it the epoch and does not wrap it in another one. The ranks share one
    order, repeated at its end as far as needed to give them equally many draws.

    Args:
        case_ids: The cases in the order of the data set.
        samples_per_case: Draws per case and epoch.
        seed: Seed of the run.
        rank: This process.
        world_size: Number of processes.

    Example:
        >>> sampler = EpochSampler(["a", "b", "c"], samples_per_case=2, seed=0)
        >>> sampler.set_epoch(5)
        >>> sorted(index for index, seed in sampler)
        [0, 0, 1, 1, 2, 2]
    """

    def __init__(self, case_ids: Sequence[str], *, samples_per_case: int = 1, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(len(case_ids)), num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.case_ids = list(case_ids)
        self.samples_per_case = samples_per_case
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-len(self.case_ids) * self.samples_per_case // self.world_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        total = len(self.case_ids) * self.samples_per_case
        order = torch.randperm(total, generator=torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))).tolist()
        for position in range(self.rank, len(self) * self.world_size, self.world_size):
            index, draw = divmod(order[position % total], self.samples_per_case)
            yield index, derive_seed(self.seed, "draw", self.epoch, self.case_ids[index], draw)


class ShardSampler(DistributedSampler[int]):
    """Every case once over all ranks, in order and never repeated; ranks may differ by one case.

    Example:
        >>> [list(ShardSampler(3, rank=rank, world_size=2)) for rank in (0, 1)]
        [[0, 2], [1]]
    """

    def __init__(self, length: int, *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(length), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums over a case then have one order, so that a worker (one thread) and the main process (many) agree to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
