"""Labels perturbed at a level of each image's own, which follows the training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from densecal.labels import DEFAULT_IGNORE_INDEX
from densecal.ops.activation import Activation
from densecal.perturbation.base import Perturbation, PerturbedLabels
from densecal.perturbation.rules import Accuracy, CalibrationRule, ImageStatistics, LevelRule, image_sums
from densecal.targets.base import Recipe, SoftTarget, Target

__all__ = ["AdaptivePerturbation"]


class AdaptivePerturbation(Perturbation):
    r"""Perturb the labels of each training image at a level of its own; needs the side input ``case_id``.

    Level :math:`\alpha_i` of the image i hands, in expectation, the share :math:`\alpha_i \beta` of each class to the others. While training, the loss shows each
    batch's logits; at the end of an epoch, after the warm-up, ``rule`` sets the levels of the images that the epoch has seen from the means over all their valid
    pixels and draws (patches, augmented images, repetitions). Then

    .. math:: \alpha_i < 0 \mapsto 0, \quad \alpha_i \ge \tfrac{1}{2\beta} \mapsto \tfrac{1}{2\beta} - 0.01

    Rules that follow accuracy (:class:`CalibrationRule`, :class:`EntropyRule`) take that of the last validation, however many epochs ago it was, and leave the
    levels alone before there was one. In evaluation mode the labels are those of ``label_target`` and no image need be known.

    The levels are in the state by the images' names: a checkpoint loads into a table of other images or another order, and an image that it does not know keeps its
    level. Over several processes the sums of all are taken together before an update, so levels are the same everywhere.

    In a loop of one's own: ``on_epoch(epoch, max_epochs)`` before each epoch, ``context={"case_id": [...]}`` with each batch, ``on_validation({"accuracy": ...})``
    after a validation and ``on_epoch_end()`` after the epoch, all of the loss. A loop without the last is caught up with by the next ``on_epoch``. A trainer that calls
    its loss with logits and labels alone, as MONAI's, is given a function: ``lambda logits, labels: loss(logits, labels, context={"case_id":
    labels.meta["filename_or_obj"]})`` where labels are MONAI's, with the files' names for ``case_ids``. Under ``torch.compile`` other names are another graph.

    Args:
        case_ids: Names of all training images, each once.
        rule: Sets the levels. None is :class:`CalibrationRule` with its defaults, ASLP.
        label_target: What the labels become before; None is one-hot.
        alpha: Level of all images to begin with, in [0, 1 / (2 beta)).
        beta: Strength, > 0. Above 1 a target that is drawn leaves [0, 1], which is for cross-entropy alone.
        warmup: Epochs before the first update, >= 0: the first is at the end of the epoch after them.
        expected: Take the mean over the draw; False: draw, as the published code.
        activation: ``"softmax"`` or ``"sigmoid"``.
        ignore_index: Label to leave out.

    Raises:
        TypeError: If ``label_target`` is not a target, or ``rule`` is not a rule.
        ValueError: If a name is there twice or there is none; if a number is out of range; if ``label_target`` perturbs labels already, has another activation or
            ignores another label; in training, if a batch holds an unknown image.

    Reference:
        Liu et al., "Model Calibration in Dense Classification with Adaptive Label Perturbation", ICCV 2023, arXiv:2307.13539.
        Differs from the code: levels change at the end of an epoch, with the validation that ends it, instead of after each batch, with the validation before; they
        are keyed by the image itself, where the loader there pairs sorted images with unsorted names; accuracy is the plain share of right pixels.

    Example:
        >>> from densecal.losses import CompoundLoss
        >>> from densecal.terms import CrossEntropy
        >>> perturbation = AdaptivePerturbation(case_ids=["a", "b"], warmup=0)
        >>> loss = CompoundLoss(perturbation, {"ce": {"weight": 1.0, "term": CrossEntropy()}})
        >>> logits = torch.tensor([[[3.0, 3.0], [0.0, 0.0]], [[2.0, 2.0], [0.0, 0.0]]])
        >>> for epoch in range(2):
        ...     loss.on_epoch(epoch, 2)
        ...     value = loss(logits, torch.zeros(2, 2, dtype=torch.long), context={"case_id": ["a", "b"]})
        ...     loss.on_validation({"accuracy": 0.9})
        ...     loss.on_epoch_end()
        >>> perturbation.case_levels()["perturbation"]  # two steps of 0.002 * 3 / 2 for the surer image
        {'a': 0.006..., 'b': 0.004...}
    """

    alpha: Tensor

    def __init__(
        self,
        *,
        case_ids: Sequence[str],
        rule: LevelRule | None = None,
        label_target: Target | None = None,
        alpha: float = 0.0,
        beta: float = 2.0,
        warmup: int = 5,
        expected: bool = True,
        activation: Activation = "softmax",
        ignore_index: int = DEFAULT_IGNORE_INDEX,
    ) -> None:
        super().__init__(label_target, beta=beta, expected=expected, needs=("case_id",), activation=activation, ignore_index=ignore_index)
        rule = CalibrationRule() if rule is None else rule
        if not isinstance(rule, LevelRule):
            raise TypeError(f"Expected `rule` to be a densecal.perturbation.LevelRule, but got {type(rule).__name__}.")
        if not 0 <= alpha * beta < 0.5:
            raise ValueError(f"Expected `alpha` in [0, 1 / (2 beta)) = [0, {0.5 / beta:g}), so that the label stays the likelier, but got {alpha}.")
        if warmup < 0:
            raise ValueError(f"Expected `warmup` of 0 epochs or more, but got {warmup}.")
        self.case_ids = tuple(case_ids)
        self._rows = {case_id: row for row, case_id in enumerate(self.case_ids)}
        if not self.case_ids or len(self._rows) < len(self.case_ids):
            twice = [case_id for row, case_id in enumerate(self.case_ids) if self._rows[case_id] != row]
            raise ValueError(f"Expected `case_ids` to name each training image once, but got {f'{twice[0]!r} twice' if twice else 'none'}.")
        self.rule = rule
        self.warmup = warmup
        # The state is that of `get_extra_state`, by name; as a buffer the table moves with the module.
        self.register_buffer("alpha", torch.full((len(self.case_ids),), float(alpha)), persistent=False)
        # Of this process and the epoch that is going on; no buffer, since DistributedDataParallel would overwrite it with that of rank 0.
        self._sums = torch.zeros(len(self.case_ids), 4, dtype=torch.float64)
        self._num_outcomes = 2
        self._epoch = 0
        self._accuracy: Accuracy | None = None

    @property
    def wants_training_logits(self) -> bool:
        return True

    @property
    def needs_validation(self) -> bool:
        return self.rule.needs_accuracy or self.label_target.needs_validation

    def levels(self, size: int, device: torch.device, context: Mapping[str, Any] | None) -> float | Tensor:
        rows = self._rows_of(context)
        if len(rows) != size:
            raise ValueError(f"Expected 'case_id' to name the {size} images of the batch, but got {len(rows)} names.")
        return self.alpha[torch.tensor(rows, dtype=torch.long, device=self.alpha.device)].to(device)

    def on_batch(self, logits: Tensor, target: SoftTarget, *, context: Mapping[str, Any] | None = None) -> None:
        super().on_batch(logits, target, context=context)
        probs = _unperturbed(target.recipe)(target.one_hot, target.valid, target.activation)
        self._num_outcomes = logits.shape[1] if target.activation == "softmax" else 2
        self._sums = self._sums.to(logits.device)
        # One by one: adding to the same row twice at once has no fixed order on a GPU.
        for row, sums in zip(self._rows_of(context), image_sums(logits, probs, target.valid, activation=target.activation), strict=True):
            self._sums[row] += sums

    def on_validation(self, stats: Mapping[str, Any]) -> None:
        super().on_validation(stats)
        last = float(stats.get("accuracy", math.nan))
        if not math.isnan(last):
            self._accuracy = Accuracy(last, last if self._accuracy is None else max(last, self._accuracy.best))

    def on_epoch(self, epoch: int, max_epochs: int) -> None:
        self.on_epoch_end()
        super().on_epoch(epoch, max_epochs)
        self._epoch = epoch

    @torch.no_grad()
    def on_epoch_end(self) -> None:
        """Update the levels of the images seen since the last time."""
        super().on_epoch_end()
        sums = self._sums.to(self.alpha.device, copy=True)
        self._sums = torch.zeros_like(sums)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        seen = sums[:, -1] > 0
        if self._epoch < self.warmup or (self.rule.needs_accuracy and self._accuracy is None) or not seen.any():
            return
        ce, cal, confidence = (sums[seen, :-1] / sums[seen, -1:]).unbind(1)
        statistics = ImageStatistics(ce, cal, confidence, self._num_outcomes)
        levels = self.rule(self.alpha[seen].double(), statistics, beta=self.beta, accuracy=self._accuracy)
        end = 0.5 / self.beta
        levels = torch.where(levels >= end, max(end - 0.01, 0.0), levels.clamp(min=0.0))
        self.alpha[seen] = levels.to(self.alpha.dtype)

    def numbers(self) -> dict[str, float]:
        alpha = self.alpha.double()
        present = {"perturbation_mean": alpha.mean(), "perturbation_min": alpha.min(), "perturbation_max": alpha.max()}
        return super().numbers() | {name: value.item() for name, value in present.items()}

    def case_levels(self) -> dict[str, dict[str, float]]:
        return super().case_levels() | {"perturbation": dict(zip(self.case_ids, self.alpha.tolist(), strict=True))}

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "case_ids": list(self.case_ids),
            "alpha": self.alpha.detach().clone(),
            "sums": self._sums.clone(),
            "num_outcomes": self._num_outcomes,
            "epoch": self._epoch,
            "accuracy": None if self._accuracy is None else list(self._accuracy),
        }

    def set_extra_state(self, state: Any) -> None:
        here = [row for row, case_id in enumerate(state["case_ids"]) if case_id in self._rows]
        there = [self._rows[state["case_ids"][row]] for row in here]
        self.alpha[there] = state["alpha"][here].to(self.alpha)
        self._sums = torch.zeros_like(self._sums)
        self._sums[there] = state["sums"][here].to(self._sums)
        self._num_outcomes, self._epoch = state["num_outcomes"], state["epoch"]
        self._accuracy = None if state["accuracy"] is None else Accuracy(*state["accuracy"])

    def _rows_of(self, context: Mapping[str, Any] | None) -> list[int]:
        names = self.side_input(context, "case_id")
        if unknown := [name for name in names if name not in self._rows]:
            raise ValueError(
                f"Expected images out of the {len(self.case_ids)} that `case_ids` names, but got {unknown[0]!r}. Give it the names of all training images."
            )
        return [self._rows[name] for name in names]

    def extra_repr(self) -> str:
        return f"{len(self.case_ids)} images, rule={self.rule}, warmup={self.warmup}, {super().extra_repr()}"


def _unperturbed(recipe: Recipe) -> Recipe:
    """What the labels were before they were perturbed; what was done with them afterwards (by a target around the perturbation) is left out as well."""
    while not isinstance(recipe, PerturbedLabels):
        recipe = recipe.recipe  # type: ignore[attr-defined]
    return recipe.recipe
