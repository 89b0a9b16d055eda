"""Whole images through a network in one piece."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from densecal.checks import check_positive, per_axis
from densecal.inference.inferer import Inferer, Predict, pad_to

__all__ = ["WholeImage"]


class WholeImage(Inferer):
    """Predict an image in one piece: the network sees all of the context there is, and the image has to fit into memory.

    Args:
        spatial_dims: 2 for images, 3 for volumes; 1 works too.
        multiple: The network takes sides that are a multiple of this, in pixels or voxels, one number or one per axis: the product of its strides. At every
            scale the sides are padded with zeros up to the next multiple, as small images are in training, and the prediction is cropped back.
        flip_axes: Spatial axes that are flipped, counted from 0; of several, every combination is a view. ``(1,)`` mirrors a 2D image left to right.
        scales: Factors by which the image is resized, each with every flip.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> import torch
        >>> whole = WholeImage(2, flip_axes=(1,), scales=(0.5, 1.0, 1.5))  # six views
        >>> probs = whole(torch.nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 50, 75))
        >>> probs.shape, bool((probs.sum(1) - 1).abs().max() < 1e-5)
        (torch.Size([1, 4, 50, 75]), True)
    """

    def __init__(
        self,
        spatial_dims: int,
        *,
        multiple: int | Sequence[int] = 32,
        flip_axes: Sequence[int] = (),
        scales: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__(spatial_dims, flip_axes=flip_axes, scales=scales)
        self.multiple: tuple[int, ...] = per_axis("multiple", multiple, spatial_dims)
        for number in self.multiple:
            check_positive("multiple", number)

    def predict_view(self, predict: Predict, image: Tensor) -> list[Tensor]:
        padded, inside = pad_to(image, [-(-n // m) * m for n, m in zip(image.shape[2:], self.multiple, strict=True)])
        return [result[inside] for result in predict(padded)]
