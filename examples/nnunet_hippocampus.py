"""nnU-Net v2 from raw files to an audit of its probabilities, with a loss of densecal that the name of the trainer says.

    python examples/nnunet_hippocampus.py --epochs 20

Runs on the hippocampus of the Medical Segmentation Decathlon where $DENSECAL_DATA holds it, else on made data. It needs nnunetv2 (extra nnunet), and prints each
command that it runs.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from example_data import hippocampus

from densecal.integrations.nnunet import lookup_folder

LABELS = {"background": 0, "anterior": 1, "posterior": 2}


def raw_layout(source: Path, folder: Path, limit: int | None) -> list[str]:
    """nnU-Net's raw layout of volumes in that of the Decathlon; returns the names of the cases."""
    files = sorted((source / "imagesTr").glob("[!.]*.nii.gz"))[:limit]
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, folder / "imagesTr" / file.name.replace(".nii.gz", "_0000.nii.gz"))
        shutil.copy(source / "labelsTr" / file.name, folder / "labelsTr" / file.name)
    content = {"channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": len(files), "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content, indent=2))
    return [file.name.removesuffix(".nii.gz") for file in files]


def run(*command: str, **variables: str) -> None:
    print("$", *(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(command), flush=True)
    subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], env=os.environ | variables, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=20, help="batches in an epoch; nnU-Net's own number is 250")
    parser.add_argument("--limit", type=int, help="number of volumes")
    parser.add_argument("--loss", default="svls")
    parser.add_argument("--output", type=Path, default=Path("runs/nnunet_hippocampus"))
    args = parser.parse_args()

    root = args.output.resolve()
    os.environ |= {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")} | {"nnUNet_extTrainer": str(lookup_folder())}
    dataset, trainer = "Dataset004_Hippocampus", f"nnUNetTrainerDensecal_{args.loss}"
    names = raw_layout(hippocampus(), root / "raw" / dataset, args.limit)
    run("nnUNetv2_plan_and_preprocess", "-d", "4", "-c", "3d_fullres", "-np", "2")
    held_out = max(2, len(names) // 5 // 2 * 2)  # two volumes of a person follow each other; nnU-Net's own folds would part them
    splits = [{"train": names[:-held_out], "val": names[-held_out:]}]
    (root / "preprocessed" / dataset / "splits_final.json").write_text(json.dumps(splits))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = f"epochs={args.epochs} iterations={args.iterations} val_iterations=2"
    run("nnUNetv2_train", "4", "3d_fullres", "0", "-tr", trainer, "--npz", "-device", device, DENSECAL_NNUNET=settings)
    validation = root / "results" / dataset / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0" / "validation"
    labels = root / "raw" / dataset / "labelsTr"
    run("densecal-evaluate", f"predictions={validation}", f"labels={labels}", f"output={root / 'audit'}")
    scores = json.loads((root / "audit" / "summary.json").read_text())
    print(f"validation: ECE {scores['pooled']['all']['ece_top_label']:.3f}, Dice {scores['mean']['dice']:.3f}")


if __name__ == "__main__":
    main()
