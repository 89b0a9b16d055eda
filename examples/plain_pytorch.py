"""A loop of one's own in plain PyTorch: a torchvision network on street scenes, with mixed precision and torch.compile where they are asked for.

    python examples/plain_pytorch.py --epochs 20
    python examples/plain_pytorch.py --amp --compile --device cuda

Runs on CamVid where $DENSECAL_DATA holds it, else on made data.
"""

import argparse
from pathlib import Path

import torch
from example_data import camvid
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.io import decode_image
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from torchvision.transforms import v2

from densecal.losses import SVLSLoss
from densecal.metrics import ExpectedCalibrationError, JaccardIndex

CLASSES, VOID = 11, 11


class Scenes(Dataset):
    """Pictures and label maps of a split of CamVid."""

    def __init__(self, root: Path, split: str, limit: int | None, transform: v2.Transform) -> None:
        self.files = sorted((root / split).glob("*.png"))[:limit]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        file = self.files[index]
        image = tv_tensors.Image(decode_image(str(file), mode="RGB"))
        label = tv_tensors.Mask(decode_image(str(file.parents[1] / f"{file.parent.name}annot" / file.name))[0])
        image, label = self.transform(image, label)
        return image.as_subclass(torch.Tensor), label.as_subclass(torch.Tensor).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, default=(120, 160), help="rows and columns of the pictures")
    parser.add_argument("--limit", type=int, help="pictures of each split")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)

    finish = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    train = v2.Compose([v2.Resize(args.size), v2.RandomHorizontalFlip(), *finish])
    root = camvid()
    train_loader = DataLoader(Scenes(root, "train", args.limit, train), args.batch_size, shuffle=True, drop_last=True)
    val_loader = DataLoader(Scenes(root, "val", args.limit, v2.Compose([v2.Resize(args.size), *finish])), args.batch_size)

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES).to(args.device)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1  # the 0.01 of this network is for long trainings
    loss_function = SVLSLoss(ignore_index=VOID).to(args.device)
    step = torch.compile(model) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(args.epochs):
        model.train()
        for image, label in train_loader:
            with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
                logits = step(image.to(args.device))["out"]
                loss = loss_function(logits, label.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    model.eval()
    ece = ExpectedCalibrationError(ignore_index=VOID).to(args.device)
    iou = JaccardIndex(CLASSES, background=None, ignore_index=VOID).to(args.device)
    with torch.inference_mode():
        for image, label in val_loader:
            probs = model(image.to(args.device))["out"].softmax(dim=1)
            for metric in (ece, iou):
                metric.update(probs, label.to(args.device))
    print(f"validation: ECE {ece.compute():.3f}, IoU {iou.compute():.3f}")


if __name__ == "__main__":
    main()
