"""Focal loss and distillation against the authors' numbers."""

from __future__ import annotations

from golden import check, handles, ignore, labels_of

from densecal.losses import FocalLoss, KLLoss


@handles("focal_marginloss", "focal_jdt")
def focal(case, tensors):
    reduction = case["params"]["reduction"].split()[0]
    check(case, tensors, FocalLoss(gamma=case["params"]["gamma"], reduction=reduction, ignore_index=ignore(case)), labels_of(tensors))


@handles("kl_div")
def kl(case, tensors):
    target = tensors["soft_labels"]
    if "keep_mask" in tensors:
        target = target.masked_fill(tensors["keep_mask"].unsqueeze(1) == 0, ignore(case))
    check(case, tensors, KLLoss(temperature=case["params"]["T"], ignore_index=ignore(case)), target)
