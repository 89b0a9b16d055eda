"""Put finished runs side by side, with their spread over seeds: ``uv run tools/compare.py runs=DIR``. Installed as ``densecal-compare``."""

from densecal.cli.compare import main

if __name__ == "__main__":
    main()
