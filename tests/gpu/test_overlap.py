"""Exchanges by copy engines beside products: exactly what collectives give, many times over."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.gpu.test_copies import losses_and_weights
from trainwright.parallel import overlap
from trainwright.parallel.copies import Ring

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")]
ROWS, HIDDEN, WIDTHS, ROUNDS = 8192, 64, (64, 32, 32), 40


def whole_numbers(*shape: int) -> Tensor:
    """-1, 0 and 1: sums of products of 64 are exact in bf16, whatever their order."""
    return torch.randint(-1, 2, shape, device="cuda").bfloat16()


def part(x: Tensor, a: Tensor, weights: list[Tensor], last: Tensor, group: str) -> list[Tensor]:
    """Both operations, and the gradients of a sum that weighs their results with whole numbers."""
    leaves = [leaf.clone().requires_grad_() for leaf in (x, a, *weights, last)]
    made = overlap.gather_products_op(leaves[0], leaves[2:-1], group)
    y = overlap.product_scatter_op(leaves[1], leaves[-1], group)
    torch.autograd.backward([*made, y], [one.detach().sign() for one in (*made, y)])
    return [*(one.detach() for one in (*made, y)), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def compare(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/group", rank=rank, world_size=GPUS)
    group = dist.group.WORLD
    assert group is not None
    plain, copies = overlap.Exchange(group), overlap.CopyExchange(Ring(group, 60_000))
    for number in range(ROUNDS):
        torch.manual_seed(GPUS * number + rank)
        rows = ROWS // 2 if number % 3 else ROWS  # buffers of two sizes take turns too
        x, a, last = whole_numbers(rows, HIDDEN), whole_numbers(GPUS * rows, HIDDEN), whole_numbers(HIDDEN, HIDDEN)
        weights = [whole_numbers(width, HIDDEN) for width in WIDTHS]
        if rank == number % GPUS:
            torch.cuda._sleep(3_000_000)  # somebody comes late
        results = []
        for kind in (plain, copies):
            overlap._exchanges[group.group_name] = kind
            results.append(part(x, a, weights, last, group.group_name))
        for expected, given in zip(*results, strict=True):
            assert torch.equal(expected, given), (number, expected.shape)
    dist.destroy_process_group()


def test_pieces_are_what_collectives_give(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(compare, (str(tmp_path),), nprocs=GPUS)


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_run_is_the_same_run(tmp_path: Path, compiled: str) -> None:
    words = ("parallel.tp=2", f"train.compile={compiled}")
    plain, given = (
        losses_and_weights(Path(tempfile.mkdtemp(dir=tmp_path)), "auto", *words, f"parallel.async_tp={overlapped}")
        for overlapped in ("false", "true")
    )
    assert len(plain[0]) == 12
    assert given[0] == pytest.approx(plain[0], rel=2e-3)
