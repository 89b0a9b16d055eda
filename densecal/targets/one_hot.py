"""The labels as they are. The only place that knows what ``ignore_index`` means and which shapes a label may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from densecal.checks import check_choice, may_look, plain
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.registry import TARGETS
from densecal.targets.base import Recipe, SoftTarget, Target, Uniform

__all__ = ["LabelMap", "OneHotTarget", "align_label", "make_target", "one_hot_target", "spatial_dims_of"]


def one_hot_target(
    label: Tensor,
    num_classes: int,
    *,
    activation: Activation = "softmax",
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    spatial_dims: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> SoftTarget:
    r"""The labels as a distribution: all of a pixel's share on its class, or soft labels unchanged.

    Args:
        label: One of

            - a label map ``(N, *spatial)`` or ``(N, 1, *spatial)`` of any integer type, classes in [0, C) or ``ignore_index``, 1 to 3 spatial dims;
            - the same as floating ``(N, 1, *spatial)`` with C > 1 (MONAI's habit);
            - soft labels ``(N, C, *spatial)``, floating: a distribution over C under softmax, each entry in [0, 1] under sigmoid;
            - under sigmoid, regions ``(N, C, *spatial)`` of 0 and 1, any integer type.

        num_classes: Number of classes or regions C, at least 2 under softmax.
        activation: ``"softmax"`` for exclusive classes, ``"sigmoid"`` for regions.
        ignore_index: Label of pixels to leave out. Where labels have C channels a pixel is left out when any of its entries equals it and, under
            softmax, also when all of them are 0, so that zero padding is left out.
        spatial_dims: Number of spatial axes. By default an axis 1 of size 1 or, for floating labels, C, is the channel axis.
        dtype: Floating type of the distribution.

    Returns:
        Target whose ``probs`` are ``(N, C, *spatial)``.

    Raises:
        TypeError: If ``label`` is complex.
        ValueError: If the shape fits none of these or, on a CPU, a label is neither a class nor ``ignore_index``. On a GPU that check would stall the
            device; there a kernel makes NaN of that pixel, and PyTorch's own index assertion stops the run.

    Example:
        >>> one_hot_target(torch.tensor([[0, 2, -100]]), num_classes=3).probs[0]
        tensor([[1., 0., 0.],
                [0., 0., 0.],
                [0., 1., 0.]])
    """
    return make_target(label, num_classes, Uniform(), activation=activation, ignore_index=ignore_index, spatial_dims=spatial_dims, dtype=dtype)


def make_target(
    label: Tensor,
    num_classes: int,
    recipe: Recipe,
    *,
    activation: Activation = "softmax",
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    spatial_dims: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> SoftTarget:
    """Interpret labels once: which class, which pixels count. Arguments as :func:`one_hot_target`, and the recipe of the distribution."""
    check_choice("activation", activation, ("softmax", "sigmoid"))
    if activation == "softmax" and num_classes < 2:
        raise ValueError(
            f"Expected at least 2 classes under softmax, but got {num_classes}. For a single foreground channel use activation='sigmoid'."
        )
    label = plain(label)
    label = _with_channel(label, spatial_dims_of(label, num_classes) if spatial_dims is None else spatial_dims)
    if activation == "softmax" and label.shape[1] == 1:
        labels = LabelMap(label.squeeze(1), num_classes, ignore_index)
        return SoftTarget(labels=labels, soft_labels=None, valid=None, num_classes=num_classes, recipe=recipe, dtype=dtype)
    soft_labels, valid = _read_channels(label, num_classes, activation, ignore_index, dtype)
    return SoftTarget(
        labels=None,
        soft_labels=soft_labels,
        valid=valid,
        num_classes=num_classes,
        recipe=recipe,
        activation=activation,
        hard=not label.is_floating_point(),
        dtype=dtype,
    )


class LabelMap:
    """Labels as they came, and what they say: the class of each pixel, and which pixels count.

    Both are made when somebody asks: who reads the labels themselves spares the memory. On a CPU they are checked at once.

    Args:
        given: ``(N, *spatial)``, of any integer type, or whole numbers of a floating one.
        num_classes: Number of classes C.
        ignore_index: Label of pixels to leave out.

    Raises:
        ValueError: If, on a CPU, a label is neither a class nor ``ignore_index``.

    Example:
        >>> labels = LabelMap(torch.tensor([[0, 2, 255]], dtype=torch.uint8), 3, 255)
        >>> labels.classes, labels.valid
        (tensor([[0, 2, 0]]), tensor([[ True,  True, False]]))
    """

    def __init__(self, given: Tensor, num_classes: int, ignore_index: int) -> None:
        self.given = given
        self.ignore_index = ignore_index
        self._num_classes = num_classes
        self._read: tuple[Tensor, Tensor] | None = None
        if may_look(given) and not _are_known(given, num_classes, ignore_index):
            self._read = _read_label_map(given, num_classes, ignore_index)

    @property
    def classes(self) -> Tensor:
        """``(N, *spatial)``, int64, 0 where not valid."""
        return self._once()[0]

    @property
    def valid(self) -> Tensor:
        """``(N, *spatial)``, bool."""
        return self._once()[1]

    def _once(self) -> tuple[Tensor, Tensor]:
        if self._read is None:
            self._read = _read_label_map(self.given, self._num_classes, self.ignore_index)
        return self._read


def spatial_dims_of(label: Tensor, num_classes: int) -> int:
    """Number of spatial axes of labels on their own: axis 1 is the channel axis where it has size 1 or the labels are floating.

    Integers with ``num_classes`` channels are regions only where a loss says so by its logits; on their own, axis 1 counts as spatial.
    """
    channel = label.ndim > 2 and (label.shape[1] == 1 or (label.is_floating_point() and label.shape[1] == num_classes))
    return label.ndim - (2 if channel else 1)


def align_label(label: Tensor, logits: Tensor) -> Tensor:
    """Check labels against the logits they belong to and give them a channel axis: ``(N, 1, *spatial)`` or ``(N, C, *spatial)``.

    Raises:
        ValueError: If batch or spatial shape differ, with the repair.

    Example:
        >>> align_label(torch.zeros(2, 8, 8, dtype=torch.long), torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """
    label = plain(label)
    n, c, *spatial = logits.shape
    if list(label.shape) == [n, *spatial] and not (label.is_floating_point() and c > 1):
        return label.unsqueeze(1)
    if label.ndim == logits.ndim and [label.shape[0], *label.shape[2:]] == [n, *spatial] and label.shape[1] in (1, c):
        return label
    kind = "floating" if label.is_floating_point() else "integer"
    expected = f"(N, *spatial) = {(n, *spatial)}, {(n, 1, *spatial)}" + (f" or soft labels {(n, c, *spatial)}" if c > 1 else "")
    if list(label.shape) == [n, *spatial]:
        hint = "Give floating labels a channel axis with `target.unsqueeze(1)`, or make a label map integer with `target.long()`."
    elif list(label.shape[-len(spatial) :]) != spatial:
        hint = "Resample the logits or the target so that their spatial shapes agree."
    else:
        hint = f"Expected 1 or {c} channels and {n} images."
    raise ValueError(f"Expected `target` of shape {expected} for logits {tuple(logits.shape)}, but got {kind} {tuple(label.shape)}. {hint}")


@TARGETS.register("one_hot")
class OneHotTarget(Target):
    """The labels as they are; soft labels unchanged. See :func:`one_hot_target`.

    Args:
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label to leave out.

    Example:
        >>> OneHotTarget()(torch.tensor([[1, 0]]), 2).probs[0, 1]
        tensor([1., 0.])
    """

    def forward(
        self,
        label: Tensor,
        num_classes: int,
        *,
        spatial_dims: int | None = None,
        dtype: torch.dtype = torch.float32,
        context: Mapping[str, Any] | None = None,
    ) -> SoftTarget:
        return one_hot_target(label, num_classes, activation=self.activation, ignore_index=self.ignore_index, spatial_dims=spatial_dims, dtype=dtype)


def _with_channel(label: Tensor, spatial_dims: int) -> Tensor:
    if label.is_complex():
        raise TypeError(f"Expected integer or floating labels, but got {label.dtype}.")
    if not 1 <= spatial_dims <= 3 or label.ndim not in (spatial_dims + 1, spatial_dims + 2):
        raise ValueError(f"Expected labels with 1 to 3 spatial dimensions, (N, *spatial) or (N, channels, *spatial), but got {tuple(label.shape)}.")
    return label.unsqueeze(1) if label.ndim == spatial_dims + 1 else label


def _are_known(label: Tensor, num_classes: int, ignore_index: int) -> bool:
    """Whether integers are classes or ``ignore_index``, without a copy in another type."""
    if label.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64) or label.numel() == 0:
        return False
    low, high = (int(value) for value in label.aminmax())
    if low >= 0 and high < num_classes:
        return True
    bounds = torch.iinfo(label.dtype)
    if not bounds.min <= ignore_index <= bounds.max:  # compared with such a number, an integer type would wrap it
        return False
    return not bool((((label < 0) | (label >= num_classes)) & (label != ignore_index)).any())


def _read_label_map(label: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    classes = label.to(torch.int64)
    if may_look(label) and label.is_floating_point() and not torch.equal(classes.to(label.dtype), label):
        raise ValueError(
            f"Expected whole class numbers in a floating label map of one channel under {num_classes} classes, but got fractions or non-finite values. "
            f"Soft labels have {num_classes} channels."
        )
    valid = classes != ignore_index
    label_map = classes if may_look(valid) and bool(valid.all()) else torch.where(valid, classes, 0)
    if may_look(label) and label_map.numel():
        low, high = (int(v) for v in label_map.aminmax())
        if low < 0 or high >= num_classes:
            found = label_map[(label_map < 0) | (label_map >= num_classes)].unique().tolist()
            raise ValueError(
                f"Expected labels in 0 to {num_classes - 1} or ignore_index={ignore_index}, but got {found[:8]}. "
                f"Set `ignore_index={found[-1]}` if that marks pixels without a class, or map the labels to 0 to {num_classes - 1}."
            )
    return label_map, valid


def _read_channels(label: Tensor, num_classes: int, activation: Activation, ignore_index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if label.shape[1] != num_classes:
        hint = "Stack one 0/1 map per region along axis 1." if activation == "sigmoid" else f"Soft labels have one channel per class, {num_classes}."
        raise ValueError(f"Expected labels with {num_classes} channels under {activation}, but got shape {tuple(label.shape)}. {hint}")
    if activation == "softmax" and not label.is_floating_point():
        raise ValueError(
            f"Expected an integer label map (N, *spatial) or (N, 1, *spatial), but got {label.dtype} of shape {tuple(label.shape)}. "
            "Pass one-hot labels as floating, with `target.float()`, or as classes, with `target.argmax(1)`."
        )
    if 0 <= ignore_index <= 1 and label.is_floating_point():
        raise ValueError(f"Expected `ignore_index` outside [0, 1] for soft labels, whose entries it would otherwise match, but got {ignore_index}.")
    # Integers are compared as integers: 255 and -100 are exact in every floating type as well, other marks may not be.
    ignored = ((label if label.is_floating_point() else label.to(torch.int64)) == ignore_index).any(dim=1)
    soft_labels = label.to(dtype)
    if activation == "softmax":
        ignored = ignored | (soft_labels == 0).all(dim=1)
    valid = ~ignored
    soft_labels = torch.where(valid.unsqueeze(1), soft_labels, 0.0)
    if may_look(label):
        low, high = (float(v) for v in soft_labels.detach().aminmax()) if soft_labels.numel() else (0.0, 0.0)
        if not (low >= -1e-4 and high <= 1 + 1e-2):
            raise ValueError(
                f"Expected label entries in [0, 1] or ignore_index={ignore_index}, but got values from {low:g} to {high:g}. "
                "Divide soft labels by their sum over axis 1, or set `ignore_index` to the mark of pixels to leave out."
            )
    return soft_labels, valid
