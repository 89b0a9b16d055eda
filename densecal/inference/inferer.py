"""What every way of predicting a whole image has in common: the views of the image, and the mean of what the network says about them."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F

from densecal.checks import check_choice, plain
from densecal.ops.activation import Activation, probabilities

__all__ = ["Inferer", "full_resolution", "pad_to"]

Predict: TypeAlias = Callable[[Tensor], tuple[Tensor, ...]]
"""From a piece of an image ``(N, C_in, *piece)`` to maps ``(N, C, *piece)``: its probabilities, maybe its logits too."""

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def full_resolution(outputs: Tensor | Sequence[Tensor], spatial_dims: int) -> Tensor:
    """The logits ``(N, C, *spatial)`` of a network's outputs: the first of several resolutions, as a list or stacked ``(N, K, C, *spatial)``."""
    if isinstance(outputs, (list, tuple)):
        return outputs[0]
    assert isinstance(outputs, Tensor)
    return outputs[:, 0] if outputs.ndim == spatial_dims + 3 else outputs


def pad_to(image: Tensor, size: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """Pad what is missing to ``size`` with zeros, the mean of a normalised image, and say where the image lies in the result.

    The image is centred as a small one is in training, to the voxel: a network with strides is not indifferent to a shift.

    Example:
        >>> import torch
        >>> padded, inside = pad_to(torch.ones(1, 1, 2), (5,))
        >>> padded, padded[inside]
        (tensor([[[0., 0., 1., 1., 0.]]]), tensor([[[1., 1.]]]))
    """
    spatial = image.shape[2:]
    missing = [max(s - n, 0) for s, n in zip(size, spatial, strict=True)]
    before = [(m + 1) // 2 for m in missing]
    padding = [side for b, m in zip(reversed(before), reversed(missing), strict=True) for side in (b, m - b)]  # torch counts axes from the last
    return F.pad(image, padding), (slice(None), slice(None), *(slice(b, b + n) for b, n in zip(before, spatial, strict=True)))


def _resized(image: Tensor, size: Sequence[int]) -> Tensor:
    """Linear along each axis, corners on corners. Not smoothed before it shrinks: neither are the images that augmentation scales for the network to learn."""
    if tuple(image.shape[2:]) == tuple(size):
        return image
    return F.interpolate(image, size=tuple(size), mode=_LINEAR[len(size)], align_corners=False)


class Inferer(ABC):
    """Predict whole images, as they are or as the mean over several views: flipped, scaled, or both (test-time augmentation).

    Of the views the *probabilities* are averaged, on the grid of the image. Averaged logits are not the logits of an average: a view that is sure of itself
    outvotes the others, and the result is over-confident where they disagree. The mean of the views' distributions is the distribution of the mixture.

    What goes through the network is taken to where its weights are; everything else, the sums over windows and views too, stays where the image is. So an image in main
    memory takes no more of a GPU than a batch of its windows.

    A subclass says in :meth:`predict_view` how one view goes through the network: window by window (:class:`SlidingWindow`) or in one piece
    (:class:`WholeImage`).

    Args:
        spatial_dims: 2 for images, 3 for volumes; 1 works too.
        flip_axes: Spatial axes that are flipped, counted from 0; of several, every combination is a view. ``(1,)`` mirrors a 2D image left to right.
        scales: Factors by which the image is resized (linearly, sides rounded to whole pixels), each with every flip.

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(self, spatial_dims: int, *, flip_axes: Sequence[int] = (), scales: Sequence[float] = (1.0,)) -> None:
        check_choice("spatial_dims", spatial_dims, tuple(_LINEAR))
        axes = tuple(range(spatial_dims))
        if not set(flip_axes) <= set(axes) or len(set(flip_axes)) < len(flip_axes):
            raise ValueError(f"Expected `flip_axes` to be different ones of the spatial axes {axes}, but got {tuple(flip_axes)}.")
        if not scales or not all(0 < scale < math.inf for scale in scales):
            raise ValueError(
                f"Expected `scales` to be one or more numbers greater than 0, but got {tuple(scales)}. (1.0,) leaves the image as it is."
            )
        self.spatial_dims = spatial_dims
        self.flip_axes = tuple(flip_axes)
        self.scales = tuple(scales)

    @abstractmethod
    def predict_view(self, predict: Predict, image: Tensor) -> Sequence[Tensor]:
        """Predict one view of an image.

        Args:
            predict: From a piece ``(N, C_in, *piece)`` to maps ``(N, C, *piece)``, float32. How many there are is the caller's affair.
            image: The view ``(N, C_in, *spatial)``, float32.

        Returns:
            As many maps as ``predict`` gives, each ``(N, C, *spatial)``.
        """

    def __call__(self, model: nn.Module, image: Tensor, *, activation: Activation = "softmax") -> Tensor:
        """Probabilities of an image.

        Args:
            model: Network from ``(N, C_in, *spatial)`` to logits ``(N, C, *spatial)``, in evaluation mode.
            image: ``(N, C_in, *spatial)``.
            activation: What turns logits into probabilities: ``"softmax"``, or ``"sigmoid"`` for regions.

        Returns:
            ``(N, C, *spatial)``, float32, in [0, 1], under softmax summing to 1 over C.

        Raises:
            ValueError: If the image has another number of spatial dims, or ``activation`` is neither.
        """
        (probs,) = self._mean_of_views(model, image, lambda logits: (probabilities(logits, activation),))
        return _without_rounding(probs, activation)

    def with_logits(self, model: nn.Module, image: Tensor, *, activation: Activation = "softmax") -> tuple[Tensor, Tensor]:
        """Probabilities of an image, and the logits averaged with the same weights, both ``(N, C, *spatial)``, from one pass.

        The logits are for what is stated on logits themselves. Their softmax or sigmoid is not the probabilities where windows or views disagree.
        """
        probs, logits = self._mean_of_views(model, image, lambda logits: (probabilities(logits, activation), logits))
        return _without_rounding(probs, activation), logits

    def _mean_of_views(self, model: nn.Module, image: Tensor, outputs: Predict) -> list[Tensor]:
        if image.ndim != self.spatial_dims + 2:
            raise ValueError(f"Expected `image` of shape (N, C, *spatial) with {self.spatial_dims} spatial dims, but got {tuple(image.shape)}.")

        weights = next(itertools.chain(model.parameters(), model.buffers()), None) if isinstance(model, nn.Module) else None  # any function will do
        device = image.device if weights is None else weights.device

        def predict(piece: Tensor) -> tuple[Tensor, ...]:
            maps = outputs(full_resolution(model(piece.to(device, image.dtype)), self.spatial_dims).float())
            return tuple(result.to(image.device) for result in maps)

        # In single precision whatever the network computes in; one sum per map, never all views at once.
        whole = plain(image).float()
        sums: list[Tensor] = []
        for scale, axes in self._views():
            view = _resized(whole, [max(1, round(n * scale)) for n in whole.shape[2:]]).flip(axes)
            maps = [_resized(result.flip(axes), whole.shape[2:]) for result in self.predict_view(predict, view)]
            sums = [total + result for total, result in zip(sums, maps, strict=True)] if sums else maps
        count = len(self.scales) * 2 ** len(self.flip_axes)
        return [total / count for total in sums] if count > 1 else sums

    def _views(self) -> Iterator[tuple[float, tuple[int, ...]]]:
        """Scale and flipped axes of each view, axes counted as in ``(N, C, *spatial)``."""
        for scale in self.scales:
            for number in range(len(self.flip_axes) + 1):
                for axes in itertools.combinations(self.flip_axes, number):
                    yield scale, tuple(axis + 2 for axis in axes)


def _without_rounding(probs: Tensor, activation: Activation) -> Tensor:
    """A weighted mean of distributions sums to 1 up to rounding, which the Gaussian's small weights can make visible."""
    if probs.requires_grad:
        return probs / probs.sum(dim=1, keepdim=True) if activation == "softmax" else probs.clamp(0, 1)
    return probs.div_(probs.sum(dim=1, keepdim=True)) if activation == "softmax" else probs.clamp_(0, 1)  # the largest thing there is: no copy of it
