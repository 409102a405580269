"""What a cell's process makes of caps and failures, on devices that are not here too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainwright.bench import work
from trainwright.errors import UserError

GIB = 2**30
CUDA = (
    "CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has a total capacity of 139.80 GiB of which 512.00 MiB is "
    "free. Including non-PyTorch memory, this process has 139.28 GiB memory in use."
)


def test_what_cuda_says_becomes_figures():
    told = work.account(torch.OutOfMemoryError(CUDA), "backward", None, None)
    assert told == {"status": "oom", "line": CUDA, "phase": "backward", "asked_gib": 3.5, "free_gib": 0.5}


def test_under_a_cap_what_is_free_is_the_cap_s(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.memory_reserved", lambda: 22 * GIB)
    told = work.account(torch.OutOfMemoryError(CUDA), "loss", 23.7, None)
    assert told["free_gib"] == pytest.approx(1.7)  # the card itself has more, which this cell may not have


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "oom"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            "oom",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "oom"),
        (OSError("Cannot allocate memory"), "oom"),
        (UserError("parallel.tp=3 is odd"), "refused"),
        (ValueError("out of memory"), "crashed"),  # a value is no memory
        (RuntimeError("Connection reset by peer"), "crashed"),
    ],
)
def test_failures_are_told_apart(error, status):
    told = work.account(error, "loss", None, None)
    assert told["status"] == status
    if status == "crashed":
        assert told["secondary"] is ("peer" in str(error))


class Card:
    """A device module of 24 GiB that remembers its cap."""

    def __init__(self) -> None:
        self.capped: list[Any] = []

    def get_device_properties(self, device: Any) -> Any:
        return type("Properties", (), {"total_memory": 24 * GIB})

    def set_per_process_memory_fraction(self, share: float, device: Any) -> None:
        self.capped.append(share)


def test_an_accelerator_is_capped_by_its_share(monkeypatch):
    card = Card()
    monkeypatch.setattr(work, "default_device", lambda rank: torch.device("cuda", rank))
    monkeypatch.setattr("torch.get_device_module", lambda device: card)
    assert work.cap_memory(12) is None
    assert work.cap_memory(24.2) is None  # what its maker calls it
    assert card.capped == [0.5, 1.0]
    with pytest.raises(UserError, match=r"memory_gib=30 is more than this card has, 24\.0"):
        work.cap_memory(30)
    monkeypatch.setattr("torch.get_device_module", lambda device: type("Other", (), {"get_device_properties": None}))
    monkeypatch.setattr(work, "device_memory_gib", lambda device: 24.0)
    with pytest.raises(UserError, match="torch cannot cap the memory of cuda"):
        work.cap_memory(12)


def test_the_fullest_rank_counts():
    assert work.fullest([(3.0, None, 1.0), (5.0, None, None), (4.0, None, 0.5)]) == [5.0, None, 1.0]
