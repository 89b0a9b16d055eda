"""A student that learns from teachers beside its labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from densecal.inference import Inferer
from densecal.labels import LabelSchema
from densecal.tasks.segmentation import SegmentationTask
from densecal.tasks.teachers import Teachers

__all__ = ["DistillationTask"]


class DistillationTask(SegmentationTask):
    """A :class:`SegmentationTask` whose loss is handed what teachers say: the side input ``teacher_logits``, ``(M, N, C, *spatial)``.

    Everything else is that of the student alone. The teachers are not in its checkpoint, which predicts without them; it holds their fingerprints, and a run does not go on
    with others.

    Args:
        model: The student.
        loss: A loss that needs ``teacher_logits``: :class:`densecal.losses.DistillationLoss`, or any compound of :class:`densecal.targets.TeacherTarget`.
        schema: The classes.
        window: Predicts whole images.
        teachers: Where the logits come from: :class:`OnlineTeachers`, or :class:`CachedTeachers` with the companions that the data then hold.
        options: As for :class:`SegmentationTask`.

    Raises:
        ValueError: As for :class:`SegmentationTask`, or if the loss does not need teachers.
    """

    def __init__(self, model: nn.Module, loss: nn.Module, schema: LabelSchema, window: Inferer, teachers: Teachers, **options: Any) -> None:
        if "teacher_logits" not in getattr(loss, "needs", ()):
            raise ValueError(
                f"Expected a loss that learns from teachers, but {type(loss).__name__} does not. Choose loss=distillation, or loss=compound target=teacher with any "
                "terms; or leave out the teachers."
            )
        super().__init__(model, loss, schema, window, **options)
        self.teachers = teachers

    def _context(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        said = self.teachers.logits(batch) if self.training else self.teachers.whole_logits(batch)
        return super()._context({**batch, "teacher_logits": said})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["teachers"] = list(self.teachers.fingerprints)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that other teachers have taught.

        Raises:
            ValueError: If they are others, or in another order.
        """
        super().on_load_checkpoint(checkpoint)
        if checkpoint.get("teachers") != list(self.teachers.fingerprints):
            raise ValueError(
                "Expected the teachers that the run began with, but their files have changed since. Bring them back (distillation.teachers= may name another place), "
                "or start a new run."
            )
