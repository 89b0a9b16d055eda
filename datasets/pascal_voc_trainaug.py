"""Write ImageSets/Segmentation/trainaug.txt of PASCAL VOC 2012: every image that VOC or SBD labels, but for VOC's val; 10,582 where both are complete.

python datasets/pascal_voc_trainaug.py VOCdevkit/VOC2012 benchmark_RELEASE/dataset
"""

from __future__ import annotations

import argparse
from pathlib import Path


def trainaug(voc: Path, sbd: Path) -> Path:
    """Write the list.

    Args:
        voc: Folder VOC2012.
        sbd: Folder of SBD that holds train.txt, val.txt and cls.

    Returns:
        The file.
    """
    lists = voc / "ImageSets" / "Segmentation"
    names = read(lists / "train.txt") | read(sbd / "train.txt") | read(sbd / "val.txt")
    file = lists / "trainaug.txt"
    file.write_text("".join(f"{name}\n" for name in sorted(names - read(lists / "val.txt"))), encoding="utf-8")
    return file


def read(path: Path) -> set[str]:
    return set(path.read_text(encoding="utf-8").split())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write ImageSets/Segmentation/trainaug.txt of PASCAL VOC 2012.")
    parser.add_argument("voc", type=Path, help="folder VOC2012")
    parser.add_argument("sbd", type=Path, help="folder of SBD that holds train.txt, val.txt and cls")
    arguments = parser.parse_args()
    written = trainaug(arguments.voc, arguments.sbd)
    print(f"{written}: {len(read(written))} images")
