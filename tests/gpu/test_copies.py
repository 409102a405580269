"""Shards that copy engines move: the very numbers of NCCL, since two ranks have one order of a sum."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train.small import small_recipe
from trainwright.train.metrics import read_lines

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")]


def losses_and_weights(folder: Path, transport: str, *words: str) -> tuple[list[float], bytes]:
    recipe = small_recipe(folder, f"name={transport}", "train.precision=bf16", f"parallel.fsdp_transport={transport}")
    path = folder / f"{transport}.json"
    path.write_text(recipe.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "trainwright", "train", str(path), "--gpus", "2", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = folder / "runs" / transport
    lines = read_lines(run / "metrics.jsonl")
    return [line["loss"] for line in lines], (run / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_copies_give_what_nccl_gives(tmp_path: Path, zero: int) -> None:
    words = (f"parallel.zero={zero}", "train.deterministic=true", "train.compile=false")
    expected, given = (losses_and_weights(tmp_path, transport, *words) for transport in ("nccl", "copy"))
    assert len(expected[0]) == 12
    assert given == expected
