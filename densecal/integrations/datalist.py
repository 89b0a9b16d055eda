"""Any data set that has a card as a MONAI datalist with folds, as Auto3DSeg and MONAI's bundles read it.

Auto3DSeg deals files into folds at random unless the datalist says which is which; two volumes of one person then fall on both sides of a split.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from densecal.data.card import DataCard, load_card, override_card, resolve_root
from densecal.data.layouts import find_cases
from densecal.data.split import split_cases

__all__ = ["fold_datalist"]


def fold_datalist(card: str | Path | DataCard, root: str | Path | None = None, *, num_folds: int = 5) -> dict[str, Any]:
    """List the labelled cases of a data set, each with its fold. Nobody's volumes are in two folds, and the folds are those of ``densecal-train
    data.num_folds=5 data.fold=0``.

    ``json.dump`` makes a file of it for ``AutoRunner``; ``monai.auto3dseg.datafold_read`` takes it as it is.

    Args:
        card: Name of a data set card, the path of one, or a card.
        root: Folder of the data set. By default where the card says, or below ``$DENSECAL_DATA``.
        num_folds: Number of folds, at least 2.

    Returns:
        ``{"name", "labels", "training"}``, where ``training`` is a list of ``{"image", "label", "fold"}`` in the order of the cases, with paths relative to the
        folder, and a list of them for an image of several files. The test split of a set that has one of its own is left out.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there is no such card, or fewer subjects than folds.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("imagesTr", "labelsTr"):
        ...     (root / name).mkdir()
        ...     for number in (3, 4, 6, 11):
        ...         (root / name / f"hippocampus_{number:03}.nii.gz").touch()
        >>> for entry in fold_datalist("hippocampus", root, num_folds=2)["training"]:
        ...     print(entry)
        {'image': 'imagesTr/hippocampus_003.nii.gz', 'label': 'labelsTr/hippocampus_003.nii.gz', 'fold': 1}
        {'image': 'imagesTr/hippocampus_004.nii.gz', 'label': 'labelsTr/hippocampus_004.nii.gz', 'fold': 1}
        {'image': 'imagesTr/hippocampus_006.nii.gz', 'label': 'labelsTr/hippocampus_006.nii.gz', 'fold': 1}
        {'image': 'imagesTr/hippocampus_011.nii.gz', 'label': 'labelsTr/hippocampus_011.nii.gz', 'fold': 0}
    """
    card = card if isinstance(card, DataCard) else load_card(card)
    if root is not None:
        card = override_card(card, {"root": str(root)})
    folder = resolve_root(card)
    cases = [case for case in find_cases(folder, card) if case.label is not None]
    fold_of: dict[str, int] = {}
    for fold in range(num_folds):
        split = split_cases(cases, override_card(card, {"num_folds": num_folds, "fold": fold, "val_fraction": 0.0}))
        fold_of |= {case.id: fold for case in split["test"]}

    def relative(file: Path) -> str:
        return Path(os.path.relpath(file, folder)).as_posix()

    entries = []
    for case in cases:
        if case.id in fold_of:
            image = [relative(file) for file in case.image]
            assert case.label is not None
            entries.append({"image": image[0] if len(image) == 1 else image, "label": relative(case.label), "fold": fold_of[case.id]})
    return {"name": card.name, "labels": {str(number): name for number, name in enumerate(card.classes)}, "training": entries}
