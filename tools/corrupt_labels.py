"""Copy a data set with known errors in some label maps: ``uv run tools/corrupt_labels.py data=CARD data.root=DIR output=DIR``. Installed as ``densecal-corrupt``."""

from densecal.cli.corrupt_labels import main

if __name__ == "__main__":
    main()
