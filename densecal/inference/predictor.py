"""A trained run as a function from files to probabilities on the files' own grid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from densecal.checks import check_choice
from densecal.data.card import DataCard
from densecal.data.medium import OpenedImage, medium_of
from densecal.data.nnunet import description_of
from densecal.files import write_atomically
from densecal.inference.calibration import Calibration, find_calibration
from densecal.inference.inferer import Inferer
from densecal.instantiation import check_trusted, instantiate
from densecal.models.pretrained import without_pretrained
from densecal.ops.activation import most_probable
from densecal.runs import find_checkpoint, read_checkpoint

__all__ = ["OUTPUTS", "Prediction", "Predictor", "resolve_device", "write_description", "write_prediction"]

OUTPUTS = ("label", "probs", "soft_label", "confidence", "confidence_png", "overlay")
"""What a prediction can be written as; the last two are for images."""


_COPIES = 4
"""What a prediction takes at most, in multiples of its probabilities: the sums of a view and of all views, and each once more while it is divided or resized."""


@dataclass(frozen=True)
class Prediction:
    """What a network says about one image file.

    Args:
        probs: ``(C, *spatial)`` of classes or regions, float32, on the grid of the file.
        source: The file: the image as the network saw it (normalised, maybe resampled), and the grid of the file.
        card: How the file was read; it names and colours the classes or regions.
    """

    probs: Tensor
    source: OpenedImage
    card: DataCard

    @property
    def label_map(self) -> Tensor:
        """Most probable class ``(*spatial)``, int64; of regions ``(R, *spatial)``, 1 inside and 0 outside."""
        return most_probable(self.probs, self.card.schema.activation, dim=0)[0]

    @property
    def confidence(self) -> Tensor:
        """Probability of that class ``(*spatial)``, in [1/C, 1]; of being inside or outside ``(R, *spatial)``, in [1/2, 1]."""
        return most_probable(self.probs, self.card.schema.activation, dim=0)[1]


class Predictor:
    """A network with the preprocessing and the way of inference it was trained for.

    Args:
        model: The network; it is moved to ``device`` and put in evaluation mode.
        card: Data set card that says how images are prepared.
        window: Predicts whole images: a sliding window, or all in one piece.
        device: Where to compute.

    Example:
        >>> predictor = Predictor.from_run("runs/task04_hippocampus_svls/2026-01-31_12-00-00")  # doctest: +SKIP
        >>> predictor("scan.nii.gz").probs.shape  # doctest: +SKIP
        torch.Size([3, 35, 51, 35])
    """

    def __init__(self, model: nn.Module, card: DataCard, window: Inferer, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.float().to(self.device).eval()
        self.card = card
        self.window = window
        self.config: DictConfig | None = None
        """Of the run, where the network comes from one."""
        self.checkpoint: Path | None = None
        """The file, where it comes from one."""
        self.calibration: Calibration | None = None
        """What mends the probabilities on the file's own grid, the last thing of all."""

    @classmethod
    def from_run(
        cls,
        run: Path | str,
        checkpoint: str = "best",
        device: torch.device | str = "cpu",
        inference: DictConfig | None = None,
        calibration: str | None = None,
        *,
        trust_config: bool = False,
    ) -> Predictor:
        """Load a run; its checkpoint holds the config that built it.

        Args:
            run: Run directory, or a checkpoint file.
            checkpoint: ``"best"`` or ``"last"``.
            device: Where to compute.
            inference: How whole images are predicted, as ``configs/inference/`` has it. By default as in training.
            calibration: Name of a calibrator that ``densecal-calibrate`` left in the run, ``"temperature"`` for example, or its file. By default the
                probabilities are as the network gives them.
            trust_config: Build whatever the checkpoint's config names, such as a network of your own; else only networks of packages that densecal knows, see
                :func:`densecal.instantiation.check_trusted`.

        Raises:
            FileNotFoundError: If there is no such checkpoint or calibrator.
            ValueError: If it is not densecal's, or damaged, ``inference`` has an option out of its range, or the calibrator was fitted for another checkpoint,
                other classes or another way of predicting.
        """
        path = find_checkpoint(Path(run), checkpoint)
        content = read_checkpoint(path)
        if content.get("global_step") == 0:
            raise ValueError(
                f"{path}: holds no finished epoch, the network as it was before training. Go on with the run: tools/train.py resume=RUN."
            )
        config = OmegaConf.create(content["densecal"]["config"])
        if not trust_config:
            check_trusted({name: OmegaConf.to_container(config[name], resolve=True) for name in ("model", "inference")}, path)
        card = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataCard), config.data))
        assert isinstance(card, DataCard)
        known: dict[str, Any] = {"in_channels": card.image_channels, "num_classes": card.schema.num_classes, "spatial_dims": card.spatial_dims}
        known |= without_pretrained(hydra.utils.get_object(config.model._target_))
        model = instantiate(config.model, **known)
        weights = {name.removeprefix("model."): value for name, value in content["state_dict"].items() if name.startswith("model.")}
        model.load_state_dict(weights)
        if inference is not None:
            config.inference = inference
        try:
            window = instantiate(config.inference, patch_size=list(card.patch_size), spatial_dims=card.spatial_dims)
        except InstantiationException as error:
            raise ValueError(f"inference: {str(error.__cause__ or error).splitlines()[0]}") from error
        predictor = cls(model, card, window, device)
        predictor.config, predictor.checkpoint = config, path
        if calibration is not None:
            predictor.calibration = find_calibration(calibration, {path: config.inference}, card)
        return predictor

    @torch.inference_mode()
    def __call__(self, path: Path | str | Iterable[Path | str]) -> Prediction:
        """Predict one image.

        Args:
            path: Image file of the kind that the network was trained on; several are stacked as channels.

        Raises:
            ValueError: If a file cannot be read or has another number of channels than the network; the text names it.
        """
        paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(p) for p in path]
        names = " and ".join(str(p) for p in paths)
        medium = medium_of(self.card)
        try:
            source = medium.open(paths, self.card)
        except Exception as error:
            cause = error.__cause__ or error
            reason = str(cause).strip().splitlines()[0].rstrip(".") if str(cause).strip() else type(cause).__name__
            raise ValueError(f"{names}: cannot be read ({reason}). Expected one of {', '.join(medium.suffixes)}.") from error
        image = source.image
        if image.shape[0] != self.card.image_channels or image.ndim != self.card.spatial_dims + 1:
            raise ValueError(
                f"{names}: expected {self.card.image_channels} channel(s) and {self.card.spatial_dims} spatial dims, as in training, but got "
                f"{tuple(image.shape)} (channels first)."
            )
        if bad := int((~torch.isfinite(image)).sum()):
            raise ValueError(f"{names}: holds {bad} NaN or infinite {medium.element}(s). Replace them, with np.nan_to_num for example.")
        place = self.place(image)
        probs = self.window(self.model, image.unsqueeze(0).to(place), activation=self.card.schema.activation)[0].cpu()
        probs = source.restore(probs)
        if self.calibration is not None:
            probs = self.calibration(probs, place)
        return Prediction(probs, source, self.card)

    def place(self, image: Tensor) -> torch.device:
        """Where the probabilities of an image are summed up: on the device if they fit; else in main memory, and the windows alone go to the device."""
        if self.device.type != "cuda":
            return self.device
        free, _ = torch.cuda.mem_get_info(self.device)
        needed = _COPIES * 4 * self.card.schema.num_classes * image[0].numel() * max(max(self.window.scales), 1.0) ** self.card.spatial_dims
        return self.device if needed < free / 2 else image.device  # the other half is the network's


def resolve_device(name: str) -> torch.device:
    """``"auto"``: the first CUDA device if there is one, else the CPU; anything else as torch spells it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: cannot use {name!r} ({str(error).splitlines()[0].rstrip('.')}). device=auto takes what is there.") from None
    return device


def write_prediction(prediction: Prediction, folder: Path, case_id: str, outputs: Iterable[str] = ("label", "probs", "confidence")) -> list[Path]:
    """Write a prediction on the grid of its file, each output whole or not at all.

    ==================  ===============================================  =======================================================
    output              of a volume                                      of an image
    ==================  ===============================================  =======================================================
    ``label``           ``<id>_label.nii.gz``, most probable class       ``<id>_label.png``, the class as palette index
    ``probs``           ``<id>_probs.nii.gz``, ``(X, Y, Z, C)`` float32  ``<id>_probs.npz``, ``probs`` ``(C, H, W)`` float32
    ``soft_label``      ``<id>_soft_label.nii.gz``, 16 bits, scaled      ``<id>_soft_label.npz``, 16 bits, 65535 for 1, compressed
    ``confidence``      ``<id>_confidence.nii.gz``, float32              ``<id>_confidence.tif``, float32
    ``confidence_png``                                                   ``<id>_confidence.png``, 8 bits, 255 for 1
    ``overlay``                                                          ``<id>_overlay.png``, the classes over the image
    ==================  ===============================================  =======================================================

    A ``soft_label`` holds the probabilities in half the space of ``probs``, off by at most 1/131070, to teach another network.

    Of one region the label is 1 inside and 0 outside. Several, which may overlap, are the channels of a volume's label and confidence, ``(X, Y, Z, R)``, and of an image
    a file each, ``<id>_label_<region>.png``.

    Args:
        prediction: The prediction. Confidence is the probability of the most probable class; of a region, of what the label says.
        folder: Where to; made if missing.
        case_id: Start of the file names.
        outputs: Any of those above.

    Returns:
        The files.

    Raises:
        ValueError: If an output is unknown, or of the other kind.
    """
    medium = medium_of(prediction.card)
    chosen = list(outputs)
    for output in chosen:
        check_choice("outputs", output, medium.outputs)
    return [path for output in chosen for path in medium.write(folder, case_id, output, prediction.probs, prediction.source, prediction.card)]


def write_description(folder: Path, card: DataCard) -> bool:
    """Write ``dataset.json`` beside predictions, as nnU-Net does: names of the classes or what the regions are made of, and the ignored label, for whoever reads them.

    Returns:
        False where there is such a file already that says something else: it is left as it is.
    """
    path, content = folder / "dataset.json", description_of(card)
    if path.exists() and path.read_text(encoding="utf-8") != content:
        return False
    write_atomically(path, content)
    return True
