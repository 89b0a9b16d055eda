"""Rank the labels of a data set by how wrong they look: ``uv run tools/find_label_errors.py runs=DIR``. Installed as ``densecal-find-label-errors``."""

from densecal.cli.find_label_errors import main

if __name__ == "__main__":
    main()
