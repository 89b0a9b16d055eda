"""Evaluate a trained run, or anybody's saved predictions: ``uv run tools/evaluate.py predictions=DIR labels=DIR``. Installed as ``densecal-evaluate``."""

from densecal.cli.evaluate import main

if __name__ == "__main__":
    main()
