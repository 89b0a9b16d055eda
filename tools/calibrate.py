"""Repair the probabilities of a trained run, or anybody's saved ones: ``uv run tools/calibrate.py run=RUN``. Installed as ``densecal-calibrate``."""

from densecal.cli.calibrate import main

if __name__ == "__main__":
    main()
