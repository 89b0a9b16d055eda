"""Where nnU-Net looks for outside trainers: it imports every module in the folder that ``nnUNet_extTrainer`` names, and asks for the class by its name."""

from typing import Any


def __getattr__(name: str) -> Any:
    from densecal.integrations.nnunet import trainer_class

    return trainer_class(name)
