"""Focal loss against the authors' numbers."""

from __future__ import annotations

from golden import check, handles, ignore, labels_of

from densecal.losses import FocalLoss


@handles("focal_marginloss", "focal_jdt")
def focal(case, tensors):
    reduction = case["params"]["reduction"].split()[0]
    check(case, tensors, FocalLoss(gamma=case["params"]["gamma"], reduction=reduction, ignore_index=ignore(case)), labels_of(tensors))
