"""A checkpoint of any layout resumes in any other, with the same losses and the same rows; in its own bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.worlds import RankError, run
from tests.train.small import CONFIG, small_recipe
from trainwright.train import checkpoint
from trainwright.train.checkpoint import list_checkpoints
from trainwright.train.metrics import read_lines
from trainwright.train.signals import StopRequest
from trainwright.train.trainer import Trainer

BATCH = ("train.global_batch_size=8", "train.micro_batch_size=1", "data.validation=0", "checkpoint.every=2")
CHAIN: list[tuple[int, tuple[str, ...]]] = [
    (2, ("parallel.zero=1",)),
    (4, ("parallel.tp=2", "parallel.zero=3")),
    (4, ("parallel.pp=2", "parallel.cp=2")),
    (2, ("parallel.pp=2", "parallel.pp_schedule=zbv")),
    (1, ()),
    (4, ("parallel.dp_replicate=2",)),
    (4, ("parallel.tp=4", "parallel.recompute=full")),
    (2, ("parallel.zero=0",)),
]


SPARSE = CONFIG | {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
EXPERTS: list[tuple[int, tuple[str, ...]]] = [
    (2, ("parallel.ep=2",)),  # left out of FSDP
    (4, ("parallel.ep=2",)),
    (1, ()),
    (4, ("parallel.ep=2", "parallel.tp=2")),
    (2, ("parallel.ep=2", "parallel.offload=optimizer")),
    (4, ("parallel.ep=4",)),
]


def segment(
    folder: Path, name: str, words: tuple[str, ...], until: int, last: int, config: dict[str, Any] | None = None
) -> None:
    """Goes on with a run of `last` steps until step `until`, as one rank of this world."""
    recipe = small_recipe(
        folder, f"name={name}", *BATCH, f"train.steps={last}", *words, model={"config": config or CONFIG}
    )
    trainer = Trainer(recipe, resume=True)
    trainer.total_steps = until
    try:
        with StopRequest() as stop:
            trainer._fit(stop)
    finally:
        trainer.close()


def losses(folder: Path, name: str) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "runs" / name / "metrics.jsonl")]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint, by file and box."""
    newest = list_checkpoints(folder / "runs" / name / "checkpoints")[-1].path
    return {f"{file.name}/{key}": value for file in newest.glob("tensors-*") for key, value in load_file(file).items()}


def test_every_layout_goes_on_where_another_stopped(tmp_path: Path) -> None:
    steps = 2 * len(CHAIN)
    run(1, segment, tmp_path, "straight", (), steps, steps)
    for number, (size, words) in enumerate(CHAIN, 1):
        run(size, segment, tmp_path, "chain", words, 2 * number, steps)
    expected, found = losses(tmp_path, "straight"), losses(tmp_path, "chain")
    assert len(found) == steps
    assert found == pytest.approx(expected, rel=1e-5)


def test_experts_go_on_in_every_layout(tmp_path: Path) -> None:
    steps = 2 * len(EXPERTS)
    run(1, segment, tmp_path, "straight", (), steps, steps, SPARSE)
    for number, (size, words) in enumerate(EXPERTS, 1):
        run(size, segment, tmp_path, "chain", words, 2 * number, steps, SPARSE)
    assert losses(tmp_path, "chain") == pytest.approx(losses(tmp_path, "straight"), rel=1e-5)


@pytest.mark.parametrize("words", [("parallel.tp=2", "parallel.zero=2"), ("parallel.pp=2",)], ids="-".join)
def test_the_same_layout_goes_on_bit_for_bit(words: tuple[str, ...], tmp_path: Path) -> None:
    run(4, segment, tmp_path, "straight", words, 4, 4)
    run(4, segment, tmp_path, "halves", words, 2, 4)
    run(4, segment, tmp_path, "halves", words, 4, 4)
    assert losses(tmp_path, "halves") == losses(tmp_path, "straight")
    one, two = weights(tmp_path, "straight"), weights(tmp_path, "halves")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def killed_in_its_save(folder: Path, words: tuple[str, ...], save: int) -> None:
    """Rank 1 dies while it writes its part of the save of this step."""
    real = checkpoint.write_chunks

    def write(partial: Path, rank: int, chunks: list) -> list:  # type: ignore[type-arg]
        if rank == 1 and f"{save:08d}" in str(partial):
            real(partial, rank, chunks[: len(chunks) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(partial, rank, chunks)

    checkpoint.write_chunks = write
    segment(folder, "killed", words, 6, 6)


def test_a_rank_killed_in_a_save_loses_nothing(tmp_path: Path) -> None:
    run(2, segment, tmp_path, "straight", (), 6, 6)
    with pytest.raises(RankError):
        run(2, killed_in_its_save, tmp_path, (), 4, seconds=60)
    left = list_checkpoints(tmp_path / "runs" / "killed" / "checkpoints")
    assert [found.step for found in left] == [2]
    run(2, segment, tmp_path, "killed", (), 6, 6)
    assert losses(tmp_path, "killed") == losses(tmp_path, "straight")
