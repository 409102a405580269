"""Shards by copies, without GPUs: which buffers are handed out when, and what two ranks pull from each other.

Buffers are plain tensors here, and both ranks live in this process; `tests/gpu/test_copies.py` has the real ones.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.parallel import copies
from trainwright.parallel.copies import CopyGather, CopyReduce, Ring
from trainwright.parallel.reduce import Reduce

CPU = torch.device("cpu")


class Handle:
    """The ranks' copies of one buffer, and how often they met."""

    def __init__(self) -> None:
        self.raw: list[Tensor] = []
        self.met: list[int] = []

    def barrier(self, channel: int, timeout_ms: int) -> None:
        assert timeout_ms == 1000
        self.met.append(channel)

    def get_buffer(self, peer: int, shape: torch.Size, dtype: torch.dtype, offset: int) -> Tensor:
        return self.raw[peer].view(dtype)[offset : offset + shape.numel()].view(shape)


@pytest.fixture
def ranks(monkeypatch) -> tuple[list[Any], list[Handle], list[int]]:
    """Two groups, as two ranks see them; the handles in the order of their making; bytes that were counted."""
    groups = [SimpleNamespace(rank=lambda r=rank: r, size=lambda: 2) for rank in range(2)]
    handles: list[Handle] = []
    counted: list[int] = []

    def make(self: Ring, size: int, device: torch.device) -> Tensor:
        raw = torch.empty(size, dtype=torch.uint8)
        number = len(self._handles)
        if number == len(handles):
            handles.append(Handle())
        handles[number].raw.append(raw)
        self._handles[raw.data_ptr()] = handles[number]
        counted.append(size)
        return raw

    monkeypatch.setattr(Ring, "_make", make)
    return groups, handles, counted


def test_a_buffer_comes_back_once_nobody_holds_it(ranks):
    groups, _, counted = ranks
    ring = Ring(groups[0], 1000)
    first = ring.take(8, torch.bfloat16, CPU)
    second = ring.take(8, torch.bfloat16, CPU)
    assert first.data_ptr() != second.data_ptr()
    part, place = first[:4], first.data_ptr()
    del first
    assert ring.take(4, torch.float32, CPU).data_ptr() not in (place, second.data_ptr())  # a part of it is held
    del part
    assert ring.take(8, torch.bfloat16, CPU).data_ptr() == place
    assert counted == [16, 16, 16]


def test_an_embedding_and_a_head_with_its_norm_take_turns_in_one_buffer(ranks):
    groups, _, counted = ranks
    ring = Ring(groups[0], 1000)
    for numel in (5003 * 64, 5003 * 64 + 64):
        given = ring.take(numel, torch.bfloat16, CPU)
        assert given.shape == (numel,)
        del given
    (size,) = counted
    assert 2 * (5003 * 64 + 64) <= size <= 2 * (5003 * 64 + 64) * 9 / 8


def test_two_ranks_gather_what_both_have(ranks):
    groups, handles, _ = ranks
    gathers = [CopyGather(Ring(group, 1000)) for group in groups]
    outputs = [gather.allocate((6,), dtype=torch.float32, device=CPU) for gather in gathers]
    shards = [output[3 * rank : 3 * rank + 3] for rank, output in enumerate(outputs)]
    for rank, shard in enumerate(shards):
        shard.copy_(torch.arange(3) + 10.0 * rank)
    for gather, output, shard, group in zip(gathers, outputs, shards, groups, strict=True):
        gather(output, shard, group)
        assert output.tolist() == [0, 1, 2, 10, 11, 12]
    assert handles[0].met == [0, 1, 0, 1]  # before the first reads and after the last, on both ranks


def test_two_ranks_sum_in_float32_what_travels_in_bf16(ranks):
    groups, handles, counted = ranks
    reduces = [CopyReduce(Ring(group, 1000), torch.bfloat16) for group in groups]
    grads = [torch.tensor([1.0, 2, 3, 256]), torch.tensor([0.5, 1 / 256, 7, 1])]
    both = [
        (reduce.allocate((4,), dtype=torch.float32, device=CPU), reduce.allocate((2,), dtype=torch.float32, device=CPU))
        for reduce in reduces
    ]
    for (given, _), grad in zip(both, grads, strict=True):
        assert given.dtype == torch.bfloat16
        given.copy_(grad)
    for reduce, (given, out), group, expected in zip(
        reduces, both, groups, ([1.5, 2 + 1 / 256], [10, 257]), strict=True
    ):
        reduce(out, given, group, dist.ReduceOp.SUM)
        assert out.tolist() == expected  # 2 + 1/256 and 257 need more digits than bf16 has
    assert handles[0].met == [0, 1, 0, 1]
    again = reduces[0].allocate((4,), dtype=torch.float32, device=CPU)
    assert again.dtype == torch.bfloat16  # the next one's input
    assert counted == [16, 16, 16]  # a third on rank 0, whose first is still held


def test_a_reduction_without_memory_for_its_input_asks_for_the_input_again():
    class Full(Reduce):
        def make_input(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
            if full:
                raise torch.OutOfMemoryError("full")
            return torch.zeros(numel, dtype=torch.bfloat16, device=device)

    full, reduce = True, Full()
    with pytest.raises(torch.OutOfMemoryError):
        reduce.allocate((4,), dtype=torch.float32, device=CPU)
    full = False
    kinds = [reduce.allocate((4,), dtype=torch.float32, device=CPU).dtype for _ in range(4)]
    assert kinds == [torch.bfloat16, torch.float32] * 2


def test_machines_apart_are_left_to_nccl(monkeypatch):
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: group)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda here, there: there != 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    gpu: Any = torch.device("cuda", 0)
    assert copies.can_copy([0, 1, 2], gpu)  # type: ignore[arg-type]
    assert copies.can_copy([4, 5], gpu)  # type: ignore[arg-type]
    assert not copies.can_copy([0, 3], gpu)  # type: ignore[arg-type]
    assert not copies.can_copy([0, 4], gpu)  # type: ignore[arg-type]
    assert not copies.can_copy([0, 1], CPU)  # type: ignore[arg-type]
