"""How an image's level of perturbation follows from what the network made of that image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from densecal.checks import check_non_negative, check_positive
from densecal.ops.activation import Activation, outcome_logits

__all__ = ["Accuracy", "CalibrationRule", "ConfidenceRule", "EntropyRule", "ImageStatistics", "LevelRule", "LossRule", "image_sums"]

_LEAST = 1e-7


def image_sums(logits: Tensor, probs: Tensor, valid: Tensor, *, activation: Activation = "softmax") -> Tensor:
    r"""What rules read of each image, summed over its valid pixels (and, under sigmoid, channels).

    With K outcomes, the classes under softmax and 2 per channel under sigmoid, and :math:`p` clamped to :math:`[10^{-7}, 1 - 10^{-7}]`: the cross-entropy
    :math:`-\sum_k q_k \log p_k`, the entropy term :math:`-\sum_k \log p_k` (smallest where all outcomes are alike, and growing with confidence), and the
    confidence :math:`\max_k p_k`.

    Args:
        logits: ``(N, C, *spatial)``.
        probs: Labels before perturbation, of the same shape.
        valid: ``(N, *spatial)``, bool.
        activation: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        ``(N, 4)``, float64: the three sums, and how many values they are of.

    Example:
        >>> sums = image_sums(torch.zeros(1, 2, 4), torch.tensor([[[1.0] * 4, [0.0] * 4]]), torch.tensor([[True, True, True, False]]))
        >>> (sums[:, :3] / sums[:, 3:]).tolist()  # log 2, log 4, 1/2
        [[0.69314718..., 1.38629436..., 0.5]]
    """
    p = outcome_logits(logits, activation).softmax(dim=1).clamp(_LEAST, 1.0 - _LEAST)
    q = probs.to(p.dtype)
    if activation == "sigmoid":
        q = torch.stack((q, 1.0 - q), dim=1)
        valid = valid.unsqueeze(1).expand_as(p[:, 0])
    log_p = p.log()
    values = torch.stack((-(q * log_p).sum(1), -log_p.sum(1), p.amax(1), torch.ones_like(p[:, 0])), dim=1)  # (N, 4, *rest)
    return torch.where(valid.unsqueeze(1), values, 0.0).flatten(2).sum(2, dtype=torch.float64)


class ImageStatistics(NamedTuple):
    """Means per pixel over an epoch's draws of each image, ``(num_images,)``, float64; see :func:`image_sums`.

    Attributes:
        ce: Cross-entropy of the unperturbed labels.
        cal: The entropy term, -sum over outcomes of log p.
        confidence: Largest probability.
        num_outcomes: K.
    """

    ce: Tensor
    cal: Tensor
    confidence: Tensor
    num_outcomes: int


class Accuracy(NamedTuple):
    """Share of validation pixels that are right.

    Attributes:
        last: In the last validation.
        best: In the best so far.
    """

    last: float
    best: float


@dataclass(frozen=True, kw_only=True)
class LevelRule:
    """Base of all rules: a small constant object; a subclass gives ``__call__``."""

    needs_accuracy = False
    """Whether levels stay as they are until there was a validation."""

    def __call__(self, alpha: Tensor, seen: ImageStatistics, *, beta: float, accuracy: Accuracy | None) -> Tensor:
        """The new levels, which whoever asks keeps within their bounds.

        Args:
            alpha: Present levels of the images, ``(num_images,)``, float64.
            seen: What was seen of them while training.
            beta: Strength of the perturbation.
            accuracy: None before any validation, and only for rules that do not need it.
        """
        raise NotImplementedError


def _push(seen: ImageStatistics, beta: float) -> Tensor:
    others = seen.num_outcomes - 1
    return (seen.cal - seen.num_outcomes * seen.ce) / (others * beta)


@dataclass(frozen=True, kw_only=True)
class CalibrationRule(LevelRule):
    r"""Adaptive stochastic label perturbation, model calibration: raise the levels until the expected confidence of the labels meets validation accuracy.

    .. math:: \alpha_i \leftarrow \alpha_i + \eta \left[ \frac{\mathrm{CAL}_i - K\, \mathrm{CE}_i}{(K - 1)\, \beta}
              + \lambda \min\left((1 - \mathrm{acc}) - \beta \alpha_i,\ 0\right) \right]

    The first part ascends the loss. The target at share s is :math:`(1 - s) q_k + \tfrac{s}{K - 1} (1 - q_k)`, its cross-entropy is

    .. math:: (1 - s)\, \mathrm{CE} + \tfrac{s}{K - 1} (\mathrm{CAL} - \mathrm{CE}), \quad
              \frac{d}{ds} = \frac{\mathrm{CAL} - K\, \mathrm{CE}}{K - 1}, \quad \mathrm{CAL} = \sum_k -\log p_k

    since :math:`\sum_k (1 - q_k)(-\log p_k) = \mathrm{CAL} - \mathrm{CE}`. It is positive where the network is sure and right, and at K = 2 it is the published
    :math:`\mathrm{CAL} - 2\, \mathrm{BCE}`. The second part holds the expected confidence of the labels, :math:`1 - \alpha_i \beta` for any K, at or above the
    accuracy.

    Args:
        eta: Step, > 0.
        accuracy_weight: lambda, >= 0.

    Raises:
        ValueError: If a number is out of range.

    Reference:
        Liu et al., "Model Calibration in Dense Classification with Adaptive Label Perturbation", ICCV 2023, arXiv:2307.13539; the formula is that of the
        published code. More than two outcomes are ours.

    Example:
        >>> seen = ImageStatistics(*torch.tensor([[0.1], [2.6], [0.9]], dtype=torch.float64), num_outcomes=2)
        >>> rule = CalibrationRule(eta=0.01, accuracy_weight=1.0)
        >>> rule(torch.tensor([0.1], dtype=torch.float64), seen, beta=2.0, accuracy=Accuracy(0.9, 0.9))  # 0.1 + 0.01 (1.2 - 0.1)
        tensor([0.1110], dtype=torch.float64)
    """

    needs_accuracy = True
    eta: float = 0.002
    accuracy_weight: float = 2000.0

    def __post_init__(self) -> None:
        check_positive("eta", self.eta)
        check_non_negative("accuracy_weight", self.accuracy_weight)

    def __call__(self, alpha: Tensor, seen: ImageStatistics, *, beta: float, accuracy: Accuracy | None) -> Tensor:
        assert accuracy is not None
        guard = ((1.0 - accuracy.last) - beta * alpha).clamp(max=0.0)
        return alpha + self.eta * (_push(seen, beta) + self.accuracy_weight * guard)


@dataclass(frozen=True, kw_only=True)
class EntropyRule(LevelRule):
    r"""Adaptive stochastic label perturbation, maximum entropy: raise the levels as long as validation accuracy holds.

    .. math:: \alpha_i \leftarrow \alpha_i + \eta \left[ \frac{\mathrm{CAL}_i - K\, \mathrm{CE}_i}{(K - 1)\, \beta}
              + \lambda \min\left(\mathrm{acc} - (\mathrm{acc}_{best} - \epsilon),\ 0\right) \right]

    The push is that of :class:`CalibrationRule`. The guard alone decides when to stop: it lowers all levels where the last accuracy lies more than
    :math:`\epsilon` below the best so far.

    Args:
        eta: Step, > 0.
        accuracy_weight: lambda, >= 0.
        tolerance: epsilon, the loss of accuracy that is accepted, in [0, 1].

    Raises:
        ValueError: If a number is out of range.

    Reference:
        The first of the two aims of Liu et al., arXiv:2307.13539, to preserve accuracy on known data. Their code holds the calibration mode alone; this form of the
        guard is ours.

    Example:
        >>> seen = ImageStatistics(*torch.tensor([[0.1], [2.6], [0.9]], dtype=torch.float64), num_outcomes=2)
        >>> rule = EntropyRule(eta=0.01, accuracy_weight=1.0)
        >>> rule(torch.tensor([0.1], dtype=torch.float64), seen, beta=2.0, accuracy=Accuracy(0.8, 0.9))  # 0.1 + 0.01 (1.2 - 0.1)
        tensor([0.1110], dtype=torch.float64)
    """

    needs_accuracy = True
    eta: float = 0.002
    accuracy_weight: float = 2000.0
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_positive("eta", self.eta)
        check_non_negative("accuracy_weight", self.accuracy_weight)
        _check_share("tolerance", self.tolerance, 1.0)

    def __call__(self, alpha: Tensor, seen: ImageStatistics, *, beta: float, accuracy: Accuracy | None) -> Tensor:
        assert accuracy is not None
        guard = min(accuracy.last - (accuracy.best - self.tolerance), 0.0)
        return alpha + self.eta * (_push(seen, beta) + self.accuracy_weight * guard)


@dataclass(frozen=True, kw_only=True)
class LossRule(LevelRule):
    r"""Adaptive label smoothing by loss: the worse an image's labels are fitted, the more they are smoothed.

    .. math:: \alpha_i \beta = s_{max} \left(1 - e^{-\mathrm{CE}_i}\right)

    where :math:`e^{-\mathrm{CE}_i}` is the geometric mean of the probabilities that the labels are given. It needs no validation.

    Args:
        maximum: :math:`s_{max}`, the share of an image that is not fitted at all, in [0, 1/2).

    Raises:
        ValueError: If ``maximum`` is out of range.

    Reference:
        Ours, after :class:`ConfidenceRule`.

    Example:
        >>> seen = ImageStatistics(*torch.tensor([[0.6931], [1.4], [0.5]], dtype=torch.float64), num_outcomes=2)
        >>> LossRule(maximum=0.2)(torch.zeros(1, dtype=torch.float64), seen, beta=1.0, accuracy=None)
        tensor([0.1000], dtype=torch.float64)
    """

    maximum: float = 0.2

    def __post_init__(self) -> None:
        _check_share("maximum", self.maximum, 0.5)

    def __call__(self, alpha: Tensor, seen: ImageStatistics, *, beta: float, accuracy: Accuracy | None) -> Tensor:
        return self.maximum * (1.0 - torch.exp(-seen.ce)) / beta


@dataclass(frozen=True, kw_only=True)
class ConfidenceRule(LevelRule):
    r"""Adaptive label smoothing by uncertainty: the less sure the network is of an image, the more its labels are smoothed.

    .. math:: \alpha_i \beta = s_{max}\, \frac{1 - \mathrm{conf}_i}{1 - 1/K}

    with the mean confidence over the image: 0 where the network is certain everywhere, :math:`s_{max}` where it knows nothing. It needs no validation.

    Args:
        maximum: :math:`s_{max}`, in [0, 1/2).

    Raises:
        ValueError: If ``maximum`` is out of range.

    Reference:
        Wang et al., "Uncertainty Aware Learning for Language Model Alignment", ACL 2024, arXiv:2406.04854, whose smoothing is linear in the uncertainty of a sample.
        Differs from the paper: the uncertainty is the trained network's own, not another's.

    Example:
        >>> seen = ImageStatistics(*torch.tensor([[0.1], [1.4], [0.75]], dtype=torch.float64), num_outcomes=2)
        >>> ConfidenceRule(maximum=0.2)(torch.zeros(1, dtype=torch.float64), seen, beta=1.0, accuracy=None)
        tensor([0.1000], dtype=torch.float64)
    """

    maximum: float = 0.2

    def __post_init__(self) -> None:
        _check_share("maximum", self.maximum, 0.5)

    def __call__(self, alpha: Tensor, seen: ImageStatistics, *, beta: float, accuracy: Accuracy | None) -> Tensor:
        return self.maximum * (1.0 - seen.confidence) / (1.0 - 1.0 / seen.num_outcomes) / beta


def _check_share(name: str, value: float, end: float) -> None:
    if not 0 <= value < end:
        raise ValueError(f"Expected `{name}` in [0, {end:g}), but got {value}.")
