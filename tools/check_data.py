"""Look at a data set before training on it: ``uv run tools/check_data.py hippocampus --root DIR``. Installed as ``densecal-check``."""

from densecal.cli.check_data import main

if __name__ == "__main__":
    main()
