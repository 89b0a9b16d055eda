"""Whole images through a network that was trained on patches, patch by patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from monai.inferers import sliding_window_inference
from torch import Tensor

from densecal.checks import check_choice, check_positive
from densecal.inference.inferer import Inferer, Predict, pad_to

__all__ = ["SlidingWindow"]

BLENDING = ("gaussian", "constant")


class SlidingWindow(Inferer):
    """Predict patch by patch and average the *probabilities* where patches overlap, for the same reason as those of views (:class:`Inferer`).

    Args:
        patch_size: Side of the windows per axis, in pixels or voxels, at every scale. Images smaller than a window are padded with zeros, as in training,
            and cropped back.
        overlap: Share of a window that the next one covers again, in [0, 1).
        blending: ``"gaussian"`` weighs the middle of a window more than its border; ``"constant"`` weighs all alike.
        batch_size: Windows that go through the network together.
        flip_axes: Spatial axes that are flipped, counted from 0; of several, every combination is a view. ``(1,)`` mirrors a 2D image left to right.
        scales: Factors by which the image is resized, each with every flip.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> import torch
        >>> window = SlidingWindow((8, 8, 8))
        >>> probs = window(torch.nn.Conv3d(1, 3, 1), torch.zeros(1, 1, 12, 9, 8))
        >>> probs.shape, bool((probs.sum(1) - 1).abs().max() < 1e-5)
        (torch.Size([1, 3, 12, 9, 8]), True)
    """

    def __init__(
        self,
        patch_size: Sequence[int],
        *,
        overlap: float = 0.5,
        blending: Literal["gaussian", "constant"] = "gaussian",
        batch_size: int = 4,
        flip_axes: Sequence[int] = (),
        scales: Sequence[float] = (1.0,),
    ) -> None:
        check_choice("blending", blending, BLENDING)
        check_positive("batch_size", batch_size)
        if not patch_size:
            raise ValueError("Expected `patch_size` to have one number per spatial axis, but got none.")
        for side in patch_size:
            check_positive("patch_size", side)
        if not 0 <= overlap < 1:
            raise ValueError(f"Expected `overlap` in [0, 1), but got {overlap}.")
        super().__init__(len(patch_size), flip_axes=flip_axes, scales=scales)
        self.patch_size = tuple(patch_size)
        self.overlap = overlap
        self.blending = blending
        self.batch_size = batch_size

    def predict_view(self, predict: Predict, image: Tensor) -> list[Tensor]:
        padded, inside = pad_to(image, self.patch_size)
        results = sliding_window_inference(padded, self.patch_size, self.batch_size, predict, overlap=self.overlap, mode=self.blending)
        # MONAI returns a tuple of one as its only item.
        return [result[inside] for result in ([results] if isinstance(results, Tensor) else results)]
