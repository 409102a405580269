"""The table's gradient against torch's own: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch
import torch.nn.functional as F

from tests.triton_device import INTERPRETED, triton_device

DEVICE = triton_device()

from trainwright.model.embed import Table  # noqa: E402
from trainwright.model.kernels import embedding as choice  # noqa: E402
from trainwright.model.kernels.triton_embedding import table_gradient  # noqa: E402

ROWS = 40


@pytest.fixture
def own(monkeypatch):
    """The interpreter has no device that our path is chosen for."""
    if INTERPRETED:
        monkeypatch.setattr(choice, "_has_kernel", lambda ids, weight: True)


def wanted(above_MH, ids_M, padding_idx=None):
    """Sums in float64 by torch."""
    table = torch.zeros(ROWS, above_MH.shape[1], dtype=torch.float64, device=DEVICE, requires_grad=True)
    F.embedding(ids_M, table, padding_idx).backward(above_MH.double())
    return table.grad


def same(given, expected):
    # The interpreter cuts bf16 off where the compiler rounds.
    rtol = 1e-5 if given.dtype == torch.float32 else 2**-7 if INTERPRETED else 2**-8
    torch.testing.assert_close(given.double(), expected, rtol=rtol, atol=1e-5)


IDS = {
    "each once": torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)),
    "repeats": torch.randint(ROWS // 4, (60,), generator=torch.Generator().manual_seed(2)) * 4,
    "runs around a piece's length": torch.tensor([1] * 15 + [3] * 16 + [4] * 17 + [39] * 33)[torch.arange(81) * 5 % 81],
    "a long run": torch.cat([torch.full((117,), 7), torch.tensor([0, 8, 39, 6, 7, 8])]),
    "one": torch.tensor([5]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 5, 64, 600])
@pytest.mark.parametrize("kind", IDS)
def test_rows_are_summed_in_float32_and_rounded_once(kind, width, dtype):
    ids_M = IDS[kind].to(DEVICE)
    # All above 0, so that a row of the gradient shows each token that it lacks or has twice, as no sum is near 0.
    above_MH = (torch.rand(len(ids_M), width, generator=torch.Generator().manual_seed(0)) + 0.5).to(DEVICE, dtype)
    given = table_gradient(above_MH, ids_M, ROWS)
    assert given.dtype == dtype
    same(given, wanted(above_MH, ids_M))
    assert torch.equal(given, table_gradient(above_MH, ids_M, ROWS))


@pytest.mark.parametrize("kind", IDS)
def test_every_token_counts_once(kind):
    ids_M = IDS[kind].to(DEVICE)
    ones = torch.ones(len(ids_M), 3, device=DEVICE, dtype=torch.bfloat16)  # whole numbers: exact
    assert torch.equal(table_gradient(ones, ids_M, ROWS)[:, 1].long(), ids_M.bincount(minlength=ROWS))


@pytest.mark.parametrize("padding", [0, 7, ROWS - 1])
def test_padding_has_no_gradient(padding):
    ids_M = IDS["a long run"].to(DEVICE)
    above_MH = torch.randn(len(ids_M), 24, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    given = table_gradient(above_MH, ids_M, ROWS, padding)
    assert not given[padding].any()
    same(given, wanted(above_MH, ids_M, padding))


def test_no_tokens_at_all():
    none = torch.zeros(0, dtype=torch.long, device=DEVICE)
    assert torch.equal(table_gradient(torch.zeros(0, 8, device=DEVICE), none, 3), torch.zeros(3, 8, device=DEVICE))
    assert table_gradient(torch.zeros(4, 0, device=DEVICE), none.new_zeros(4), 3).shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("shape", [(3, 7), (2, 0), (9,), ()])
@pytest.mark.usefixtures("own")
def test_a_table_is_torchs_embedding(shape, padding, dtype):
    torch.manual_seed(0)
    table = Table(ROWS, 12, padding_idx=padding, device=DEVICE, dtype=dtype)
    ids = torch.randint(4, shape, device=DEVICE)
    made = table(ids)
    assert type(made.grad_fn).__name__ == "_EmbeddingBackward"
    plain = table.weight.detach().double().requires_grad_()
    expected = F.embedding(ids, plain, padding)
    assert torch.equal(made.double(), expected)
    above = torch.randn(12, device=DEVICE, dtype=dtype).expand(made.shape)  # a gradient that does not lie in rows
    made.backward(above)
    expected.backward(above.double())
    assert table.weight.grad.dtype == dtype
    same(table.weight.grad, plain.grad)
    (made_again := table(ids)).backward(above)  # added to what is there, as by a second micro batch
    same(table.weight.grad, 2 * plain.grad)
    assert torch.equal(made_again, made)


@pytest.mark.usefixtures("own")
def test_a_table_that_the_head_shares_has_both_gradients():
    torch.manual_seed(0)
    table, ids = Table(ROWS, 12, device=DEVICE), torch.randint(4, (2, 30), device=DEVICE)
    F.linear(table(ids), table.weight).square().sum().backward()
    plain = table.weight.detach().double().requires_grad_()
    F.linear(F.embedding(ids, plain), plain).square().sum().backward()
    same(table.weight.grad, plain.grad)


@pytest.mark.usefixtures("own")
def test_without_gradients_it_is_torchs_own():
    table, ids = Table(ROWS, 12, device=DEVICE), torch.tensor([3, 3], device=DEVICE)
    with torch.no_grad():
        assert not table(ids).requires_grad
    table.weight.requires_grad_(False)
    assert table(ids).grad_fn is None


def test_other_types_and_compiled_tables_are_torchs_own():
    table, ids = Table(ROWS, 12, device=DEVICE), torch.tensor([3, 3], device=DEVICE)
    compiled = torch.compile(table, backend="eager", fullgraph=True)
    assert type(compiled(ids).grad_fn).__name__ == "EmbeddingBackward0"
    assert type(table.double()(ids).grad_fn).__name__ == "EmbeddingBackward0"


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU's memory")
def test_nothing_wide_beside_the_gradient():
    table = Table(2000, 1024, device=DEVICE, dtype=torch.bfloat16)
    made = table(torch.randint(2000, (8192,), device=DEVICE))
    above = torch.randn_like(made)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (grad,) = torch.autograd.grad(made, table.weight, above)
    beside = torch.cuda.max_memory_allocated() - before - grad.nbytes
    assert beside < 2 * 2**20  # the sorted ids; float32 rows of all tokens would be 32 MiB
