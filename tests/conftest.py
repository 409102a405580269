"""Fixtures that every room shares."""

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
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


@cache
def together(file: str) -> str | None:
    """The tests of one worker: those that start worlds of processes, and those of a file that share a fixture."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.startswith("tests/parallel/") or "from tests.parallel.worlds import" in text:
        return "worlds"
    return file if 'scope="module"' in text else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Nothing is started in two workers, and worlds do not compete. From pytest 9.2 on xdist loses its own groups."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return together(nodeid.partition("::")[0]) or nodeid

    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, so that the workers end together."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The worlds end with the last of their tests: even idle, their threads take a good part of a core."""
    here, there = (each and together(each.nodeid.partition("::")[0]) for each in (item, nextitem))
    if here == "worlds" != there and "tests.parallel.worlds" in sys.modules:
        sys.modules["tests.parallel.worlds"].stop_all()
