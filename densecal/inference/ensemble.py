"""Several trained networks as one: the mean of their probabilities, calibrated after the mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig

from densecal.data.card import DataCard
from densecal.inference.calibration import Calibration, find_calibration
from densecal.inference.predictor import Prediction, Predictor

__all__ = ["Ensemble", "check_one_data_set"]

_ALIKE: tuple[Callable[[DataCard], str], ...] = (
    lambda card: card.told_apart,
    lambda card: f"images of {card.image_channels} channel(s) in {card.spatial_dims}D",
    lambda card: f"images read with exif={card.exif}",
)
"""What members must have in common, in words: probabilities of the same things, of the same files, on the same grid."""


class Ensemble:
    """Several trained networks as one: the mean of their probabilities on the file's own grid.

    Each member prepares the image and looks at it in its own way. Of what they say the probabilities are averaged, not the logits; and a calibrator comes after the mean and
    is fitted on it, since where members disagree their mean is less sure than they are: the mean of calibrated members is not calibrated. A run by itself is an ensemble of
    one. In memory there are one sum and one member's probabilities, however many members there are.

    Args:
        members: Trained networks without calibrators, at least one.

    Attributes:
        card: Data set card of the first member; what it says of classes, regions, channels and the files' grid holds for all.

    Raises:
        ValueError: If there is no member, one is there twice or has a calibrator of its own, or they differ in classes, regions, image channels, spatial dims or how the
            files are turned.

    Reference:
        Rahaman and Thiery, "Uncertainty Quantification and Deep Ensembles", NeurIPS 2021, arXiv:2007.08792: pool, then calibrate.

    Example:
        >>> ensemble = Ensemble.from_runs(["runs/folds/A", "runs/folds/B"])  # doctest: +SKIP
        >>> ensemble("scan.nii.gz").probs.shape  # doctest: +SKIP
        torch.Size([3, 35, 51, 35])
    """

    def __init__(self, members: Sequence[Predictor]) -> None:
        if not members:
            raise ValueError("Expected an ensemble of at least one member, but got none.")
        self.members = tuple(members)
        self.card = members[0].card
        self.device = members[0].device
        self.calibration: Calibration | None = None
        """What mends the mean of the probabilities, the last thing of all."""
        names = [str(member.checkpoint or f"member {number}") for number, member in enumerate(members, start=1)]
        if repeated := [name for place, name in enumerate(names) if name in names[:place]]:
            raise ValueError(f"{repeated[0]}: is named twice. Give each member of an ensemble once.")
        for name, member in zip(names, members, strict=True):
            if member.calibration is not None:
                raise ValueError(
                    f"{name}: has a calibrator of its own, but the mean of an ensemble is calibrated as a whole. Leave the member's out."
                )
            for words in _ALIKE:
                if words(member.card) != words(self.card):
                    raise ValueError(
                        f"{name}: was trained on {words(member.card)}, but {names[0]} on {words(self.card)}. The members of an ensemble have these in common."
                    )

    @classmethod
    def from_runs(
        cls,
        runs: Iterable[Path | str],
        checkpoint: str = "best",
        device: torch.device | str = "cpu",
        inference: DictConfig | None = None,
        calibration: str | None = None,
        *,
        trust_config: bool = False,
    ) -> Ensemble:
        """Load runs; arguments and errors are those of :meth:`Predictor.from_run`, for every run.

        Args:
            runs: Run directories or checkpoint files.
            checkpoint: ``"best"`` or ``"last"``.
            device: Where to compute.
            inference: How whole images are predicted, by all members. By default each as in its training.
            calibration: File of a calibrator that ``densecal-calibrate ensemble=[...]`` fitted for these members; of one run also the name of one in its folder.
            trust_config: Build whatever the checkpoints' configs name.
        """
        ensemble = cls([Predictor.from_run(run, checkpoint, device, inference, trust_config=trust_config) for run in runs])
        if calibration is not None:
            ensemble.calibration = find_calibration(calibration, ensemble.checkpoints, ensemble.card)
        return ensemble

    @property
    def checkpoints(self) -> dict[Path, DictConfig]:
        """Checkpoint file of each member that comes from one -> how whole images are predicted with it."""
        return {member.checkpoint: member.config.inference for member in self.members if member.checkpoint is not None and member.config is not None}

    @torch.inference_mode()
    def __call__(self, path: Path | str | Iterable[Path | str]) -> Prediction:
        """Predict one image, as :meth:`Predictor.__call__` does; the prediction's source is the image as the first member saw it."""
        paths = path if isinstance(path, (str, Path)) else list(path)
        first, *others = self.members
        prediction = first(paths)
        probs = prediction.probs
        for member in others:
            probs += member(paths).probs
        probs /= len(self.members)
        if self.calibration is not None:
            probs = self.calibration(probs, first.place(prediction.source.image))
        return Prediction(probs, prediction.source, self.card)


def check_one_data_set(members: Sequence[Predictor], names: Sequence[Path | str]) -> None:
    """See that networks were trained on one data set, so that the names of cases mean the same in the splits of all.

    Args:
        members: The networks.
        names: How to call them.

    Raises:
        ValueError: If they were not.
    """
    first = members[0].card
    for name, member in zip(names, members, strict=True):
        for place, known in ((member.card.root, first.root), (member.card.test_root, first.test_root)):
            if place != known:
                raise ValueError(
                    f"{name}: was trained on {place}, but {names[0]} on {known}. Give runs of one data set, or root=DIR if they are copies."
                )
