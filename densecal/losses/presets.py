"""The losses people know by name: each a target and terms, nothing more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.losses.compound import CompoundLoss
from densecal.ops.activation import Activation
from densecal.ops.backend import Backend
from densecal.ops.neighbourhood import Border
from densecal.ops.reduction import Reduction
from densecal.registry import LOSSES
from densecal.schedules import Schedule
from densecal.targets.label_smoothing import LabelSmoothingTarget
from densecal.targets.neighbour_proportions import Neighbours, Unit
from densecal.targets.one_hot import OneHotTarget
from densecal.targets.svls import SVLSTarget
from densecal.terms.base import Term
from densecal.terms.cross_entropy import CrossEntropy
from densecal.terms.erf_gaussian import ErfGaussianPenalty
from densecal.terms.neighbour import NeighbourPenalty
from densecal.terms.overlap import DiceSemimetric, JaccardMetric

__all__ = ["CrossEntropyLoss", "DiceCELoss", "DiceSemimetricLoss", "JaccardMetricLoss", "LabelSmoothingLoss", "NACLLoss", "SVLSLoss"]


@LOSSES.register("ce")
class CrossEntropyLoss(CompoundLoss):
    """Cross-entropy, ``torch.nn.CrossEntropyLoss`` with soft labels, channels of one and ignored pixels done alike.

    Args:
        activation: ``"softmax"``, or ``"sigmoid"`` for binary cross-entropy.
        class_weights: One weight per class; see :class:`densecal.terms.CrossEntropy` for what the mean divides by.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        ignore_index: Label to leave out.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.

    Example:
        >>> import torch
        >>> CrossEntropyLoss()(torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long))
        tensor(1.3863)
    """

    def __init__(
        self,
        *,
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
    ) -> None:
        ce = CrossEntropy(class_weights=class_weights, reduction=reduction)
        super().__init__(OneHotTarget(activation=activation, ignore_index=ignore_index), {"ce": {"weight": 1.0, "term": ce}}, backend=backend)


@LOSSES.register("label_smoothing")
class LabelSmoothingLoss(CompoundLoss):
    """Cross-entropy with label smoothing; equal to PyTorch's ``label_smoothing``, class weights included.

    Args:
        smoothing: Share given away, in [0, 1], or a schedule of it.
        spread: To ``"all"`` classes (PyTorch) or to the ``"others"``.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        ignore_index: Label to leave out.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.

    Example:
        >>> import torch
        >>> logits, label_map = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([[0, 1]])
        >>> LabelSmoothingLoss(smoothing=0.1)(logits, label_map) - torch.nn.functional.cross_entropy(logits, label_map, label_smoothing=0.1)
        tensor(0.)
    """

    def __init__(
        self,
        *,
        smoothing: float | Schedule = 0.1,
        spread: Literal["all", "others"] = "all",
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
    ) -> None:
        target = LabelSmoothingTarget(smoothing=smoothing, spread=spread, activation=activation, ignore_index=ignore_index)
        super().__init__(target, {"ce": {"weight": 1.0, "term": CrossEntropy(class_weights=class_weights, reduction=reduction)}}, backend=backend)


@LOSSES.register("svls")
class SVLSLoss(CompoundLoss):
    """Cross-entropy with spatially varying label smoothing (Islam and Glocker, IPMI 2021), in 1 to 3 dimensions.

    Args:
        kernel_size: Odd side of the window per axis, in pixels.
        sigma: Standard deviation of the neighbours' weights per axis, in ``unit``.
        unit: ``"voxel"``, or ``"mm"``, which needs the side input ``spacing``.
        border: ``"replicate"``, ``"renormalize"`` or ``"zeros"``.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        ignore_index: Label to leave out; it gives no weight to its neighbours.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.

    Example:
        >>> import torch
        >>> logits = torch.randn(2, 3, 8, 8, 8, requires_grad=True)
        >>> SVLSLoss(sigma=2.0)(logits, torch.randint(0, 3, (2, 8, 8, 8))).backward()
    """

    def __init__(
        self,
        *,
        kernel_size: int | Sequence[int] = 3,
        sigma: float | Sequence[float] = 1.0,
        unit: Unit = "voxel",
        border: Border = "replicate",
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
    ) -> None:
        target = SVLSTarget(kernel_size=kernel_size, sigma=sigma, unit=unit, border=border, activation=activation, ignore_index=ignore_index)
        super().__init__(target, {"ce": {"weight": 1.0, "term": CrossEntropy(class_weights=class_weights, reduction=reduction)}}, backend=backend)


@LOSSES.register("nacl")
class NACLLoss(CompoundLoss):
    """Cross-entropy plus the neighbour-aware penalty on the logits (Murugesan et al., MICCAI 2023).

    Args:
        weight: Weight of the penalty, >= 0, or a schedule of it.
        distance: ``"l1"`` or ``"l2"`` (squared).
        acts_on: Penalise the ``"logits"`` or the ``"probs"``.
        kernel: Window of the class shares, any of :class:`densecal.terms.NeighbourPenalty`; those that follow the image need the side input ``image``.
        kernel_size: Odd side of the window per axis, in pixels.
        sigma: Standard deviation of a Gaussian window per axis, in ``unit``.
        intensity_scale: Unit of the differences of intensity, > 0, where the window follows the image.
        unit: ``"voxel"``, or ``"mm"``, which needs the side input ``spacing``.
        border: ``"replicate"``, ``"renormalize"``, or ``"zeros"`` (MONAI's).
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class, of the cross-entropy.
        reduction: ``"mean"``, ``"sum"``, or ``"none"`` for one value per pixel.
        ignore_index: Label to leave out of both.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.
        classes: MONAI's number of classes, held against the logits.
        dim: MONAI's number of spatial dimensions, held against the logits.
        kernel_ops: MONAI's name of ``kernel``: ``"mean"``, or its own ``"gaussian"``, which reads ``sigma`` only and needs ``padding_mode="zeros"``.
        distance_type: MONAI's name of ``distance``.
        alpha: MONAI's name of ``weight``.
        padding_mode: Another name of ``border``; ``"zeros"`` gives MONAI's numbers.

    Raises:
        ValueError: If an option is unknown or given under both its names, or the logits are not of ``classes`` and ``dim``.

    The arguments of ``monai.losses.NACLLoss`` are accepted, by position too; :mod:`densecal.integrations.monai` has the class with MONAI's border.

    Example:
        >>> import torch
        >>> loss = NACLLoss(weight=0.5)
        >>> logits, label_map = torch.zeros(1, 2, 3), torch.tensor([[0, 0, 1]])
        >>> {name: round(part.item(), 4) for name, part in loss.terms(logits, label_map).items()}, round(loss(logits, label_map).item(), 4)
        ({'ce': 0.6931, 'neighbour': 0.5}, 0.9431)
    """

    def __init__(
        self,
        classes: int | None = None,
        dim: int | None = None,
        kernel_size: int | Sequence[int] = 3,
        kernel_ops: Literal["mean", "gaussian"] | None = None,
        distance_type: Literal["l1", "l2"] | None = None,
        alpha: float | None = None,
        sigma: float | Sequence[float] = 1.0,
        *,
        weight: float | Schedule = 0.1,
        distance: Literal["l1", "l2"] = "l1",
        acts_on: Literal["logits", "probs"] = "logits",
        kernel: Neighbours = "mean",
        intensity_scale: float = 1.0,
        unit: Unit = "voxel",
        border: Border = "replicate",
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
        padding_mode: Border | None = None,
    ) -> None:
        weight = _either("weight", weight, 0.1, "alpha", alpha)
        distance = _either("distance", distance, "l1", "distance_type", distance_type)
        border = _either("border", border, "replicate", "padding_mode", padding_mode)
        penalty: Term
        if kernel_ops == "gaussian":
            others = {"kernel": (kernel, "mean"), "acts_on": (acts_on, "logits"), "unit": (unit, "voxel"), "border": (border, "zeros")}
            for name, (value, needed) in others.items():
                if value != needed:
                    raise ValueError(
                        f"Expected `{name}` to be {needed!r} with MONAI's kernel_ops='gaussian', but got {value!r}. Ours is kernel='gaussian'."
                    )
            if not isinstance(sigma, (int, float)):
                raise ValueError(f"Expected one `sigma` with MONAI's kernel_ops='gaussian', but got {sigma}.")
            penalty = ErfGaussianPenalty(distance=distance, sigma=sigma, reduction=reduction)
        else:
            kernel = _either("kernel", kernel, "mean", "kernel_ops", kernel_ops)
            penalty = NeighbourPenalty(
                distance=distance,
                acts_on=acts_on,
                kernel=kernel,
                kernel_size=kernel_size,
                sigma=sigma,
                intensity_scale=intensity_scale,
                unit=unit,
                border=border,
                reduction=reduction,
            )
        super().__init__(
            OneHotTarget(activation=activation, ignore_index=ignore_index),
            {
                "ce": {"weight": 1.0, "term": CrossEntropy(class_weights=class_weights, reduction=reduction)},
                "neighbour": {"weight": weight, "term": penalty},
            },
            backend=backend,
        )
        self.classes, self.dim = classes, dim

    def terms(self, logits: Tensor, target: Tensor, *, context: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        for name, expected, found in (("classes", self.classes, logits.shape[1]), ("dim", self.dim, logits.ndim - 2)):
            if expected not in (None, found):
                raise ValueError(f"Expected logits that fit {name}={expected}, but got {tuple(logits.shape)}.")
        return super().terms(logits, target, context=context)


@LOSSES.register("dice_ce")
class DiceCELoss(CompoundLoss):
    """Cross-entropy plus soft Dice, the usual medical baseline, in the form that is right for soft labels too.

    Args:
        weight_ce: Weight of the cross-entropy, >= 0, or a schedule of it.
        weight_dice: Weight of the Dice part, >= 0, or a schedule of it.
        smooth: Added above and below the Dice fraction, in pixels.
        batch: One Dice per class over the whole batch; False: per image, then the mean.
        include_background: Count class 0 in the Dice part.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class, for both parts.
        ignore_index: Label to leave out of both.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.
        sync_stats: With several processes, take means and overlaps over the batch of all of them, as one process would.

    Example:
        >>> import torch
        >>> loss = DiceCELoss()
        >>> parts = loss.terms(torch.zeros(1, 2, 2, 2), torch.tensor([[[0, 0], [1, 1]]]))
        >>> {name: round(part.item(), 3) for name, part in parts.items()}
        {'ce': 0.693, 'dice': 0.5}
    """

    def __init__(
        self,
        *,
        weight_ce: float | Schedule = 1.0,
        weight_dice: float | Schedule = 1.0,
        smooth: float = 1e-3,
        batch: bool = True,
        include_background: bool = True,
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
        sync_stats: bool = False,
    ) -> None:
        dice = DiceSemimetric(
            smooth=smooth,
            weight_batch=float(batch),
            weight_image=float(not batch),
            include_background=include_background,
            class_weights=class_weights,
        )
        super().__init__(
            OneHotTarget(activation=activation, ignore_index=ignore_index),
            {"ce": {"weight": weight_ce, "term": CrossEntropy(class_weights=class_weights)}, "dice": {"weight": weight_dice, "term": dice}},
            backend=backend,
            sync_stats=sync_stats,
        )


@LOSSES.register("jml")
class JaccardMetricLoss(CompoundLoss):
    """Cross-entropy and Jaccard metric loss in the published mix (Wang et al., NeurIPS 2023).

    Args:
        weight_ce: Weight of the cross-entropy, >= 0, or a schedule of it.
        weight_jml: Weight of the Jaccard part, >= 0, or a schedule of it.
        smooth: Added above and below the fraction, in pixels.
        gamma: Power of the Jaccard part, > 0.
        log: Take -log of the score instead of 1 minus it.
        norm: ``"l1"`` or ``"l2"`` cardinalities.
        active: ``"auto"``, ``"present"`` or ``"all"`` classes count.
        threshold: A present class exceeds this somewhere.
        weight_batch: Weight of the average with the batch as one region.
        weight_image: Weight of the average over classes, then images.
        weight_class: Weight of the average over images, then classes.
        include_background: Count class 0 in the Jaccard part.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class, for both parts.
        ignore_index: Label to leave out of both.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.
        sync_stats: With several processes, take means and overlaps over the batch of all of them, as one process would.

    Example:
        >>> import torch
        >>> round(JaccardMetricLoss(weight_ce=0.0, weight_jml=1.0, smooth=0.0)(torch.zeros(1, 2, 4), torch.tensor([[0, 0, 1, 1]])).item(), 3)
        0.667
    """

    def __init__(
        self,
        *,
        weight_ce: float | Schedule = 0.25,
        weight_jml: float | Schedule = 0.75,
        smooth: float = 1e-3,
        gamma: float = 1.0,
        log: bool = False,
        norm: Literal["l1", "l2"] = "l1",
        active: Literal["auto", "present", "all"] = "auto",
        threshold: float = 0.01,
        weight_batch: float = 1.0,
        weight_image: float = 0.0,
        weight_class: float = 0.0,
        include_background: bool = True,
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
        sync_stats: bool = False,
    ) -> None:
        jml = JaccardMetric(
            smooth=smooth,
            gamma=gamma,
            log=log,
            norm=norm,
            active=active,
            threshold=threshold,
            weight_batch=weight_batch,
            weight_image=weight_image,
            weight_class=weight_class,
            include_background=include_background,
            class_weights=class_weights,
        )
        super().__init__(
            OneHotTarget(activation=activation, ignore_index=ignore_index),
            {"ce": {"weight": weight_ce, "term": CrossEntropy(class_weights=class_weights)}, "jml": {"weight": weight_jml, "term": jml}},
            backend=backend,
            sync_stats=sync_stats,
        )


@LOSSES.register("dml")
class DiceSemimetricLoss(CompoundLoss):
    """Cross-entropy and Dice semimetric loss in the published mix (Wang et al., MICCAI 2023).

    Args:
        weight_ce: Weight of the cross-entropy, >= 0, or a schedule of it.
        weight_dml: Weight of the Dice part, >= 0, or a schedule of it.
        smooth: Added above and below the fraction, in pixels.
        gamma: Power of the Dice part, > 0.
        log: Take -log of the score instead of 1 minus it.
        norm: ``"l1"`` or ``"l2"`` cardinalities.
        active: ``"auto"``, ``"present"`` or ``"all"`` classes count.
        threshold: A present class exceeds this somewhere.
        weight_batch: Weight of the average with the batch as one region.
        weight_image: Weight of the average over classes, then images.
        weight_class: Weight of the average over images, then classes.
        include_background: Count class 0 in the Dice part.
        activation: ``"softmax"`` or ``"sigmoid"``.
        class_weights: One weight per class, for both parts.
        ignore_index: Label to leave out of both.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``; see :class:`densecal.losses.CompoundLoss`.
        sync_stats: With several processes, take means and overlaps over the batch of all of them, as one process would.

    Example:
        >>> import torch
        >>> round(DiceSemimetricLoss(weight_ce=0.0, weight_dml=1.0, smooth=0.0)(torch.zeros(1, 2, 4), torch.tensor([[0, 0, 1, 1]])).item(), 3)
        0.5
    """

    def __init__(
        self,
        *,
        weight_ce: float | Schedule = 0.25,
        weight_dml: float | Schedule = 0.75,
        smooth: float = 1e-3,
        gamma: float = 1.0,
        log: bool = False,
        norm: Literal["l1", "l2"] = "l1",
        active: Literal["auto", "present", "all"] = "auto",
        threshold: float = 0.01,
        weight_batch: float = 1.0,
        weight_image: float = 0.0,
        weight_class: float = 0.0,
        include_background: bool = True,
        activation: Activation = "softmax",
        class_weights: Sequence[float] | Tensor | None = None,
        ignore_index: int = DEFAULT_IGNORE_INDEX,
        backend: Backend = "auto",
        sync_stats: bool = False,
    ) -> None:
        dml = DiceSemimetric(
            smooth=smooth,
            gamma=gamma,
            log=log,
            norm=norm,
            active=active,
            threshold=threshold,
            weight_batch=weight_batch,
            weight_image=weight_image,
            weight_class=weight_class,
            include_background=include_background,
            class_weights=class_weights,
        )
        super().__init__(
            OneHotTarget(activation=activation, ignore_index=ignore_index),
            {"ce": {"weight": weight_ce, "term": CrossEntropy(class_weights=class_weights)}, "dml": {"weight": weight_dml, "term": dml}},
            backend=backend,
            sync_stats=sync_stats,
        )


def _either(name: str, value: Any, default: Any, other_name: str, other: Any) -> Any:
    """The value of an argument that has two names."""
    if other is None:
        return value
    if value not in (default, other):
        raise ValueError(f"Expected one of `{name}` and `{other_name}`, which are the same, but got {value!r} and {other!r}.")
    return other
