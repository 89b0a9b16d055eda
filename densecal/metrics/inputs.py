"""Probabilities and labels as every metric reads them: checked once, flat in space, with one mask of the pixels that count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densecal.checks import may_look, plain
from densecal.ops.activation import Activation
from densecal.ops.backend import Backend, NotCovered, say_once, why_not_triton
from densecal.ops.binning import Bins
from densecal.ops.calibration_bins import CalibrationKind, calibration_bins, is_top_label
from densecal.targets.one_hot import LabelMap, align_label, one_hot_target

__all__ = ["NLL_FLOOR", "Pixels", "read_label_bins", "read_pixels"]

NLL_FLOOR = 1e-12
"""Probabilities below this count as this much in a logarithm, so that one certain mistake does not make a mean infinite: it costs 27.6 nats."""


@dataclass(frozen=True)
class Pixels:
    """What a metric needs of a batch of N cases with P pixels each.

    A sigmoid channel p is two classes, absent (1 - p) and present (p), and R overlapping regions are R such questions asked of every pixel: then there are two
    classes and P is R times the number of pixels, one region after the other. So a binary network counts the same with one sigmoid or two softmax channels.

    Args:
        probs: ``(N, C, P)``, float32 or float64.
        label_map: Classes ``(N, P)``, int64, 0 where not valid; the largest share where the reference is soft.
        soft_labels: Shares ``(N, C, P)`` of a soft reference, else ``None``.
        valid: False where a pixel does not count, ``(N, P)``, bool.
        num_regions: R for sigmoid channels, else ``None``.
        largest: Largest probability ``(N, P)`` where it is known already.
    """

    probs: Tensor
    label_map: Tensor
    soft_labels: Tensor | None
    valid: Tensor
    num_regions: int | None = None
    largest: Tensor | None = None

    @property
    def num_classes(self) -> int:
        """Classes C, or regions: the number of channels that came in."""
        return self.num_regions or self.probs.shape[1]

    def top_label(self) -> tuple[Tensor, Tensor, Tensor]:
        """Confidence, predicted class, and the reference's share of that class (bool for hard labels), each ``(N, P)``. The first of tied classes wins."""
        confidence, prediction = _largest(self.probs)
        if self.soft_labels is None:
            return confidence, prediction, prediction == self.label_map
        return confidence, prediction, self.soft_labels.gather(1, prediction.unsqueeze(1)).squeeze(1)

    def confidence(self) -> tuple[Tensor, Tensor]:
        """Confidence and the reference's share of the predicted class as :meth:`top_label`, without the class, which takes a CPU several times longer."""
        if self.soft_labels is not None or not may_look(self.probs):
            confidence, _, correct = self.top_label()
            return confidence, correct
        confidence = self.probs.amax(1) if self.largest is None else self.largest
        return confidence, is_top_label(self.probs, self.label_map, confidence, confidence=confidence)

    def shares(self) -> Tensor:
        """The reference's share of every class, ``(N, C, P)``; bool for hard labels."""
        if self.soft_labels is not None:
            return self.soft_labels
        return self.label_map.unsqueeze(1) == torch.arange(self.probs.shape[1], device=self.probs.device).view(1, -1, 1)

    def per_class(self) -> tuple[Tensor, Tensor, Tensor]:
        """Probability and the reference's share of each class, or region, ``(N, K, P)`` with K of ``num_classes``, and where they count, of a shape that
        broadcasts to it."""
        if self.num_regions is None:
            return self.probs, self.shares(), self.valid.unsqueeze(1)
        shape = (len(self.probs), self.num_regions, -1)
        present = self.label_map == 1 if self.soft_labels is None else self.soft_labels[:, 1]
        return self.probs[:, 1].view(shape), present.reshape(shape), self.valid.view(shape)

    def negative_log_likelihood(self) -> Tensor:
        """Cross-entropy in nats per pixel, ``(N, P)``, 0 where not valid."""
        log_probs = self.probs.clamp(min=NLL_FLOOR).log()
        soft = self.soft_labels
        values = log_probs.gather(1, self.label_map.unsqueeze(1)).squeeze(1) if soft is None else (soft * log_probs).sum(1)
        return torch.where(self.valid, -values, 0.0)

    def brier(self) -> Tensor:
        """Squared distance to the reference summed over classes, in [0, 2], per pixel, ``(N, P)``, 0 where not valid."""
        return torch.where(self.valid, (self.probs - self.shares().to(self.probs.dtype)).square().sum(1), 0.0)


def read_pixels(
    probs: Tensor,
    label: Tensor,
    mask: Tensor | None = None,
    *,
    ignore_index: int,
    activation: Activation = "softmax",
    validate_args: bool = True,
) -> Pixels:
    """Check a batch and bring it into one form.

    Args:
        probs: Probabilities ``(N, C, *spatial)``, floating, 1 to 3 spatial dims; C at least 2 for exclusive classes.
        label: Label map ``(N, *spatial)`` or ``(N, 1, *spatial)``, or a soft reference ``(N, C, *spatial)``, floating. In a soft reference a pixel is
            ignored where any of its entries is ``ignore_index`` or, for exclusive classes, all of them are 0. For regions 0 and 1, or shares, ``(N, C, *spatial)``.
        mask: True where a pixel counts, ``(N, *spatial)``, bool. By default every pixel that is not ignored.
        ignore_index: Label of pixels to leave out.
        activation: What made the probabilities: ``"softmax"``, exclusive classes, or ``"sigmoid"``, one or several regions that may overlap.
        validate_args: Look at the values too: probabilities in [0, 1] that sum to 1, labels that are classes. That waits for a GPU.

    Returns:
        The batch, flat in space.

    Raises:
        TypeError: If ``probs`` is not floating or ``mask`` not bool.
        ValueError: If shapes do not fit or, with ``validate_args``, values are out of range.

    Example:
        >>> pixels = read_pixels(torch.full((1, 2, 3), 0.5), torch.tensor([[0, 1, -100]]), ignore_index=-100)
        >>> pixels.valid
        tensor([[ True,  True, False]])
    """
    probs, label, mask = _check_batch(probs, label, mask)
    if validate_args and probs.device.type != "cpu" and activation == "softmax":
        _check_label_map(label, probs.shape[1], ignore_index)
    dtype = torch.float64 if probs.dtype == torch.float64 else torch.float32
    target = one_hot_target(label, probs.shape[1], activation=activation, ignore_index=ignore_index, spatial_dims=probs.ndim - 2, dtype=dtype)
    valid = target.valid if mask is None else target.valid & mask
    valid = valid.flatten(1)
    probs = probs.detach().flatten(2).to(dtype)
    largest = _check_probs(probs, valid, exclusive=activation == "softmax") if validate_args else None
    if activation == "sigmoid":
        return _regions(probs, target.one_hot.flatten(2), valid, hard=target.hard)
    if target.label_map is not None:
        return Pixels(probs, target.label_map.flatten(1), None, valid, largest=largest)
    soft_labels = target.one_hot.flatten(2)
    return Pixels(probs, soft_labels.argmax(1), soft_labels, valid)


def read_label_bins(
    values: Tensor,
    label: Tensor,
    mask: Tensor | None = None,
    *,
    num_bins: int,
    kind: CalibrationKind,
    from_logits: bool,
    threshold: float,
    ignore_index: int,
    backend: Backend,
    validate_args: bool,
) -> tuple[Bins, Tensor] | None:
    """Bins of exclusive classes against a label map in one read of the prediction; None for a soft reference, which others read.

    Args:
        values: Probabilities, or logits, ``(N, C, *spatial)``, floating.
        label: As :func:`read_pixels` takes it.
        mask: Likewise.
        num_bins: As :func:`densecal.ops.calibration_bins` takes it.
        kind: Likewise.
        from_logits: Likewise.
        threshold: Likewise.
        ignore_index: Label of pixels to leave out.
        backend: ``"auto"``: a fused Triton kernel on a GPU, outside of ``torch.compile``. ``"triton"``: that, or an error. ``"torch"``: PyTorch's operations.
        validate_args: Look at the values too, as :func:`read_pixels` does; of logits, whether any that counts is NaN or infinite.

    Returns:
        Bins ``(N, rows, B)``, and the number of pixels that count.

    Raises:
        TypeError: As :func:`read_pixels`.
        ValueError: Likewise; or if ``backend`` is ``"triton"`` and the kernel does not run there.

    Example:
        >>> bins, count = read_label_bins(
        ...     torch.full((1, 2, 3), 0.5), torch.tensor([[0, 1, -100]]),
        ...     num_bins=2, kind="top_label", from_logits=False, threshold=0.0, ignore_index=-100, backend="auto", validate_args=True,
        ... )
        >>> bins.count, count
        (tensor([[[2, 0]]]), tensor(2))
    """
    values, label, mask = _check_batch(values, label, mask)
    num_classes = values.shape[1]
    if label.shape[1] != 1 or num_classes < 2:
        return None
    labels = LabelMap(label.squeeze(1), num_classes, ignore_index)
    check = None if from_logits or not validate_args else _ProbabilityCheck(exclusive=True)
    bins, fused = _bins(
        backend,
        values,
        labels.given,
        num_bins=num_bins,
        kind=kind,
        from_logits=from_logits,
        ignore_index=ignore_index,
        mask=mask,
        threshold=threshold,
        look=None if check is None else check.look,
    )

    def valid() -> Tensor:
        return labels.valid if mask is None else labels.valid & mask

    # On a CPU labels were looked at before; the kernel marks what it finds, so that they need no look of their own.
    if validate_args and values.device.type != "cpu" and not (fused and bool(bins.correct.isfinite().all())):
        _check_label_map(label, num_classes, ignore_index)
    if check is not None and not check.fits():
        _refuse_probs(values.detach().flatten(2).float(), valid().flatten(1), exclusive=True)
    if from_logits and validate_args and not bool(bins.confidence.isfinite().all()):
        raise ValueError("Expected finite logits where labels count, but got NaN or infinity. Look for them in the model's output.")
    return bins, bins.count[:, 0].sum() if threshold == 0 else torch.count_nonzero(valid())


def _bins(backend: Backend, values: Tensor, labels: Tensor, **options: Any) -> tuple[Bins, bool]:
    """The bins, and whether a kernel filled them."""
    if backend == "triton" or (backend == "auto" and values.is_cuda and not torch.compiler.is_compiling()):
        reason = why_not_triton(values.device)
        if reason is None:
            from densecal.ops.triton import calibration_bins as kernels

            try:
                return kernels.calibration_bins(values, labels, **options), True
            except NotCovered as uncovered:
                reason = str(uncovered)
        if backend == "triton":
            raise ValueError(f"Expected bins that a Triton kernel computes, for backend='triton', but {reason}. Use backend='auto' or 'torch'.")
        say_once(reason)
    return calibration_bins(values, labels, **options), False


def _check_batch(probs: Tensor, label: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Plain tensors whose shapes and types fit, the label with a channel axis."""
    probs, label = plain(probs), plain(label)
    if not 1 <= probs.ndim - 2 <= 3:
        raise ValueError(f"Expected `probs` of shape (N, C, *spatial) with 1 to 3 spatial dimensions, but got {tuple(probs.shape)}.")
    if not probs.is_floating_point():
        raise TypeError(f"Expected floating `probs`, but got {probs.dtype}.")
    label = align_label(label, probs)
    if mask is not None:
        mask = plain(mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"Expected `mask` of dtype bool, but got {mask.dtype}. Use `mask.bool()`.")
        if mask.shape != label[:, 0].shape:
            raise ValueError(f"Expected `mask` of shape (N, *spatial) = {tuple(label[:, 0].shape)}, but got {tuple(mask.shape)}.")
    return probs, label, mask


def _regions(probs: Tensor, shares: Tensor, valid: Tensor, *, hard: bool) -> Pixels:
    """Regions ``(N, R, P)`` as pixels of two classes."""
    present, share = probs.flatten(1), shares.flatten(1)
    soft_labels = None if hard else torch.stack([1 - share, share], dim=1)
    return Pixels(torch.stack([1 - present, present], dim=1), (share > 0.5).long(), soft_labels, valid.repeat(1, probs.shape[1]), probs.shape[1])


def _check_label_map(label: Tensor, num_classes: int, ignore_index: int) -> None:
    if label.shape[1] == 1:
        outside = label[(label != ignore_index) & ((label < 0) | (label >= num_classes))]
        if outside.numel():
            raise ValueError(
                f"Expected labels in 0 to {num_classes - 1} or ignore_index={ignore_index}, but got {outside.unique().tolist()[:8]}. "
                f"Set `ignore_index` to the mark of pixels without a class, or map the labels to 0 to {num_classes - 1}."
            )


class _ProbabilityCheck:
    """Whether values are probabilities, asked block by block.

    Half precision rounds each probability by up to 4e-3 (bfloat16), so sums are held to what that allows.
    """

    def __init__(self, *, exclusive: bool) -> None:
        self.exclusive, self.most, self.answers = exclusive, 2e-2 if exclusive else 1e-2, list[Tensor]()

    def look(self, block: Tensor, largest: Tensor) -> None:
        """A block ``(N, C, P)`` and the largest of each pixel, ``(N, P)``."""
        low, high = (block.sum(1) if self.exclusive else largest).aminmax()  # comparisons with NaN are False
        self.answers.append((block.amin() >= 0) & (high <= 1 + self.most) & ((low >= 1 - self.most) if self.exclusive else True))

    def fits(self) -> bool:
        return not self.answers or bool(torch.stack(self.answers).all())


def _check_probs(probs: Tensor, valid: Tensor, *, exclusive: bool) -> Tensor | None:
    """Look at every probability; give back the largest of each pixel where it was found on the way, ``(N, P)``."""
    n, _, p = probs.shape
    if not probs.numel():
        return None
    width = max(1, _CHECKED // n) if probs.device.type == "cpu" else p
    largest, check = probs.new_empty(n, p), _ProbabilityCheck(exclusive=exclusive)
    for start in range(0, p, width):
        # What is read once stays in the cache of a CPU for the next two questions.
        block, top = probs[..., start : start + width], largest[:, start : start + width]
        torch.amax(block, 1, out=top)
        check.look(block, top)
    if not check.fits():
        _refuse_probs(probs, valid, exclusive=exclusive)
    return largest


def _refuse_probs(probs: Tensor, valid: Tensor, *, exclusive: bool) -> None:
    """Say what does not fit, unless it is only where it does not count."""
    most = _ProbabilityCheck(exclusive=exclusive).most
    off = (probs.sum(1) - 1).abs() if exclusive else probs.amax(1) - 1
    if bool(((probs.amin(1) >= 0) & (off <= most) | ~valid).all()):
        return
    counted = torch.where(valid.unsqueeze(1), probs, 1.0 / probs.shape[1])
    lowest, highest = (float(v) for v in counted.aminmax())
    expected, repair = ("in [0, 1] that sum to 1 over axis 1", "softmax(1)") if exclusive else ("in [0, 1]", "sigmoid()")
    sums = f" and sums off by up to {float((counted.sum(1) - 1).abs().max()):g}" if exclusive else ""
    raise ValueError(
        f"Expected `probs` {expected}, but got values from {lowest:g} to {highest:g}{sums}. Apply `{repair}` to logits; look for NaN in the model's output."
    )


_CHECKED = 1 << 16
"""Pixels that are checked at a time."""
_BLOCK = 1 << 20
"""Entries that a CPU takes at a time, so that what is computed on the way stays in its cache."""


def _largest(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of each pixel's probabilities ``(N, C, P)`` and the first class that has it, each ``(N, P)``."""
    if probs.device.type != "cpu":
        return probs.max(dim=1)
    # PyTorch searches class by class on a CPU. Here each class number is raised beyond all others by its distance to the largest probability, unless that is 0;
    # the smallest that is left is the first class that has the largest. Sums and minima are more than twice as fast as the search.
    n, c, p = probs.shape
    width = max(1, _BLOCK // max(1, n * c))
    largest, first = probs.new_empty(n, p), torch.empty(n, p, dtype=torch.int64)
    raised = probs.new_empty(n, c, min(p, width))
    classes = torch.arange(c, dtype=probs.dtype).view(1, c, 1)
    for start in range(0, p, width):
        block = probs[..., start : start + width]
        top = block.amax(1)
        place = torch.sub(block, top.unsqueeze(1), out=raised[..., : block.shape[-1]])
        torch.sub(classes, place, alpha=2.0**100, out=place)
        largest[:, start : start + width] = top
        first[:, start : start + width] = place.amin(1).nan_to_num_(0.0)
    return largest, first
