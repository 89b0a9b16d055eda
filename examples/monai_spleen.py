"""MONAI's spleen segmentation, with two lines changed:

    -from monai.losses import DiceCELoss
    +from densecal.losses import SVLSLoss

    -    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    +    loss_function = SVLSLoss()

What was added is the calibration error, beside MONAI's Dice. `configs/monai_bundle` is the same for MONAI's bundles.

    python examples/monai_spleen.py --epochs 600

Runs on Task09_Spleen of the Medical Segmentation Decathlon where $DENSECAL_DATA holds it, else on made volumes in Hounsfield units.
"""

import argparse

import torch
from example_data import is_made, spleen
from monai.data import CacheDataset, DataLoader, decollate_batch
from monai.inferers import sliding_window_inference
from monai.metrics import DiceMetric
from monai.networks.layers import Norm
from monai.networks.nets import UNet
from monai.transforms import (
    AsDiscrete,
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandCropByPosNegLabeld,
    ScaleIntensityRanged,
    Spacingd,
)
from monai.utils import set_determinism

from densecal.losses import SVLSLoss
from densecal.metrics import ExpectedCalibrationError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--roi", type=int, help="side of a patch: 96, of made volumes 32")
    args = parser.parse_args()
    set_determinism(seed=0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    root = spleen()
    roi = (args.roi or (32 if is_made(root) else 96),) * 3
    files = [{"image": path, "label": root / "labelsTr" / path.name} for path in sorted((root / "imagesTr").glob("[!.]*.nii.gz"))]
    held_out = max(1, len(files) // 5)
    both = ["image", "label"]
    steps = [
        LoadImaged(keys=both),
        EnsureChannelFirstd(keys=both),
        ScaleIntensityRanged(keys="image", a_min=-57, a_max=164, b_min=0.0, b_max=1.0, clip=True),
        CropForegroundd(keys=both, source_key="image", allow_smaller=True),
        Orientationd(keys=both, axcodes="RAS", labels=None),
        Spacingd(keys=both, pixdim=(1.5, 1.5, 2.0), mode=("bilinear", "nearest")),
    ]
    crop = RandCropByPosNegLabeld(keys=both, label_key="label", spatial_size=roi, pos=1, neg=1, num_samples=4, image_key="image")
    train_loader = DataLoader(CacheDataset(files[:-held_out], Compose([*steps, crop]), progress=False), batch_size=2, shuffle=True)
    val_loader = DataLoader(CacheDataset(files[-held_out:], Compose(steps), progress=False), batch_size=1)

    model = UNet(3, 1, 2, channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2, norm=Norm.BATCH).to(device)
    loss_function = SVLSLoss()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    dice, ece = DiceMetric(include_background=False), ExpectedCalibrationError().to(device)
    post_pred, post_label = AsDiscrete(argmax=True, to_onehot=2), AsDiscrete(to_onehot=2)
    for epoch in range(args.epochs):
        model.train()
        for batch in train_loader:
            optimizer.zero_grad()
            loss = loss_function(model(batch["image"].to(device)), batch["label"].to(device))
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    model.eval()
    with torch.no_grad():
        for batch in val_loader:
            label = batch["label"].to(device)
            logits = sliding_window_inference(batch["image"].to(device), roi, 4, model)
            dice([post_pred(one) for one in decollate_batch(logits)], [post_label(one) for one in decollate_batch(label)])
            ece.update(logits.softmax(dim=1), label)
    print(f"validation: ECE {ece.compute():.3f}, Dice {dice.aggregate().item():.3f}")


if __name__ == "__main__":
    main()
