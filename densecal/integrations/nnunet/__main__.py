"""``export nnUNet_extTrainer=$(python -m densecal.integrations.nnunet)``"""

from densecal.integrations.nnunet import lookup_folder

if __name__ == "__main__":
    print(lookup_folder())
