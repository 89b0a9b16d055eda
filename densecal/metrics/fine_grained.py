"""Overlap in three senses, and of the worst images: over the data set, per image, and per class over the images that have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.metrics.inputs import read_pixels
from densecal.metrics.overlap import check_classes, dice_from_counts, jaccard_from_counts, overlap_counts
from densecal.ops.activation import Activation
from densecal.registry import METRICS

__all__ = ["FINE_GRAINED_DEFINITIONS", "FineGrainedOverlap", "fine_grained_overlap", "sense_sums", "senses_from_sums"]

_SCORES = {
    "accuracy": "share of a class's reference pixels that are predicted as it",
    "iou": "intersection over union of a class",
    "dice": "Dice of a class",
}
_WORST_MEAN = tuple(range(10, 101, 10))


def _definitions() -> dict[str, str]:
    texts = {"accuracy_pooled": "Share of the reference pixels of all counted classes together that are predicted as what they are."}
    for key, text in _SCORES.items():
        image = f"{text}, averaged over the classes that an image's reference has"
        by_class = f"{text}, per image whose reference has it"
        texts[f"{key}_dataset"] = f"{text}, from counts summed over all images, then averaged over the classes that occur in a reference."
        texts[f"{key}_image"] = f"{image}, then over images."
        texts[f"{key}_image_worst"] = f"{image}, then over the worst {{worst_percent}} % of the images."
        texts[f"{key}_image_worst_mean"] = f"{image}, then over the worst q % of the images, then over q = 10, 20, ..., 100."
        texts[f"{key}_class"] = f"{by_class}, averaged over those images, then over classes."
        texts[f"{key}_class_worst"] = f"{by_class}, averaged over the worst {{worst_percent}} % of those images, then over classes."
        texts[f"{key}_class_worst_mean"] = (
            f"{by_class}, averaged over the worst q % of those images, then over classes, then over q = 10, 20, ..., 100."
        )
    texts["iou_dataset/<class>"] = "intersection over union of one class, from counts summed over all images."
    return {key: text[0].upper() + text[1:] for key, text in texts.items()}


FINE_GRAINED_DEFINITIONS: dict[str, str] = _definitions()
"""One sentence per number of :func:`fine_grained_overlap`, and for the IoU of one class over the data set; ``{worst_percent}`` is to be filled in."""


def fine_grained_overlap(
    intersection: Tensor, predicted: Tensor, reference: Tensor, *, background: int | None = None, worst_percent: int = 10
) -> dict[str, Tensor]:
    """Accuracy, IoU and Dice over the data set (D), per image (I) and per class over its images (C), and of the worst images.

    Summed over a data set, large objects hide small ones and good images hide bad ones. Averaged per image, every image counts the same; per class, every
    class does; the worst images say what to expect on a bad day.

    A class counts in an image where the image's reference has it. Predicted where it is not, it lowers the score of the classes that it covers, and its own in
    the data set's sense. The worst q % of m images are the floor(m q / 100) lowest, at least one.

    Args:
        intersection: Pixels in the intersection per image and class, ``(N, C)``, as :func:`densecal.metrics.overlap.overlap_counts` counts them.
        predicted: Pixels in the prediction, ``(N, C)``.
        reference: Pixels in the reference, ``(N, C)``.
        background: Class to leave out, or None: natural images have none.
        worst_percent: q of the ``_worst`` numbers, a whole number of 1 to 100.

    Returns:
        For each of ``"accuracy"``, ``"iou"`` and ``"dice"`` the mean ``<score>_dataset``, ``<score>_image``, ``<score>_image_worst``,
        ``<score>_image_worst_mean`` (over q = 10, 20, ..., 100), ``<score>_class``, ``<score>_class_worst`` and ``<score>_class_worst_mean``; and
        ``"accuracy_pooled"``. Float64 scalars in [0, 1]; NaN where nothing is counted. A class that no reference has is skipped.

    Raises:
        ValueError: If shapes differ, ``background`` is not a class or ``worst_percent`` is out of range.

    Reference:
        Wang et al., "Revisiting Evaluation Metrics for Semantic Segmentation: Optimization and Evaluation of Fine-grained Intersection over Union",
        NeurIPS 2023, arXiv:2310.19252. Differs from the code: a class that never occurs is skipped, there it makes means NaN or 2.5e7; of two classes the code
        counts the foreground alone in D and I, and both in C: here ``background`` decides for all three.

    Example:
        Two images, one class; half of the first is found, all of the second:

        >>> counts = torch.tensor([[1], [8]]), torch.tensor([[1], [8]]), torch.tensor([[2], [8]])
        >>> numbers = fine_grained_overlap(*counts)
        >>> [round(numbers[f"iou_{sense}"].item(), 3) for sense in ("dataset", "image", "image_worst", "image_worst_mean")]
        [0.9, 0.75, 0.5, 0.525]
    """
    if not (intersection.ndim == 2 and intersection.shape == predicted.shape == reference.shape):
        shapes = ", ".join(str(tuple(counts.shape)) for counts in (intersection, predicted, reference))
        raise ValueError(f"Expected `intersection`, `predicted` and `reference` of one shape (N, C), but got {shapes}.")
    if worst_percent not in range(1, 101):
        raise ValueError(f"Expected `worst_percent` to be a whole number of 1 to 100, but got {worst_percent}.")
    num_classes = reference.shape[1]
    if background is not None:
        if not 0 <= background < num_classes:
            raise ValueError(f"Expected `background` to be a class of 0 to {num_classes - 1} or None, but got {background}.")
        keep = [c for c in range(num_classes) if c != background]
        intersection, predicted, reference = (counts[:, keep] for counts in (intersection, predicted, reference))

    numbers = senses_from_sums(*(one.sum(0) for one in sense_sums(intersection, predicted, reference)))
    for key, score in _FROM_COUNTS.items():
        per_class = torch.where(reference > 0, score(intersection, predicted, reference), torch.nan)  # (N, C)
        for sense, values in (("image", per_class.nanmean(1)), ("class", per_class)):
            numbers[f"{key}_{sense}_worst"] = _mean_of_worst(values, worst_percent)
            numbers[f"{key}_{sense}_worst_mean"] = torch.stack([_mean_of_worst(values, q) for q in _WORST_MEAN]).mean()
    return numbers


def sense_sums(intersection: Tensor, predicted: Tensor, reference: Tensor) -> tuple[Tensor, ...]:
    """What each image adds to the numbers of the three senses: they are functions of the sums over images, and a bootstrap draws them anew.

    Args:
        intersection: Pixels in the intersection per image and counted class, ``(N, K)``.
        predicted: Pixels in the prediction, ``(N, K)``.
        reference: Pixels in the reference, ``(N, K)``.

    Returns:
        The three, then which classes are there ``(N, K)`` and whether any is ``(N,)``, then for each score its values ``(N, K)`` and their mean over the
        classes that are there ``(N,)``; all float64, 0 where undefined.
    """
    there = reference > 0
    sums = [intersection, predicted, reference, there, there.any(1)]
    for score in _FROM_COUNTS.values():
        per_class = torch.where(there, score(intersection, predicted, reference), torch.nan)
        sums += [per_class.nan_to_num(), per_class.nanmean(1).nan_to_num()]
    return tuple(one.double() for one in sums)


def senses_from_sums(intersection: Tensor, predicted: Tensor, reference: Tensor, there: Tensor, images: Tensor, *values: Tensor) -> dict[str, Tensor]:
    """``"accuracy_pooled"`` and ``<score>_dataset``, ``<score>_image`` and ``<score>_class`` from sums over images of :func:`sense_sums`: ``(*rest, K)`` and
    ``(*rest,)`` give ``(*rest,)``."""
    numbers = {"accuracy_pooled": intersection.sum(-1) / reference.sum(-1)}
    for (key, score), per_class, per_image in zip(_FROM_COUNTS.items(), values[::2], values[1::2], strict=True):
        numbers[f"{key}_dataset"] = torch.where(reference > 0, score(intersection, predicted, reference), torch.nan).nanmean(-1)
        numbers[f"{key}_image"] = per_image / images
        numbers[f"{key}_class"] = (per_class / there).nanmean(-1)
    return numbers


@METRICS.register("fine_grained_overlap")
class FineGrainedOverlap(Metric):
    """Accuracy, IoU and Dice over the data set, per image, per class, and of the worst images. See :func:`fine_grained_overlap`.

    The state is three counts per image and class. Each row of a batch is one whole image.

    Args:
        num_classes: Number of classes C, background included, or of regions.
        background: Class to leave out, or None.
        worst_percent: q of the ``_worst`` numbers, a whole number of 1 to 100.
        ignore_index: Label of pixels to leave out.
        activation: ``"softmax"`` for exclusive classes, ``"sigmoid"`` for regions that may overlap.
        validate_args: Look at the values too; that waits for a GPU.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``activation`` is unknown, there are fewer than two classes (one region), ``background`` is none of them or ``worst_percent`` is out of
            range.

    Example:
        >>> metric = FineGrainedOverlap(2)
        >>> metric.update(torch.tensor([[[0.9, 0.8, 0.3], [0.1, 0.2, 0.7]]]), torch.tensor([[0, 1, 1]]))
        >>> metric.compute()["iou_image"], metric.count
        (tensor(0.5000, dtype=torch.float64), tensor(1))
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    counts: list[Tensor]

    def __init__(
        self,
        num_classes: int,
        *,
        background: int | None = None,
        worst_percent: int = 10,
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        activation: Activation = "softmax",
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_classes(num_classes, background, activation)
        if worst_percent not in range(1, 101):
            raise ValueError(f"Expected `worst_percent` to be a whole number of 1 to 100, but got {worst_percent}.")
        self.num_classes = num_classes
        self.background = None if activation == "sigmoid" else background
        self.worst_percent = worst_percent
        self.ignore_index = ignore_index
        self.activation: Activation = activation
        self.validate_args = validate_args
        self.add_state("counts", [], dist_reduce_fx="cat")

    def update(self, probs: Tensor, label: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch of whole images: probabilities ``(N, C, *spatial)``, labels and an optional mask ``(N, *spatial)``."""
        pixels = read_pixels(probs, label, mask, ignore_index=self.ignore_index, activation=self.activation, validate_args=self.validate_args)
        if pixels.num_classes != self.num_classes:
            raise ValueError(f"Expected `probs` with {self.num_classes} classes, but got {pixels.num_classes}.")
        self.counts.append(torch.stack(overlap_counts(pixels), dim=1))

    def compute(self) -> dict[str, Tensor]:
        """The numbers by name, float64 scalars; NaN where nothing counted."""
        intersection, predicted, reference = self._all_counts().unbind(1)
        return fine_grained_overlap(intersection, predicted, reference, background=self.background, worst_percent=self.worst_percent)

    @property
    def count(self) -> Tensor:
        """Number of images."""
        return torch.tensor(len(self._all_counts()), device=self.device)

    def _all_counts(self) -> Tensor:
        return dim_zero_cat(self.counts) if len(self.counts) else torch.zeros(0, 3, self.num_classes, dtype=torch.int64, device=self.device)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # A rank without an image takes part in the gathering with no rows of the right width; torchmetrics would send a single-precision vector.
        self.counts = [self._all_counts()]
        super()._sync_dist(*args, **kwargs)


def _recall_from_counts(intersection: Tensor, predicted: Tensor, reference: Tensor) -> Tensor:
    return intersection.double() / reference


_FROM_COUNTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "accuracy": _recall_from_counts,
    "iou": jaccard_from_counts,
    "dice": dice_from_counts,
}


def _mean_of_worst(values: Tensor, percent: int) -> Tensor:
    """Mean of the lowest ``percent`` % along axis 0 (at least one), NaN left out; then over columns."""
    if not len(values):
        return values.sum() / 0
    ordered = values.sort(dim=0).values  # NaN last
    number = ((~values.isnan()).sum(0) * percent // 100).clamp(min=1)
    worst = ordered.cumsum(0).gather(0, (number - 1).unsqueeze(0)).squeeze(0) / number
    return worst.nanmean()
