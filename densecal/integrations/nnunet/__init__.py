"""Losses of this package in nnU-Net v2: any of them, on any of its trainers, chosen by name and settings.

nnU-Net finds them through the environment variable ``nnUNet_extTrainer``::

    export nnUNet_extTrainer=$(python -m densecal.integrations.nnunet)
    nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerDensecal_svls --npz
    DENSECAL_NNUNET="loss.sigma=1.5 epochs=250" nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerDensecal_svls-wide --npz
    DENSECAL_NNUNET="loss=compound target=svls term=[ce,dml]" nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerDA5Densecal-svls_dml --npz

A name is that of the trainer to build on, ``Densecal``, maybe ``_`` and a loss (a file of ``configs/loss/``), and maybe ``-`` and a word of one's own, which keeps
trainings with other settings in folders of their own. Settings are those of ``configs/nnunet.yaml``. Prediction needs ``nnUNet_extTrainer``, but no settings.

nnunetv2 is imported when a trainer is asked for.
"""

from densecal.integrations.nnunet.loss import NNUNetLoss
from densecal.integrations.nnunet.trainer import DensecalTrainer, lookup_folder, trainer_class, trainer_settings

__all__ = ["DensecalTrainer", "NNUNetLoss", "lookup_folder", "trainer_class", "trainer_settings"]
