"""Focal loss, distillation, perturbed labels and MONAI's neighbour-aware loss against the authors' numbers."""

from __future__ import annotations

import pytest
import torch
from golden import check, handles, ignore, labels_of
from torch import nn

from densecal.integrations import monai
from densecal.losses import CompoundLoss, FocalLoss, KLLoss, OnlineLabelSmoothingLoss
from densecal.perturbation import perturb_labels
from densecal.targets import OneHotTarget
from densecal.terms import SCBCE


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


@handles("sc_bce_expectation")
def sc_bce(case, tensors):
    class WithLevels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            term = SCBCE(beta=case["params"]["beta"])
            self.loss = CompoundLoss(OneHotTarget(activation="sigmoid"), {"sc_bce": {"weight": 1.0, "term": term}})

        def forward(self, logits, target):
            return self.loss(logits, target, context={"perturbation": case["params"]["alpha"]})

    shares = case["params"]["beta"] * tensors["alpha"].reshape(-1, 1, 1, 1)
    expected = perturb_labels(tensors["labels"].float(), shares, activation="sigmoid")
    torch.testing.assert_close(expected, tensors["expected_target"], rtol=0, atol=1e-6)
    check(case, tensors, WithLevels(), tensors["labels"].long())


@handles("nacl_monai_gaussian_2d", "nacl_monai_gaussian_3d")
def nacl_monai(case, tensors):
    params, labels = case["params"], labels_of(tensors)
    loss = monai.NACLLoss(
        tensors["logits"].shape[1],
        labels.ndim - 1,
        kernel_ops=params["kernel_ops"],
        distance_type=params["distance_type"],
        sigma=params["sigma"],
        alpha=params["alpha"],
    )
    check(case, tensors, loss, labels)


@handles("online_ls")
def online_label_smoothing(case, tensors):
    """A sequence of epochs. Where a class was never predicted right the published target is 0 and ours the last one; there the comparison ends."""
    params = case["params"]
    loss = OnlineLabelSmoothingLoss(
        params["num_classes"], weight_ce=params["alpha"], weight_soft=1 - params["alpha"], smoothing=params["smoothing"]
    ).double()
    published = tensors["supervise"].mT  # one column per class there
    torch.testing.assert_close(loss.parts["soft"].table.float(), published[0], rtol=0, atol=1e-6)
    for step, (logits, labels) in enumerate(zip(tensors["logits"], tensors["labels"].long(), strict=True)):
        value = loss(logits.double().unsqueeze(-1), labels.unsqueeze(-1))
        assert value.item() == pytest.approx(tensors["losses"][step].item(), rel=1e-5)
        epoch, left = divmod(step + 1, params["batches_per_epoch"])
        if left == 0:
            loss.on_epoch(epoch, len(published) - 1)
            seen = published[epoch].any(dim=1)
            torch.testing.assert_close(loss.parts["soft"].table[seen].float(), published[epoch][seen], rtol=0, atol=1e-6)
            if not seen.all():
                return
    assert value.item() == pytest.approx(case["results"]["loss_last"], rel=1e-6)
