"""Lightning modules and callbacks: a loss becomes a training run."""

from densecal.tasks.callbacks import CompactProgressBar, ConfigInCheckpoint, EpochLines, FirstCheckpoint, History, StatelessRandomness
from densecal.tasks.checkpoints import AtomicCheckpointIO
from densecal.tasks.distillation import DistillationTask
from densecal.tasks.non_finite import NonFiniteLoss
from densecal.tasks.segmentation import SegmentationTask
from densecal.tasks.teachers import CachedTeachers, OnlineTeachers, Teachers

__all__ = [
    "AtomicCheckpointIO",
    "CachedTeachers",
    "CompactProgressBar",
    "ConfigInCheckpoint",
    "DistillationTask",
    "EpochLines",
    "FirstCheckpoint",
    "History",
    "NonFiniteLoss",
    "OnlineTeachers",
    "SegmentationTask",
    "StatelessRandomness",
    "Teachers",
]
