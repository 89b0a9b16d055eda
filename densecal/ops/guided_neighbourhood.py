r"""Class shares in a window whose weights follow the image: pixels that look alike count more.

.. math:: t_c(x) = \frac{\sum_\delta w(\delta)\, s(x, \delta)\, v(x+\delta)\, q_c(x+\delta)}{\sum_\delta w(\delta)\, s(x, \delta)\, v(x+\delta)}

with the validity v and the similarity s of the intensities at :math:`x` and :math:`x+\delta`. The weights differ from pixel to pixel, so the window is
not separable: one multiply-add per offset.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from densecal.checks import check_choice, check_positive
from densecal.ops.neighbourhood import BORDERS, Border, Kernel, _broadcast

__all__ = ["Similarity", "guided_convolution"]

Similarity: TypeAlias = Literal["l1", "l2", "difference"]


def guided_convolution(
    shares: Tensor,
    valid: Tensor,
    image: Tensor,
    kernel: Kernel,
    *,
    similarity: Similarity = "l2",
    intensity_scale: float = 1.0,
    border: Border = "replicate",
    normalize: bool = True,
) -> Tensor:
    r"""Share of each class in the window, weighted by space and by intensity.

    Args:
        shares: Class shares per pixel, 0 where not valid, ``(N, C, *spatial)``, floating.
        valid: False where a pixel is ignored, ``(N, *spatial)``, bool.
        image: Intensities ``(N, channels, *spatial)``; what lies at an ignored pixel is not read. No gradient flows into it.
        kernel: Weights in space; :func:`densecal.ops.mean_kernel` for none.
        similarity: With the difference d of intensities, divided by ``intensity_scale`` and averaged over channels: ``"l1"`` is
            :math:`\exp(-|d|)`, ``"l2"`` :math:`\exp(-d^2)`, and ``"difference"`` :math:`|d|` itself, which weighs unlike pixels more.
        intensity_scale: Unit of the differences, > 0, in the image's unit.
        border: ``"replicate"`` repeats the outermost pixel of labels and image, ``"renormalize"`` leaves the outside out, ``"zeros"`` counts it as
            pixels of no class and intensity 0.
        normalize: Divide by the sum of the weights; False gives the weighted sum itself.

    Returns:
        ``(N, C, *spatial)`` of the dtype of ``shares``; 0 where not valid.

    Raises:
        ValueError: If an option is unknown, ``intensity_scale`` is not positive, or the image has another shape.

    Reference:
        Tomasi and Manduchi, "Bilateral Filtering for Gray and Color Images", ICCV 1998; Murugesan et al., arXiv:2303.06268.

    Example:
        >>> from densecal.ops import mean_kernel
        >>> one_hot = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
        >>> image = torch.tensor([[[0.0, 0.0, 99.0]]])  # the edge of the labels is an edge of the image, so nothing is mixed
        >>> guided_convolution(one_hot, torch.ones(1, 3, dtype=torch.bool), image, mean_kernel(3, 1))[0, 0]
        tensor([1., 1., 0.])
    """
    check_choice("similarity", similarity, ("l1", "l2", "difference"))
    check_choice("border", border, BORDERS)
    check_positive("intensity_scale", intensity_scale)
    n, _, *spatial = shares.shape
    if len(kernel.taps) != len(spatial):
        raise ValueError(f"Expected a kernel of {len(spatial)} axes for `shares` of shape {tuple(shares.shape)}, but got {len(kernel.taps)}.")
    if image.ndim != shares.ndim or [image.shape[0], *image.shape[2:]] != [n, *spatial]:
        raise ValueError(
            f"Expected the image as (N, channels, *spatial) = {(n, 'channels', *spatial)}, as large as the labels, but got {tuple(image.shape)}. "
            "Resample it, or give it a channel axis with `image.unsqueeze(1)`."
        )
    mask, channels = valid.unsqueeze(1), image.shape[1]
    intensities = torch.where(mask, image.detach().to(shares.dtype) / intensity_scale, 0.0)
    reach = [side // 2 for side in kernel.size]
    # What the denominator counts outside: with replicate the pixel that is repeated, with zeros a pixel of no class.
    counted = _pad(mask.to(shares.dtype), reach, border, outside=1.0 if border == "zeros" else 0.0)
    padded_shares, padded_image = _pad(shares, reach, border), _pad(intensities, reach, border)
    numerator, denominator = torch.zeros_like(shares), torch.zeros_like(mask, dtype=shares.dtype)
    for offset in itertools.product(*[range(side) for side in kernel.size]):
        at = (slice(None), slice(None), *[slice(o, o + size) for o, size in zip(offset, spatial, strict=True)])
        difference = padded_image[at] - intensities
        distance = (difference.square() if similarity == "l2" else difference.abs()).sum(dim=1, keepdim=True) / channels
        weight = distance if similarity == "difference" else torch.exp(-distance)
        weight = weight * _broadcast(functools.reduce(operator.mul, [axis[o] for axis, o in zip(kernel.taps, offset, strict=True)]), shares)
        numerator.addcmul_(weight, padded_shares[at])
        denominator.addcmul_(weight, counted[at])
    if not normalize:
        return torch.where(mask, numerator, 0.0)
    # A valid pixel weighs 1 in its own window, unless differences are the weights: where all are 0, so are the shares.
    used = mask & (denominator > 0)
    return torch.where(used, numerator / torch.where(used, denominator, 1.0), 0.0)


def _pad(values: Tensor, reach: Sequence[int], border: Border, *, outside: float = 0.0) -> Tensor:
    widths = [width for side in reversed(reach) for width in (side, side)]
    return F.pad(values, widths, mode="replicate") if border == "replicate" else F.pad(values, widths, value=outside)
