"""Targets against the authors' numbers: boundary label smoothing."""

from __future__ import annotations

import torch
from golden import check, handles, labels_of

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.losses import BoundarySmoothingLoss
from densecal.targets import BoundarySmoothingTarget, boundary_mask, one_hot_target


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
