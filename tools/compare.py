"""Train several runs and put them side by side: ``uv run tools/compare.py study=distill_hippocampus``. Installed as ``densecal-compare``."""

from densecal.cli.compare import main

if __name__ == "__main__":
    main()
