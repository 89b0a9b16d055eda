"""Predict NIfTI volumes with a trained run: ``uv run tools/predict.py run=RUN input=FOLDER output=FOLDER``. Installed as ``densecal-predict``."""

from densecal.cli.predict import main

if __name__ == "__main__":
    main()
