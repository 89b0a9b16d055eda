"""Time and memory beside other libraries: ``uv run tools/benchmark.py metrics``. Installed as ``densecal-benchmark``."""

from densecal.cli.benchmark import main

if __name__ == "__main__":
    main()
