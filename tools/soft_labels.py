"""Write a teacher's soft labels: ``uv run tools/soft_labels.py run=RUN output=DIR``. Installed as ``densecal-soft-labels``."""

from densecal.cli.soft_labels import main

if __name__ == "__main__":
    main()
