"""Fixtures that every room shares."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of a real model, SmolLM2-135M-Instruct; see tests/smollm2.py."""
    from tests.smollm2 import model_folder

    return model_folder()
