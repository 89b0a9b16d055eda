"""Seeds that depend on where a run is, not on how it got there."""

from __future__ import annotations

import hashlib

__all__ = ["derive_seed"]


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^32) from numbers and words, the same on every machine and in every process (Python's ``hash`` is not).

    Example:
        >>> derive_seed(0, "crop", 3, "case_07") == derive_seed(0, "crop", 3, "case_07")
        True
        >>> derive_seed(0, "crop", 3, "case_07") == derive_seed(0, "crop", 4, "case_07")
        False
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
