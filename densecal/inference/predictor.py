"""A trained run as a function from files to probabilities on the files' own grid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import nibabel as nib
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from densecal.checks import check_choice, plain
from densecal.data.card import DataCard
from densecal.data.transforms import load_image, restore
from densecal.data.volumes import read_nifti
from densecal.inference.sliding_window import SlidingWindow
from densecal.models.pretrained import without_pretrained
from densecal.runs import find_checkpoint, read_checkpoint

__all__ = ["OUTPUTS", "Prediction", "Predictor", "resolve_device", "write_prediction"]

OUTPUTS = ("label", "probs", "confidence")


@dataclass(frozen=True)
class Prediction:
    """What a network says about one image file.

    Args:
        probs: ``(C, *spatial)``, float32, on the grid of the file.
        image: The image as the network saw it (normalised, maybe resampled), ``(C_in, *spatial)``.
        header: Header of the file: the grid, its place in space and its units.
    """

    probs: Tensor
    image: Tensor
    header: Any

    @property
    def label_map(self) -> Tensor:
        """Most probable class ``(*spatial)``, int64."""
        return self.probs.argmax(dim=0)

    @property
    def confidence(self) -> Tensor:
        """Probability of that class ``(*spatial)``, in [1/C, 1]."""
        return self.probs.amax(dim=0)


class Predictor:
    """A network with the preprocessing and the sliding window it was trained for.

    Args:
        model: The network; it is moved to ``device`` and put in evaluation mode.
        card: Data set card that says how images are prepared.
        window: Sliding window.
        device: Where to compute.

    Example:
        >>> predictor = Predictor.from_run("runs/task04_hippocampus_svls/2026-01-31_12-00-00")  # doctest: +SKIP
        >>> predictor("scan.nii.gz").probs.shape  # doctest: +SKIP
        torch.Size([3, 35, 51, 35])
    """

    def __init__(self, model: nn.Module, card: DataCard, window: SlidingWindow, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.float().to(self.device).eval()
        self.card = card
        self.window = window
        self.config: DictConfig | None = None
        """Of the run, where the network comes from one."""

    @classmethod
    def from_run(cls, run: Path | str, checkpoint: str = "best", device: torch.device | str = "cpu") -> Predictor:
        """Load a run; its checkpoint holds the config that built it.

        Args:
            run: Run directory, or a checkpoint file.
            checkpoint: ``"best"`` or ``"last"``.
            device: Where to compute.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
            ValueError: If it is not densecal's, or damaged.
        """
        path = find_checkpoint(Path(run), checkpoint)
        content = read_checkpoint(path)
        config = OmegaConf.create(content["densecal"]["config"])
        card = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataCard), config.data))
        assert isinstance(card, DataCard)
        known: dict[str, Any] = {"in_channels": card.image_channels, "num_classes": len(card.classes), "spatial_dims": card.spatial_dims}
        known |= without_pretrained(hydra.utils.get_object(config.model._target_))
        model = hydra.utils.instantiate(config.model, **known, _convert_="all")
        weights = {name.removeprefix("model."): value for name, value in content["state_dict"].items() if name.startswith("model.")}
        model.load_state_dict(weights)
        window = hydra.utils.instantiate(config.inference, patch_size=list(card.patch_size), _convert_="all")
        predictor = cls(model, card, window, device)
        predictor.config = config
        return predictor

    @torch.inference_mode()
    def __call__(self, path: Path | str | Iterable[Path | str]) -> Prediction:
        """Predict one image.

        Args:
            path: NIfTI file; several are stacked as channels.

        Raises:
            ValueError: If a file cannot be read or has another number of channels than the network; the text names it.
        """
        paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(p) for p in path]
        names = " and ".join(str(p) for p in paths)
        try:
            header = read_nifti(paths[0]).header
            image, transform = load_image(paths, self.card)
        except Exception as error:
            cause = error.__cause__ or error
            reason = str(cause).strip().splitlines()[0].rstrip(".") if str(cause).strip() else type(cause).__name__
            raise ValueError(f"{names}: cannot be read ({reason}). Expected a NIfTI volume.") from error
        if image.shape[0] != self.card.image_channels or image.ndim != self.card.spatial_dims + 1:
            raise ValueError(
                f"{names}: expected {self.card.image_channels} channel(s) and {self.card.spatial_dims} spatial dims, as in training, but got "
                f"{tuple(image.shape)} (channels first)."
            )
        if bad := int((~torch.isfinite(image)).sum()):
            raise ValueError(f"{names}: holds {bad} NaN or infinite voxel(s). Replace them, with np.nan_to_num for example.")
        probs = self.window(self.model, plain(image).unsqueeze(0).to(self.device))[0].cpu()
        return Prediction(restore(probs, image, transform), plain(image), header)


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


def write_prediction(prediction: Prediction, folder: Path, case_id: str, outputs: Iterable[str] = OUTPUTS) -> list[Path]:
    """Write a prediction as NIfTI files on the grid of the image, each whole or not at all.

    Args:
        prediction: The prediction.
        folder: Where to; made if missing.
        case_id: Start of the file names.
        outputs: Any of ``"label"`` (``<id>_label.nii.gz``, most probable class, uint8), ``"probs"`` (``<id>_probs.nii.gz``, ``(X, Y, Z, C)`` float32) and
            ``"confidence"`` (``<id>_confidence.nii.gz``, probability of the most probable class, float32).

    Returns:
        The files.

    Raises:
        ValueError: If an output is unknown.
    """
    paths = []
    for output in outputs:
        check_choice("outputs", output, OUTPUTS)
        if output == "label":
            values = prediction.label_map.numpy().astype(np.uint8 if prediction.probs.shape[0] <= 256 else np.int16)
        elif output == "probs":
            values = prediction.probs.movedim(0, -1).numpy().astype(np.float32)
        else:
            values = prediction.confidence.numpy().astype(np.float32)
        paths.append(_write_nifti(folder / f"{case_id}_{output}.nii.gz", values, prediction.header))
    return paths


def _write_nifti(path: Path, values: np.ndarray, source: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, source.get_best_affine())  # a fresh header: intensity scaling and display range of the source do not apply
    image.header.set_xyzt_units(*source.get_xyzt_units())
    image.set_qform(*source.get_qform(coded=True) if source["qform_code"] else (None, 0))
    if source["sform_code"]:
        image.set_sform(*source.get_sform(coded=True))
    else:
        image.set_sform(None, 0)
    partial = path.with_name(f".partial-{path.name}")
    try:
        nib.save(image, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
