"""``densecal-train``: train, test and report."""

from __future__ import annotations

from omegaconf import DictConfig

from densecal.cli.configuration import command

__all__ = ["main"]


def main() -> None:
    """Train, test and report; ``configs/train.yaml`` lists the settings."""
    command("train", _train)


def _train(config: DictConfig) -> None:
    from densecal.cli.training import train  # a mistyped setting need not wait for Lightning and MONAI

    train(config)


if __name__ == "__main__":
    main()
