"""The probabilities of other networks as a target: distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densecal.checks import check_positive, plain
from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation, probabilities
from densecal.registry import TARGETS
from densecal.targets.base import Recipe, SoftTarget, Target
from densecal.targets.wrapper import WrapperTarget

__all__ = ["TeacherBlend", "TeacherTarget", "teacher_probabilities"]


def teacher_probabilities(teacher_logits: Tensor, *, temperature: float = 1.0, activation: Activation = "softmax") -> Tensor:
    r"""Mean of the probabilities of several teachers (not of their logits, which would sharpen), :math:`\frac1M \sum_m \mathrm{softmax}(z_m / T)`.

    Args:
        teacher_logits: ``(M, N, C, *spatial)``, floating, no gradient flows into it.
        temperature: T, > 0; above 1 softens.
        activation: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        ``(N, C, *spatial)``.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Example:
        >>> teacher_probabilities(torch.tensor([[[[0.0], [0.0]]], [[[99.0], [0.0]]]]))[0, :, 0]
        tensor([0.7500, 0.2500])
    """
    check_positive("temperature", temperature)
    teachers = [probabilities(logits.detach() / temperature, activation) for logits in teacher_logits.unbind(0)]
    return torch.stack(teachers).mean(dim=0)


@dataclass(frozen=True, eq=False)
class TeacherBlend(Recipe):
    """``mix`` of the teachers' probabilities and the rest of what ``recipe`` makes of the labels."""

    teacher_logits: Tensor
    recipe: Recipe
    temperature: float = 1.0
    mix: float = 0.5

    def __call__(self, one_hot: Tensor, valid: Tensor, activation: Activation) -> Tensor:
        # Ignored pixels count nowhere, whatever a teacher says there, NaN included.
        mask = valid.unsqueeze(1)
        logits = torch.where(mask, self.teacher_logits.to(one_hot.dtype), 0.0)
        teacher = teacher_probabilities(logits, temperature=self.temperature, activation=activation)
        return torch.where(mask, self.mix * teacher + (1.0 - self.mix) * self.recipe(one_hot, valid, activation), 0.0)


@TARGETS.register("teacher")
class TeacherTarget(WrapperTarget):
    r"""What teachers say, mixed with the labels; needs the side input ``teacher_logits``.

    .. math:: q = \lambda\, \frac1M \sum_m \mathrm{softmax}(z_m / T) + (1 - \lambda)\, q_{\text{label}}

    ``teacher_logits`` are ``(N, C, *spatial)`` for one network and ``(M, N, C, *spatial)`` for several. Pixels that the labels ignore stay ignored. The
    divisor of a mean with class weights follows the labels, as under any smoothing.

    Args:
        temperature: T, > 0; above 1 softens the teachers. With a teacher trained on smoothed labels keep it low.
        mix: Share of the teachers :math:`\lambda`, in [0, 1]; 1 leaves the labels out.
        label_target: What the labels become by themselves; None is one-hot.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label to leave out.

    Raises:
        TypeError: If ``label_target`` is not a target.
        ValueError: If ``temperature`` is not positive, ``mix`` outside [0, 1], or ``label_target`` has another activation or ignores another label.

    Reference:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; Wang et al., arXiv:2302.05666 and arXiv:2303.16296; Shen and Savvides,
        "MEAL V2", 2020 (the mean of several teachers' probabilities).

    Example:
        >>> target = TeacherTarget(mix=0.5)
        >>> target(torch.tensor([[0, 1]]), 2, context={"teacher_logits": torch.zeros(1, 2, 2)}).probs[0]
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        mix: float = 0.5,
        label_target: Target | None = None,
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
    ) -> None:
        super().__init__(label_target, needs=("teacher_logits",), activation=activation, ignore_index=ignore_index)
        check_positive("temperature", temperature)
        if not 0 <= mix <= 1:
            raise ValueError(f"Expected `mix` in [0, 1], but got {mix}.")
        self.temperature = temperature
        self.mix = mix

    def forward(
        self,
        label: Tensor,
        num_classes: int,
        *,
        spatial_dims: int | None = None,
        dtype: torch.dtype = torch.float32,
        context: Mapping[str, Any] | None = None,
    ) -> SoftTarget:
        labels = self.from_labels(label, num_classes, spatial_dims=spatial_dims, dtype=dtype, context=context)
        teachers = plain(self.side_input(context, "teacher_logits"))
        n, *spatial = labels.valid.shape
        expected = [n, num_classes, *spatial]
        if list(teachers.shape) == expected:
            teachers = teachers.unsqueeze(0)
        if list(teachers.shape[1:]) != expected or teachers.shape[0] == 0:
            raise ValueError(
                f"Expected 'teacher_logits' of shape (N, C, *spatial) = {tuple(expected)} or {('M', *expected)} for M teachers, "
                f"but got {tuple(teachers.shape)}."
            )
        return labels.with_recipe(TeacherBlend(teachers, labels.recipe, self.temperature, self.mix), hard=labels.hard and self.mix == 0)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, mix={self.mix}, {super().extra_repr()}"
