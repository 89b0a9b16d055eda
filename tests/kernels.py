"""Where the tests of fused kernels run: on a GPU, or on a CPU in the process that ``tests/ops/triton/test_interpreter.py`` starts."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

needs_kernels = [] if INTERPRETED else pytest.mark.gpu
