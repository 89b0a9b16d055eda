"""How images of a kind are customarily predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from densecal.inference.inferer import Inferer
from densecal.inference.sliding_window import SlidingWindow
from densecal.inference.whole_image import WholeImage

__all__ = ["customary_inferer"]


def customary_inferer(
    patch_size: Sequence[int],
    *,
    multiple: int | Sequence[int] = 32,
    overlap: float = 0.5,
    blending: Literal["gaussian", "constant"] = "gaussian",
    batch_size: int = 4,
    flip_axes: Sequence[int] = (),
    scales: Sequence[float] = (1.0,),
) -> Inferer:
    """Images in one piece, volumes window by window.

    Args:
        patch_size: What the network is trained on, in pixels per axis: two numbers for images, three for volumes.
        multiple: Of images; see :class:`WholeImage`.
        overlap: Of volumes; see :class:`SlidingWindow`.
        blending: Of volumes.
        batch_size: Of volumes.
        flip_axes: Spatial axes that are flipped; see :class:`Inferer`.
        scales: Factors by which the image is resized.

    Example:
        >>> type(customary_inferer((256, 256))).__name__, type(customary_inferer((48, 64, 48))).__name__
        ('WholeImage', 'SlidingWindow')
    """
    if len(patch_size) == 2:
        return WholeImage(2, multiple=multiple, flip_axes=flip_axes, scales=scales)
    return SlidingWindow(patch_size, overlap=overlap, blending=blending, batch_size=batch_size, flip_axes=flip_axes, scales=scales)
