"""Generations of flash attention, with implementations that are right, wrong, or not there; and the variable-length
path of GPUs on CPU tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.library import Library
from torch.nn import attention as switch
from torch.nn.attention import _registry

from tests.model import flash4_on_cpu
from tests.model.attention_cases import CASES, visibility
from tests.model.varlen_on_cpu import register, varlen_on_cpu
from trainwright.model.kernels import flash4
from trainwright.model.kernels.attention import attention, choose, prepare, varlen
from trainwright.model.kernels.flash import Flash, activate, first_that_works

CPU = torch.device("cpu")


@pytest.fixture
def registry(monkeypatch):
    """torch's list of implementations, as empty as before anything is registered."""
    found = {}
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_IMPLS", found)
    yield found
    switch.restore_flash_attention_impl(_raise_warn=False)


@pytest.fixture
def fourth(monkeypatch):
    """Puts FlashAttention-4 where it can be imported; nothing is in use afterwards. Not where repeats are bit for bit,
    as runs of other tests in this process have asked for."""
    asked = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield lambda error=0.0: flash4_on_cpu.install(monkeypatch, error)
    flash4.unload()
    torch.use_deterministic_algorithms(asked)


def problem(case, mask):
    """((q, k, v), what is seen, the same made ready for variable lengths, a gradient of the result)."""
    rows, length, heads, kv = case
    random = torch.Generator().manual_seed(0)
    qkv = [torch.randn(rows, length, n, 16, generator=random).requires_grad_() for n in (heads, kv, kv)]
    seen = visibility(rows, length, mask, CPU)
    ready = prepare(seen, "varlen", device=CPU, dtype=torch.float32, slopes_N=None)
    return qkv, seen, ready, torch.randn(qkv[0].shape, generator=random)


NOT_INSTALLED = "FA4: No module named 'flash_attn'"


def kernels(error=0.0):
    """What an implementation does when torch activates it; what it returns is asked to take everything away."""

    def put():
        library = Library("aten", "IMPL")
        register(library, error)
        return SimpleNamespace(remove=library._destroy)

    return put


def test_the_newest_is_put_in_use(registry, fourth):
    registry |= {"FA3": kernels()}
    fourth()
    assert first_that_works(CPU) == Flash("FA4")
    assert flash4.in_use()
    assert switch.current_flash_attention_impl() is None


def test_one_that_is_not_installed_is_passed_over(registry):
    registry |= {"FA3": kernels()}
    found = first_that_works(CPU)
    assert (found.name, str(found)) == ("FA3", f"FA3 ({NOT_INSTALLED})")
    assert switch.current_flash_attention_impl() == "FA3"
    assert not flash4.in_use()


def test_wrong_numbers_leave_torchs_own_in_place(registry, fourth):
    registry |= {"FA3": kernels(error=0.1)}
    fourth(error=0.1)
    found = first_that_works(CPU)
    assert found.name is None
    why = "gives other numbers than the formula for documents"
    assert found.refused == (f"FA4: {why}", f"FA3: {why}")
    assert switch.current_flash_attention_impl() is None
    assert not flash4.in_use()


def test_one_that_does_not_run_here_says_why(registry):
    def needs():
        raise RuntimeError("FA3 requires compute capability 9.0\nmore lines")

    registry |= {"FA3": needs}
    assert first_that_works(CPU).refused == (NOT_INSTALLED, "FA3: FA3 requires compute capability 9.0")
    registry.clear()
    assert first_that_works(CPU).refused == (NOT_INSTALLED, "FA3: unknown to this torch")


@pytest.mark.parametrize("mask", ["causal", "window", "documents"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fourth_is_given_what_it_needs(case, mask, fourth):
    """Whole rows, windows and packed documents through its operations, against the formula; compiled as well."""
    fourth()
    flash4.load()
    torch._dynamo.reset()
    (q, k, v), seen, ready, upstream = problem(case, mask)

    def ours(q, k, v):
        return flash4.rows(q, k, v, 0.25) if mask == "causal" else varlen(q, k, v, ready, 0.25)

    expected = attention(q, k, v, seen, scale=0.25, backend="eager")
    expected = (expected, *torch.autograd.grad(expected, (q, k, v), upstream))
    for program in (ours, torch.compile(ours, backend="aot_eager", fullgraph=True)):
        given = program(q, k, v)
        given = (given, *torch.autograd.grad(given, (q, k, v), upstream))
        for one, two in zip(given, expected, strict=True):
            torch.testing.assert_close(one, two, atol=2e-6, rtol=2e-6)


def test_the_fourth_takes_plain_rows_from_cudnn_but_not_bit_for_bit(fourth):
    causal = visibility(2, 64, "causal", CPU)
    gpu = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "alibi": False}
    q = torch.empty(2, 64, 4, 128)
    assert choose(causal, wanted="auto", **gpu) == "cudnn"
    fourth()
    flash4.load()
    assert choose(causal, wanted="auto", **gpu) == "flash"
    assert choose(causal, wanted="cudnn", **gpu) == "cudnn"
    assert flash4.takes(q)
    assert not flash4.takes(torch.empty(2, 64, 4, 256))
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(causal, wanted="auto", **gpu) == "cudnn"
        assert not flash4.takes(q)
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_is_activated_without_cuda():
    assert activate(CPU) == Flash()
    assert switch.current_flash_attention_impl() is None


@pytest.mark.parametrize("mask", ["window", "documents"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_variable_lengths_are_the_dense_mask(case, mask):
    """What GPUs are given for packed documents and windows, against the formula."""
    (q, k, v), seen, ready, upstream = problem(case, mask)
    with varlen_on_cpu():
        given = varlen(q, k, v, ready, 0.25)
        ours = torch.autograd.grad(given, (q, k, v), upstream)
    expected = attention(q, k, v, seen, scale=0.25, backend="eager")
    for one, two in zip((given, *ours), (expected, *torch.autograd.grad(expected, (q, k, v), upstream)), strict=True):
        torch.testing.assert_close(one, two, atol=2e-6, rtol=2e-6)
