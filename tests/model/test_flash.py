"""The switch between generations of flash attention, with implementations that are right, wrong, or not there; and the
variable-length path of GPUs on CPU tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.library import Library
from torch.nn import attention as switch
from torch.nn.attention import _registry

from tests.model.attention_cases import CASES, visibility
from tests.model.varlen_on_cpu import register, varlen_on_cpu
from trainwright.model.kernels.attention import attention, prepare, varlen
from trainwright.model.kernels.flash import Flash, activate, first_that_works

CPU = torch.device("cpu")


@pytest.fixture
def registry(monkeypatch):
    """torch's list of implementations, as empty as before anything is registered."""
    found = {}
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_IMPLS", found)
    yield found
    switch.restore_flash_attention_impl(_raise_warn=False)


def kernels(error=0.0):
    """What an implementation does when torch activates it; what it returns is asked to take everything away."""

    def put():
        library = Library("aten", "IMPL")
        register(library, error)
        return SimpleNamespace(remove=library._destroy)

    return put


def absent():
    raise ModuleNotFoundError("No module named 'flash_attn_interface'")


def test_the_first_whose_numbers_are_right_is_activated(registry):
    registry |= {"FA3": kernels(), "FA4": absent}
    assert first_that_works(CPU) == Flash("FA3")
    assert switch.current_flash_attention_impl() == "FA3"


def test_one_that_is_not_installed_is_passed_over(registry):
    registry |= {"FA3": absent, "FA4": kernels()}
    found = first_that_works(CPU)
    assert (found.name, str(found)) == ("FA4", "FA4 (FA3: No module named 'flash_attn_interface')")


def test_wrong_numbers_leave_torchs_own_in_place(registry):
    registry |= {"FA3": kernels(error=0.1), "FA4": absent}
    found = first_that_works(CPU)
    assert found.name is None
    assert found.refused[0] == "FA3: gives other numbers than the formula for documents"
    assert switch.current_flash_attention_impl() is None


def test_one_that_does_not_run_here_says_why(registry):
    def needs():
        raise RuntimeError("FA3 requires compute capability 9.0\nmore lines")

    registry |= {"FA3": needs}
    found = first_that_works(CPU)
    assert found.refused == ("FA3: FA3 requires compute capability 9.0", "FA4: unknown to this torch")


def test_a_torch_without_the_switch(monkeypatch):
    monkeypatch.delattr(switch, "activate_flash_attention_impl")
    assert str(first_that_works(CPU)) == "FA2 (this torch has no switch)"


def test_nothing_is_activated_without_cuda():
    assert activate(CPU) == Flash()
    assert switch.current_flash_attention_impl() is None


@pytest.mark.parametrize("mask", ["window", "documents"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_variable_lengths_are_the_dense_mask(case, mask):
    """What GPUs are given for packed documents and windows, against the formula."""
    rows, length, heads, kv = case
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, length, n, 16, generator=random).requires_grad_() for n in (heads, kv, kv))
    seen = visibility(rows, length, mask, CPU)
    ready = prepare(seen, "varlen", device=CPU, dtype=q.dtype, slopes_N=None)
    upstream = torch.randn(q.shape, generator=random)
    with varlen_on_cpu():
        given = varlen(q, k, v, ready, 0.25)
        ours = torch.autograd.grad(given, (q, k, v), upstream)
    expected = attention(q, k, v, seen, scale=0.25, backend="eager")
    for one, two in zip((given, *ours), (expected, *torch.autograd.grad(expected, (q, k, v), upstream)), strict=True):
        torch.testing.assert_close(one, two, atol=2e-6, rtol=2e-6)
