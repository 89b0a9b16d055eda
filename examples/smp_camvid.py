"""A network of segmentation-models-pytorch and an albumentations pipeline on street scenes.

    python examples/smp_camvid.py --epochs 20
    python examples/smp_camvid.py --arch segformer --encoder mit_b0 --weights imagenet

Runs on CamVid where $DENSECAL_DATA holds it, else on made data.
"""

import argparse
from pathlib import Path

import albumentations as A
import cv2
import segmentation_models_pytorch as smp
import torch
from albumentations.pytorch import ToTensorV2
from example_data import camvid
from torch.utils.data import DataLoader, Dataset

from densecal.losses import JaccardMetricLoss, SVLSLoss
from densecal.metrics import ExpectedCalibrationError, JaccardIndex

CLASSES, VOID = 11, 11


class Scenes(Dataset):
    """Pictures and label maps of a split of CamVid."""

    def __init__(self, root: Path, split: str, limit: int | None, transform: A.Compose) -> None:
        self.files = sorted((root / split).glob("*.png"))[:limit]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        file = self.files[index]
        image = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
        mask = cv2.imread(str(file.parents[1] / f"{file.parent.name}annot" / file.name), cv2.IMREAD_UNCHANGED)
        item = self.transform(image=image, mask=mask)
        return item["image"], item["mask"].long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="unet")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--weights", help="of the encoder, such as imagenet")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, default=(96, 128), help="rows and columns of a crop, multiples of 32")
    parser.add_argument("--limit", type=int, help="pictures of each split")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    padding = {"border_mode": cv2.BORDER_CONSTANT, "fill_mask": VOID}  # what is beyond a picture is no class
    crop = [A.RandomScale((-0.5, 0.0), p=1.0), A.RandomCrop(*args.size, pad_if_needed=True, **padding), A.HorizontalFlip(), A.ColorJitter(p=0.5)]
    whole = [A.PadIfNeeded(min_height=None, min_width=None, pad_height_divisor=32, pad_width_divisor=32, **padding)]
    root = camvid()
    train_set, val_set = (
        Scenes(root, split, args.limit, A.Compose([*steps, A.Normalize(), ToTensorV2()], seed=0))
        for split, steps in (("train", crop), ("val", whole))
    )
    train_loader, val_loader = DataLoader(train_set, args.batch_size, shuffle=True, drop_last=True), DataLoader(val_set, 1)

    model = smp.create_model(args.arch, args.encoder, args.weights, classes=CLASSES).to(device)
    svls, jml = SVLSLoss(ignore_index=VOID).to(device), JaccardMetricLoss(ignore_index=VOID).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(args.epochs):
        model.train()
        for image, label in train_loader:
            logits, label = model(image.to(device)), label.to(device)
            loss = 0.5 * svls(logits, label) + 0.5 * jml(logits, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    model.eval()
    ece = ExpectedCalibrationError(ignore_index=VOID).to(device)
    iou = JaccardIndex(CLASSES, background=None, ignore_index=VOID).to(device)
    with torch.inference_mode():
        for image, label in val_loader:
            probs = model(image.to(device)).softmax(dim=1)
            for metric in (ece, iou):
                metric.update(probs, label.to(device))
    print(f"validation: ECE {ece.compute():.3f}, IoU {iou.compute():.3f}")


if __name__ == "__main__":
    main()
