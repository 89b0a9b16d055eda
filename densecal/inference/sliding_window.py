"""Whole volumes through a network that was trained on patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from monai.inferers import sliding_window_inference
from torch import Tensor, nn
from torch.nn import functional as F

from densecal.checks import check_choice, check_positive, plain

__all__ = ["SlidingWindow", "full_resolution"]

BLENDING = ("gaussian", "constant")


def full_resolution(outputs: Tensor | Sequence[Tensor], spatial_dims: int) -> Tensor:
    """The logits ``(N, C, *spatial)`` of a network's outputs: the first of several resolutions, as a list or stacked ``(N, K, C, *spatial)``."""
    if isinstance(outputs, (list, tuple)):
        return outputs[0]
    assert isinstance(outputs, Tensor)
    return outputs[:, 0] if outputs.ndim == spatial_dims + 3 else outputs


class SlidingWindow:
    """Predict patch by patch and average the *probabilities* where patches overlap.

    Averaged logits are not the logits of an average: a window that is sure of itself outvotes the others, and the result is over-confident where they
    disagree. The mean of the windows' distributions is the distribution of the mixture.

    Args:
        patch_size: Side of the windows per axis, in voxels. Volumes smaller than a window are padded with zeros, as in training (to the voxel: a network with
            strides is not indifferent to a shift), and cropped back.
        overlap: Share of a window that the next one covers again, in [0, 1).
        blending: ``"gaussian"`` weighs the middle of a window more than its border; ``"constant"`` weighs all alike.
        batch_size: Windows that go through the network together.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> import torch
        >>> window = SlidingWindow((8, 8, 8))
        >>> probs = window(nn.Conv3d(1, 3, 1), torch.zeros(1, 1, 12, 9, 8))
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
    ) -> None:
        check_choice("blending", blending, BLENDING)
        check_positive("batch_size", batch_size)
        if not patch_size:
            raise ValueError("Expected `patch_size` to have one number per spatial axis, but got none.")
        for side in patch_size:
            check_positive("patch_size", side)
        if not 0 <= overlap < 1:
            raise ValueError(f"Expected `overlap` in [0, 1), but got {overlap}.")
        self.patch_size = tuple(patch_size)
        self.overlap = overlap
        self.blending = blending
        self.batch_size = batch_size

    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        """Probabilities of a volume.

        Args:
            model: Network from ``(N, C_in, *patch)`` to logits ``(N, C, *patch)``, in evaluation mode.
            image: ``(N, C_in, *spatial)``.

        Returns:
            ``(N, C, *spatial)``, float32, in [0, 1], summing to 1 over C.

        Raises:
            ValueError: If the volume has other spatial dims than the windows.
        """
        (probs,) = self._blended(model, image, lambda logits: (logits.softmax(dim=1),))
        # A weighted mean of distributions sums to 1 up to rounding, which the Gaussian's small weights can make visible.
        return probs / probs.sum(dim=1, keepdim=True)

    def with_logits(self, model: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of a volume, and the windows' logits averaged with the same weights, both ``(N, C, *spatial)``, from one pass.

        The logits are for what is stated on logits themselves. Their softmax is not the probabilities where windows disagree.
        """
        probs, logits = self._blended(model, image, lambda logits: (logits.softmax(dim=1), logits))
        return probs / probs.sum(dim=1, keepdim=True), logits

    def _blended(self, model: nn.Module, image: Tensor, outputs: Callable[[Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
        spatial_dims = len(self.patch_size)
        if image.ndim != spatial_dims + 2:
            raise ValueError(f"Expected `image` of shape (N, C, *spatial) with {spatial_dims} spatial dims, but got {tuple(image.shape)}.")

        def predict(patch: Tensor) -> tuple[Tensor, ...]:
            return outputs(full_resolution(model(patch.to(image.dtype)), spatial_dims).float())

        spatial = image.shape[2:]
        missing = [max(p - n, 0) for p, n in zip(self.patch_size, spatial, strict=True)]
        before = [(m + 1) // 2 for m in missing]
        padding = [side for b, m in zip(reversed(before), reversed(missing), strict=True) for side in (b, m - b)]  # torch counts axes from the last
        # In single precision whatever the network computes in: MONAI adds up in the type of the volume.
        padded = F.pad(plain(image).float(), padding)
        results = sliding_window_inference(padded, self.patch_size, self.batch_size, predict, overlap=self.overlap, mode=self.blending)
        inside = [slice(b, b + n) for b, n in zip(before, spatial, strict=True)]
        # MONAI returns a tuple of one as its only item.
        return [result[(slice(None), slice(None), *inside)] for result in ([results] if isinstance(results, Tensor) else results)]
