"""Targets, cross-entropy, neighbour penalty and overlap losses against the authors' numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import check, handles, ignore, labels_of
from torch import nn

from densecal.losses import CompoundLoss, CrossEntropyLoss, LabelSmoothingLoss, NACLLoss, SVLSLoss
from densecal.ops import svls_kernel
from densecal.targets import OneHotTarget, neighbour_proportions_target, svls_target
from densecal.terms import Overlap


@handles("svls_2d", "svls_3d", "svls_2d_k5_corrected", "svls_3d_k5_corrected")
def svls(case, tensors):
    options = {"kernel_size": case["params"]["kernel_size"], "sigma": case["params"]["sigma"]}
    labels = labels_of(tensors)
    spatial_dims = labels.ndim - 1
    torch.testing.assert_close(svls_kernel(**options, spatial_dims=spatial_dims).dense().float(), tensors["kernel"], rtol=0, atol=1e-6)
    for dtype in (torch.float32, torch.float64):
        target = svls_target(labels, tensors["logits"].shape[1], **options, dtype=dtype)
        torch.testing.assert_close(target.probs, tensors["target"].to(dtype), rtol=0, atol=1e-6)
    check(case, tensors, SVLSLoss(**options), labels)


def nacl_options(case) -> dict[str, Any]:
    params = case["params"]
    kernel = {"mean": "mean", "gaussian": "svls"}[params["kernel_ops"]]  # MarginLoss's "gaussian" is the SVLS stencil
    return {"kernel": kernel, "kernel_size": params["kernel_size"], "sigma": params.get("sigma", 1.0)}


@handles("nacl_mean_replicate", "nacl_gaussian", "nacl_gaussian_k5_corrected", "nacl_monai_mean_replicate")
@handles("nacl_monai_mean_renormalize", "nacl_monai_mean_2d", "nacl_monai_mean_3d")
def nacl(case, tensors):
    params, window, labels = case["params"], nacl_options(case), labels_of(tensors)
    # MarginLoss's SVLS stencil replicates whatever the rule for labels is.
    border = {"replicate": "replicate", "renormalize": "renormalize", "zeros on the one-hot": "zeros", "zero labels": "replicate"}[params["border"]]
    prior = neighbour_proportions_target(labels, tensors["logits"].shape[1], border=border, **window).probs
    torch.testing.assert_close(prior, tensors["prior"], rtol=0, atol=1e-6)
    acts_on = "probs" if params.get("is_softmax") else "logits"
    loss = NACLLoss(weight=params["alpha"], distance=params["distance_type"], acts_on=acts_on, border=border, **window)
    check(case, tensors, loss, labels)
    if "penalty" in case["results"]:
        parts = loss.terms(tensors["logits"].double(), labels)
        assert parts["ce"].item() == pytest.approx(case["results"]["loss_ce"], rel=1e-6)
        assert parts["neighbour"].item() == pytest.approx(case["results"]["penalty"], rel=1e-6)


@handles("nacl_mean")
def nacl_inside(case, tensors):
    """The published border counts the outside as class 0; every rule agrees far enough from it, and the cross-entropy has no border."""
    window, labels = nacl_options(case), labels_of(tensors)
    reach = window["kernel_size"] // 2
    inside = (..., *[slice(reach, -reach)] * (labels.ndim - 1))
    prior = neighbour_proportions_target(labels, tensors["logits"].shape[1], **window).probs
    torch.testing.assert_close(prior[inside], tensors["prior"][inside], rtol=0, atol=1e-6)
    ce = NACLLoss(**window).terms(tensors["logits"].double(), labels)["ce"]
    assert ce.item() == pytest.approx(case["results"]["loss_ce"], rel=1e-6)


@handles("ls_3d", "ls_marginloss", "ls_c_minus_1")
def label_smoothing(case, tensors):
    spread = "others" if case["stratum"] == "ls_c_minus_1" else "all"
    reduction = case["params"].get("reduction", "mean")
    loss = LabelSmoothingLoss(smoothing=case["params"]["smoothing"], spread=spread, reduction=reduction, ignore_index=ignore(case))
    check(case, tensors, loss, labels_of(tensors))


@handles("ls_as_logit_penalty")
def label_smoothing_identity(case, tensors):
    """Label smoothing is cross-entropy plus rate * mean(z_y - mean_c z)."""

    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.smoothed, self.plain = LabelSmoothingLoss(smoothing=case["params"]["smoothing"]), CrossEntropyLoss()

        def forward(self, logits, target):
            return self.smoothed(logits, target) - self.plain(logits, target)

    check(case, tensors, Difference(), labels_of(tensors))


@handles("jdt_hard_D", "jdt_hard_IC", "jdt_active_PRESENT", "jdt_active_ALL", "jdt_soft", "jdt_soft_present", "jdt_ignore_index")
@handles("jdt_keep_mask", "jdt_all_masked", "jdt_zero_at_equality")
def jdt(case, tensors):
    params = case["params"]
    hard = params["label_kind"] == "hard"
    target = labels_of(tensors) if hard else tensors["soft_labels"]
    if "keep_mask" in tensors:
        out = tensors["keep_mask"] == 0
        target = target.masked_fill(out if hard else out.unsqueeze(1), ignore(case))
    active = params.get("active_classes_mode_hard" if hard else "active_classes_mode_soft")
    overlap = Overlap(
        alpha=params["alpha"],
        beta=params["beta"],
        smooth=params.get("smooth", 1e-3),
        gamma=params.get("gamma", 1.0),
        log=params.get("log_loss", False),
        norm=f"l{params.get('norm', 1)}",
        active=active.lower() if active else "auto",
        threshold=params.get("threshold", 0.01),
        weight_batch=params["mIoUD"],
        weight_image=params["mIoUI"],
        weight_class=params["mIoUC"],
        class_weights=params.get("class_weights"),
    )
    loss = CompoundLoss(OneHotTarget(ignore_index=ignore(case)), {"overlap": {"weight": 1.0, "term": overlap}})
    # At p = q the l1 distance has a kink.
    check(case, tensors, loss, target, gradient=case["stratum"] != "jdt_zero_at_equality")


@handles("jdt_label_clamped")
def label_out_of_range(case, tensors):
    with pytest.raises(ValueError, match=r"Expected labels in 0 to 3 or ignore_index=-100, but got \[255\]"):
        CrossEntropyLoss()(tensors["logits"], labels_of(tensors))


@handles("monai_dice_soft", "monai_tversky_soft")
def monai_overlap(case, tensors):
    params = case["params"]
    tversky = case["stratum"] == "monai_tversky_soft"
    factor = 1.0 if params.get("jaccard") else 0.5
    images, classes = tensors["logits"].shape[:2]
    background = params.get("include_background", True)
    overlap = Overlap(
        alpha=params["alpha"] if tversky else factor,
        beta=params["beta"] if tversky else factor,
        smooth=params.get("smooth_nr", 1e-5) / (1 if tversky else 2),
        active="all",
        weight_batch=float(params.get("batch", False)),
        weight_image=float(not params.get("batch", False)),
        include_background=background,
    )
    loss = CompoundLoss(OneHotTarget(), {"overlap": {"weight": 1.0, "term": overlap}})
    count = images * (classes - (not background)) if params.get("reduction") == "sum" else 1
    check(case, tensors, loss, tensors["soft_labels"], factor=count)
