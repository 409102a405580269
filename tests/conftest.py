"""Fixtures that every room shares."""

import os
from pathlib import Path

import hypothesis
import pytest

# Shared machines: no deadline, and fewer examples than Hypothesis would take. The same ones in every run, so that a red
# run can be repeated; TRAINWRIGHT_FUZZ=1 draws new ones.
FUZZ = bool(os.environ.get("TRAINWRIGHT_FUZZ"))
hypothesis.settings.register_profile("trainwright", deadline=None, max_examples=40, derandomize=not FUZZ)
hypothesis.settings.load_profile("trainwright")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of a real model, SmolLM2-135M-Instruct; see tests/smollm2.py."""
    from tests.smollm2 import model_folder

    return model_folder()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start worlds of processes go to one xdist worker: the worlds are started once, and do not compete."""
    for item in items:
        if "tests/parallel/" in item.path.as_posix():
            item.add_marker(pytest.mark.xdist_group("worlds"))
