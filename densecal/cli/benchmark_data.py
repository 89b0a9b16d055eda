"""``densecal-benchmark data``: images per second of our loader beside the same pipeline written by hand with albumentations and torch's DataLoader."""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from densecal.cli.measuring import quantiles
from densecal.data import DataCard, SegmentationData, load_card, override_card
from densecal.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD
from densecal.data.layouts import Case

__all__ = ["ByHand", "run"]

_CHECKED = 8
"""Patches that are compared before anything is timed."""


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    """Print a table, or say what differs; whether both loaders gave the same patches."""
    sides = {}
    for name in ("size", "patch"):
        try:
            rows, columns = (int(n) for n in getattr(args, name).split(","))
        except ValueError:
            parser.error(f"--{name}: expected rows,columns, but got {getattr(args, name)!r}")
        sides[name] = [rows, columns]
    if min(*sides["size"], *sides["patch"], args.images, args.batch, args.repeats) < 1 or args.workers < 0:
        parser.error("expected sizes and numbers of at least 1, and no fewer than 0 workers")
    with tempfile.TemporaryDirectory() as folder:
        if args.root is None:
            card = made_up_set(Path(folder), args.images, sides["size"], args.format)
        else:
            card = override_card(load_card("camvid"), {"root": str(args.root)})
        card = override_card(card, {"patch_size": sides["patch"], "batch_size": args.batch, "num_workers": args.workers})
        return _report(card, args)


def made_up_set(root: Path, count: int, size: Sequence[int], suffix: str) -> DataCard:
    """Write seeded images of 19 smooth regions with a little noise, as large as photographs when compressed, and return their card."""
    import cv2
    from PIL import Image

    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (19, 3)).astype(np.float32)
    for name in ("images", "labels"):
        (root / name).mkdir()
    for n in range(count):
        coarse = rng.random((max(2, size[0] // 64), max(2, size[1] // 64), 19), dtype=np.float32)
        scores = [cv2.resize(np.ascontiguousarray(coarse[..., c]), (size[1], size[0]), interpolation=cv2.INTER_CUBIC) for c in range(19)]
        label = np.argmax(scores, axis=0).astype(np.uint8)
        image = (colors[label] + rng.normal(0, 6, (*size, 3))).clip(0, 255).astype(np.uint8)
        label[: size[0] // 16] = 255
        Image.fromarray(image).save(root / "images" / f"{n:04}.{suffix}")
        Image.fromarray(label).save(root / "labels" / f"{n:04}.png")
    return DataCard(
        name="made-up",
        classes=[f"class {c}" for c in range(19)],
        background=None,
        ignore_index=255,
        root=str(root),
        image_channels=3,
        normalisation="imagenet",
        patch_size=list(size),
        val_fraction=0.0,
        test_fraction=0.0,
    )


class ByHand(Dataset[tuple[Any, Any]]):
    """What a user writes."""

    def __init__(self, cases: Sequence[Case], transform: Any, cache: bool) -> None:
        self.cases = cases
        self.transform = transform
        self.cached = [self.read(case) for case in cases] if cache else None

    def __len__(self) -> int:
        return len(self.cases)

    def read(self, case: Case) -> tuple[NDArray[Any], NDArray[Any]]:
        import cv2
        from PIL import Image

        image = cv2.cvtColor(cv2.imread(str(case.image[0])), cv2.COLOR_BGR2RGB)  # type: ignore[arg-type]
        return image, np.array(Image.open(str(case.label)))

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, mask = self.cached[index] if self.cached is not None else self.read(self.cases[index])
        result = self.transform(image=image, mask=mask)
        return result["image"], result["mask"].long()


def transform_by_hand(card: DataCard, train: bool) -> Any:
    """``STANDARD_PIPELINE``, with the arguments that ours finds by itself."""
    import albumentations as A
    import cv2

    steps: list[Any] = []
    if train:
        height, width = card.patch_size
        mean = tuple(255 * value for value in IMAGENET_MEAN)
        steps = [
            A.RandomScale(scale_limit=(-0.5, 1.0), mask_interpolation=cv2.INTER_NEAREST_EXACT, p=1.0),
            A.RandomCrop(height, width, pad_if_needed=True, fill=mean, fill_mask=card.ignore_index),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(brightness=(0.5, 1.5), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=(-0.07, 0.07), p=0.5),
        ]
    return A.Compose([*steps, A.Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD), A.ToTensorV2()])


def _report(card: DataCard, args: argparse.Namespace) -> bool:
    import albumentations
    import cv2

    data = SegmentationData(card, check=False, progress=False)
    if difference := _difference(data):
        print(f"the loaders differ: {difference}", file=sys.stderr)
        return False
    kind = args.root.name if args.root else f"made-up {args.format}"
    count, patch = len(data.splits["train"]), " x ".join(map(str, card.patch_size))
    print(f"{count} {kind} images; patches of {patch}, {args.batch} per batch; {args.workers} workers; {args.repeats} measurements")
    print(f"torch {torch.__version__}, albumentations {albumentations.__version__}, OpenCV {cv2.__version__}")
    print(f"Images per second. Of one seed both gave the same {_CHECKED} patches and whole images before.\n")
    print(f"{'items':<14} {'in memory':<10} {'loader':<9} {'20 %':>8} {'median':>8} {'80 %':>8} {'ratio':>7}")
    for train in (True, False):
        for cache in (False, True):
            loaders = _loaders(override_card(card, {"cache": cache}), train)
            rates = _rates(loaders, count, args.repeats)
            for name, values in rates.items():
                low, middle, high = quantiles(values)
                ratio = middle / statistics.median(rates["by hand"])
                place = f"{'patches' if train else 'whole images':<14} {'yes' if cache else 'no':<10}"
                print(f"{place} {name:<9} {low:8.1f} {middle:8.1f} {high:8.1f} {ratio:6.2f}x", flush=True)
    return True


def _loaders(card: DataCard, train: bool) -> dict[str, Iterable[Any]]:
    """Ours and one by hand, over the same images; both with as many workers, whole images in memory in the main process."""
    data = SegmentationData(card, check=False, progress=False)
    workers = card.num_workers if train or not card.cache else 0
    by_hand: DataLoader[Any] = DataLoader(
        ByHand(data.splits["train"], transform_by_hand(card, train), card.cache),
        batch_size=card.batch_size if train else 1,
        shuffle=train,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    if train:
        return {"by hand": by_hand, "densecal": data.train_dataloader()}
    data.splits["val"] = data.splits["train"]
    return {"by hand": by_hand, "densecal": data.val_dataloader()}


def _rates(loaders: dict[str, Iterable[Any]], count: int, repeats: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for repeat in range(repeats + 1):  # the first starts the workers
        for name, loader in loaders.items():
            start = time.perf_counter()
            for _ in loader:
                pass
            if repeat:
                rates[name].append(count / (time.perf_counter() - start))
    return rates


def _difference(data: SegmentationData) -> str | None:
    """What differs between patches and whole images of both loaders, drawn from the same numbers."""
    cases = data.splits["train"]
    for train in (True, False):
        data.splits["val"] = cases
        ours = data.dataset("train" if train else "val")
        by_hand = ByHand(cases, transform_by_hand(data.card, train), cache=False)
        for seed in range(_CHECKED):
            index = seed % len(cases)
            item = ours[index, seed] if train else ours[index]
            by_hand.transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
            image, label = by_hand[index]
            if not item["label"][0].equal(label):
                return f"label of {cases[index].id}, seed {seed}"
            padding = (item["image"] == 0).all(dim=0) & (label == data.card.ignore_index)  # by hand it gets other colours with the image
            apart = float((item["image"] - image)[:, ~padding].abs().amax())
            if apart > 1e-4:
                return f"image of {cases[index].id}, seed {seed}, by {apart:.3g}"
    return None
