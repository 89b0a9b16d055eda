"""A LightningModule of one's own on volumes, with a loss of densecal in it and its metrics in a callback beside it.

    python examples/lightning_hippocampus.py --epochs 20

Runs on the hippocampus of the Medical Segmentation Decathlon where $DENSECAL_DATA holds it, else on made data.
"""

import argparse
from pathlib import Path

import lightning as L
import nibabel as nib
import torch
from example_data import hippocampus
from lightning.pytorch.callbacks import ModelCheckpoint
from monai.networks.nets import UNet
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from densecal.integrations.lightning import CalibrationCallback
from densecal.losses import SVLSLoss
from densecal.metrics import DiceScore, ExpectedCalibrationError, NegativeLogLikelihood

SHAPE, NO_CLASS = (48, 64, 48), -100


class Volumes(Dataset):
    """z-scored volumes of one shape; what was added around them has no class."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        file = self.files[index]
        image = torch.from_numpy(nib.load(file).get_fdata(dtype="float32"))
        label = torch.from_numpy(nib.load(file.parents[1] / "labelsTr" / file.name).get_fdata(dtype="float32")).long()
        padding = [side for have, want in zip(reversed(image.shape), reversed(SHAPE), strict=True) for side in (0, want - have)]
        return F.pad((image - image.mean()) / image.std(), padding).unsqueeze(0), F.pad(label, padding, value=NO_CLASS)


class Segmentation(L.LightningModule):
    """The usual four methods."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = UNet(spatial_dims=3, in_channels=1, out_channels=3, channels=(16, 32, 64), strides=(2, 2), norm="instance")
        self.loss = SVLSLoss(ignore_index=NO_CLASS)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.model(image)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.loss(self(batch[0]), batch[1])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
        return {"probs": self(batch[0]).softmax(dim=1)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--limit", type=int, help="number of volumes")
    parser.add_argument("--output", default="runs/lightning_hippocampus")
    args = parser.parse_args()
    L.seed_everything(0)

    files = sorted((hippocampus() / "imagesTr").glob("[!.]*.nii.gz"))[: args.limit]
    held_out = max(2, len(files) // 5 // 2 * 2)  # two volumes of a person follow each other
    calibration = CalibrationCallback(
        {"ece": ExpectedCalibrationError(), "nll": NegativeLogLikelihood(), "dice": DiceScore(3)},
        output_transform=lambda outputs, batch: (outputs["probs"], batch[1]),
    )
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[calibration, ModelCheckpoint(monitor="val/nll")],  # a proper score: an ECE alone is small for a model that knows nothing
        default_root_dir=args.output,
        log_every_n_steps=1,
    )
    trainer.fit(Segmentation(), DataLoader(Volumes(files[:-held_out]), 4, shuffle=True), DataLoader(Volumes(files[-held_out:]), 4))
    print("validation: ECE {val/ece:.3f}, Dice {val/dice:.3f}".format(**trainer.callback_metrics))


if __name__ == "__main__":
    main()
