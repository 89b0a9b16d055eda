"""Train, test and report: ``uv run tools/train.py data=hippocampus loss=svls``. Installed as ``densecal-train``."""

from densecal.cli.train import main

if __name__ == "__main__":
    main()
