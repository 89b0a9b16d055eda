"""Lightning modules and callbacks: a loss becomes a training run."""

from densecal.tasks.callbacks import CompactProgressBar, ConfigInCheckpoint, EpochLines, History, StatelessRandomness
from densecal.tasks.checkpoints import AtomicCheckpointIO
from densecal.tasks.segmentation import SegmentationTask

__all__ = ["AtomicCheckpointIO", "CompactProgressBar", "ConfigInCheckpoint", "EpochLines", "History", "SegmentationTask", "StatelessRandomness"]
