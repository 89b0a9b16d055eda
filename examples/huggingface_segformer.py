"""SegFormer in the Trainer of Hugging Face: logits at a quarter of the labels' resolution, metrics batch by batch.

    pip install transformers accelerate
    python examples/huggingface_segformer.py --epochs 20

The network is made from a configuration, with random weights; `SegformerForSemanticSegmentation.from_pretrained` takes its place where there is a
network to download. Runs on CamVid where $DENSECAL_DATA holds it, else on made data.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from example_data import camvid
from PIL import Image
from torch.utils.data import Dataset
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor, Trainer, TrainingArguments, set_seed

from densecal.integrations.huggingface import TrainerLoss, TrainerMetrics
from densecal.losses import SVLSLoss
from densecal.metrics import ExpectedCalibrationError, JaccardIndex

CLASSES, VOID = 11, 11


class Scenes(Dataset):
    """Pictures and label maps of a split of CamVid, as SegFormer takes them."""

    def __init__(self, root: Path, split: str, limit: int | None, processor: SegformerImageProcessor) -> None:
        self.files = sorted((root / split).glob("*.png"))[:limit]
        self.processor = processor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        file = self.files[index]
        image = np.asarray(Image.open(file).convert("RGB"))
        label = np.asarray(Image.open(file.parents[1] / f"{file.parent.name}annot" / file.name))
        return {name: values[0] for name, values in self.processor(image, label, return_tensors="pt").items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--size", type=int, nargs=2, default=(120, 160), help="rows and columns of the pictures")
    parser.add_argument("--limit", type=int, help="pictures of each split")
    parser.add_argument("--output", default="runs/huggingface_segformer")
    args = parser.parse_args()
    set_seed(0)

    processor = SegformerImageProcessor(size={"height": args.size[0], "width": args.size[1]})
    root = camvid()
    config = SegformerConfig(
        num_labels=CLASSES, semantic_loss_ignore_index=VOID, hidden_sizes=[16, 32, 64, 128], decoder_hidden_size=64, depths=[1] * 4
    )
    trainer = Trainer(
        model=SegformerForSemanticSegmentation(config),
        args=TrainingArguments(
            output_dir=args.output,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=1e-3,
            eval_strategy="epoch",
            batch_eval_metrics=True,  # a few bins, not the logits of the whole set
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=Scenes(root, "train", args.limit, processor),
        eval_dataset=Scenes(root, "val", args.limit, processor),
        compute_loss_func=TrainerLoss(SVLSLoss(ignore_index=VOID)),
        compute_metrics=TrainerMetrics(
            {"ece": ExpectedCalibrationError(ignore_index=VOID), "iou": JaccardIndex(CLASSES, background=None, ignore_index=VOID)}
        ),
    )
    trainer.train()
    print("validation: ECE {eval_ece:.3f}, IoU {eval_iou:.3f}".format(**trainer.evaluate()))


if __name__ == "__main__":
    main()
