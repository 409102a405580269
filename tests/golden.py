"""Finds the golden reference numbers: tiny models of each family and what the original implementation computes."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PLACES = [
    Path(os.environ.get("TRAINWRIGHT_GOLDEN", "/nonexistent")),
    HERE / "golden",
    HERE.parents[1] / "shared" / "golden",
]


def golden_dir(family: str) -> Path:
    """The folder of one family (config.json, model.safetensors, io.safetensors); skips the test where there is none."""
    for place in PLACES:
        if (place / family / "io.safetensors").exists():
            return place / family
    pytest.skip(f"no golden numbers of {family}: set TRAINWRIGHT_GOLDEN to the folder that holds them")
