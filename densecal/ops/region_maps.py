"""From the classes of a label map to regions, which may overlap: one map each."""

from __future__ import annotations

from functools import reduce
from operator import or_

import torch
from torch import Tensor

from densecal.checks import plain
from densecal.labels import LabelSchema

__all__ = ["region_maps"]


def region_maps(label: Tensor, schema: LabelSchema) -> Tensor:
    """What the channels of a network are held against: the labels as they are or, where the schema has ``regions``, one map per region.

    Args:
        label: Label map ``(N, 1, *spatial)``, integer, or shares of the classes ``(N, K, *spatial)``, floating, which are all 0 where a pixel has no label.
        schema: The classes, or the regions and the classes they are made of.

    Returns:
        For R regions ``(N, R, *spatial)``: 1 inside and 0 outside, int32; or the sum of the shares of its classes, floating. ``ignore_index`` in every region of a
        pixel without a label. For classes ``label`` itself.

    Raises:
        ValueError: If there are fewer shares than the regions have classes, or an integer label has more than one channel.

    Example:
        >>> tumour = LabelSchema(("whole", "core"), background=None, activation="sigmoid", regions=((1, 2), (2,)))
        >>> region_maps(torch.tensor([[[0, 1, 2, -100]]]), tumour)
        tensor([[[   0,    1,    1, -100],
                 [   0,    0,    1, -100]]], dtype=torch.int32)
        >>> region_maps(torch.tensor([[[0.5], [0.25], [0.25]]]), tumour)
        tensor([[[0.5000],
                 [0.2500]]])
    """
    if not schema.regions:
        return label
    label = plain(label)
    if label.is_floating_point():
        if label.shape[1] <= max(map(max, schema.regions)):
            raise ValueError(f"Expected one share for each class that regions are made of, {schema.regions}, but got {label.shape[1]} channels.")
        maps = torch.stack([label[:, list(classes)].sum(dim=1) for classes in schema.regions], dim=1)
        return torch.where((label == 0).all(dim=1, keepdim=True), float(schema.ignore_index), maps)
    if label.shape[1] != 1:
        raise ValueError(f"Expected a label map of shape (N, 1, *spatial), but got {tuple(label.shape)}.")
    inside = torch.cat([reduce(or_, (label == c for c in classes)) for classes in schema.regions], dim=1)
    return torch.where(label == schema.ignore_index, schema.ignore_index, inside.int())
