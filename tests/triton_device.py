"""Where tests run Triton's kernels: on a GPU, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def triton_device() -> torch.device:
    """Their device; skips the module that asks where there is neither."""
    pytest.importorskip("triton")
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
    return torch.device("cpu" if INTERPRETED else "cuda")
