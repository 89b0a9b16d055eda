"""Targets against the authors' numbers: boundary label smoothing, statistics of the labels of a window, windows that follow the
image, temporal label smoothing, kernel-density soft labels."""

from __future__ import annotations

import torch
from golden import check, handles, labels_of
from torch import nn
from torch.nn import functional as F

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.losses import BoundarySmoothingLoss, NACLLoss
from densecal.targets import (
    BoundarySmoothingTarget,
    boundary_mask,
    kde_soft_label,
    neighbour_proportions_target,
    one_hot_target,
    temporal_share,
    temporal_smoothing_target,
)


@handles("boundary_ls")
def boundary_smoothing(case, tensors):
    params, labels = case["params"], labels_of(tensors)
    num_classes, dims = tensors["logits"].shape[1], labels.ndim - 1
    ignored = {"C": num_classes, None: DEFAULT_IGNORE_INDEX}.get(params["ignore_label"], params["ignore_label"])
    options = {"kernel_size": params["k"], "smoothing": params["epsilon"], "ignore_index": ignored}
    plain = one_hot_target(labels, num_classes, ignore_index=ignored, spatial_dims=dims)
    assert torch.equal(plain.valid, tensors["keep_mask"].bool())
    mask = boundary_mask(plain.one_hot, plain.valid, kernel_size=params["k"])[:, 0]
    assert torch.equal(mask, tensors["boundary"].bool() & plain.valid)
    for dtype in (torch.float32, torch.float64):
        probs = BoundarySmoothingTarget(**options)(labels, num_classes, spatial_dims=dims, dtype=dtype).probs
        torch.testing.assert_close(probs, tensors["target"].to(dtype), rtol=0, atol=1e-6)
    # The published loss is KL, cross-entropy less the target's entropy, which has no gradient.
    entropy = -torch.special.xlogy(probs, probs).sum() / plain.valid.sum()
    check({**case, "results": {"loss": case["results"]["loss"] + entropy.item()}}, tensors, BoundarySmoothingLoss(**options), labels)


class AsPadded(nn.Module):
    """A loss on an image with a frame of class 0 and intensity 0, averaged inside the frame: the published border rule without an option for it."""

    def __init__(self, loss: nn.Module, width: int, image: torch.Tensor | None) -> None:
        super().__init__()
        self.loss, self.width, self.image = loss, width, image

    def forward(self, logits, labels):
        context = None if self.image is None else {"image": framed(self.image, self.width)}
        values = self.loss(framed(logits, self.width), framed(labels, self.width), context=context)
        return inside(values, self.width, logits.ndim - 2).mean()


def framed(tensor, width):
    return F.pad(tensor, [width, width] * (tensor.ndim - (2 if tensor.is_floating_point() else 1)))


def inside(tensor, width, spatial_dims):
    return tensor[(..., *[slice(width, -width) if width else slice(None)] * spatial_dims)]


@handles(
    "nacl_max", "nacl_min", "nacl_median", "nacl_mode", "nacl_image_proportions_l1", "nacl_image_proportions_l2", "nacl_bilateral", "nacl_gradient"
)
@handles("nacl_image_proportions_l1_replicate", "nacl_image_proportions_l2_replicate")
def neighbours(case, tensors):
    params, labels, num_classes, image = case["params"], labels_of(tensors), tensors["logits"].shape[1], tensors.get("image")
    kernel = {
        "image_proportions_l1": "image_l1",
        "image_proportions_l2": "image_l2",
        "bilateral": "bilateral_as_published",
        "gradient": "gradient_as_published",
    }.get(params["kernel_ops"], params["kernel_ops"])
    window = {"kernel": kernel, "kernel_size": params["kernel_size"], "sigma": params.get("sigma", 1.0)}
    width = params["kernel_size"] // 2 if params["border"] == "zero labels" else 0
    for dtype in (torch.float32, torch.float64):
        padded = None if image is None else framed(image, width)
        prior = neighbour_proportions_target(framed(labels, width), num_classes, image=padded, dtype=dtype, **window).probs
        torch.testing.assert_close(inside(prior, width, labels.ndim - 1), tensors["prior"].to(dtype), rtol=0, atol=1e-6)
    loss = NACLLoss(weight=params["alpha"], distance=params["distance_type"], reduction="none", **window)
    check(case, tensors, AsPadded(loss, width, image), labels)
    if params["kernel_ops"] == "max":  # class 0 outside never is the largest, so that the border rule plays no part
        torch.testing.assert_close(neighbour_proportions_target(labels, num_classes, **window).probs, tensors["prior"], rtol=0, atol=1e-6)


TEMPORAL_FORMS = {
    "q_exp_param": "exponential",
    "q_sigmoid_param": "sigmoid",
    "q_linear": "linear",
    "q_step": "step",
    "q_kro": "hard",
    "q_ls": "constant",
}


def horizons(case):
    params = case["params"]
    form = TEMPORAL_FORMS[case["function"].removeprefix("get_smoothed_labels(").removesuffix(")")]
    names = {"h_true": "h_true", "h_min": "h_min", "h_max": "h_max", "gamma": "gamma", "delta_h": "steps_per_hour"}
    return {"form": form, **{ours: params[theirs] for theirs, ours in names.items() if theirs in params}}


@handles("tls_q_exp_param", "tls_q_sigmoid_param", "tls_q_linear", "tls_q_step", "tls_q_kro", "tls_q_ls")
def temporal(case, tensors):
    options, time = horizons(case), tensors["dt"].double()
    share = temporal_share(time.masked_fill(time >= 1e9, float("inf")), **options)
    expected = tensors["q"].double()
    if case["status"] == "as_published":  # the published sigmoid overflows and becomes a step, which a narrow sigmoid is except right beside h_true
        far = (time - options["h_true"]).abs() > 16 * options["gamma"] * options["steps_per_hour"]
        share, expected = share[far], expected[far]
    torch.testing.assert_close(share, expected, rtol=0, atol=1e-6)


@handles("tls_sequence")
def temporal_sequence(case, tensors):
    for dtype in (torch.float32, torch.float64):
        for label in (tensors["event"][None], tensors["event"][None, None].long()):
            probs = temporal_smoothing_target(label, **horizons(case), dtype=dtype).probs
            torch.testing.assert_close(probs[0, 0], tensors["smoothed"].to(dtype), rtol=0, atol=1e-6)


@handles("kde_soft_label")
def kernel_density(case, tensors):
    probs, at, truth = tensors["probs"].double(), tensors["key_index"].long(), tensors["key_onehot"]
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 5e-5)):  # the published float32 differs by 1e-5 itself
        keys = probs.flatten(1)[:, at].T.to(dtype)
        found = kde_soft_label(probs[None].to(dtype), keys, truth, bandwidth=case["params"]["bandwidth"])
        torch.testing.assert_close(found[0], tensors["kde_probs"].to(dtype), rtol=0, atol=tolerance)
