"""Fixtures that every room shares."""

from pathlib import Path

import pytest


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
