"""float32 products by oneDNN are those of torch's own library, forward and backward, wherever they are taken."""

import pytest
import torch
import torch.nn.functional as F

from tests.parallel import models
from tests.parallel.test_recompute import Products
from trainwright.model.kernels import product
from trainwright.model.transformer import Transformer
from trainwright.parallel.recompute import GIB, LINEAR, apply_recompute

ONEDNN = torch.ops.mkldnn._linear_pointwise.default
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def everywhere(monkeypatch):
    """On any processor, for products of any size."""
    monkeypatch.setattr(product, "prefers_onednn", lambda: True)
    monkeypatch.setattr(product, "LEAST", 1)


def close(given: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert (given is None) == (expected is None)
    if given is not None:
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
        assert given.stride() == expected.stride()


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (1, 1, 7)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [("x", "w", "b"), ("x",), ("w",), ("b",), ("x", "b"), ()])
def test_linear_and_its_gradients(shape, bias, trained, everywhere):
    torch.manual_seed(0)
    x, w, b = torch.randn(shape), torch.randn(4, 7), torch.randn(4) if bias else None
    upstream, found = torch.randn(*shape[:-1], 4), []
    for linear in (product.linear, F.linear):
        parts = [
            None if t is None else t.clone().requires_grad_(name in trained)
            for t, name in zip((x, w, b), "xwb", strict=True)
        ]
        y = linear(*parts)
        assert y.requires_grad == any(part is not None and part.requires_grad for part in parts)
        if y.requires_grad:
            y.backward(upstream)
        found.append([y.detach(), *(None if part is None else part.grad for part in parts)])
    for given, expected in zip(*found, strict=True):
        close(given, expected)


def test_it_is_onednn_that_multiplies(everywhere):
    x, w = torch.randn(3, 7, requires_grad=True), torch.randn(4, 7, requires_grad=True)
    with Counter() as counter:
        product.linear(x, w).sum().backward()
        product.matmul(x.detach(), w.detach().t())
        product.add_matmul(torch.zeros(3, 4), x.detach(), w.detach().t())
    assert counter.count == 5


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function == ONEDNN
        return function(*args, **(kwargs or {}))


def test_operands_lie_as_they_do(everywhere):
    torch.manual_seed(0)
    a, b = torch.randn(7, 5).t(), torch.randn(4, 7).t()
    close(product.matmul(a, b), a @ b)
    out = torch.empty(5, 4)
    assert product.matmul(a, b, out=out) is out
    close(out, a @ b)
    total = torch.randn(5, 4)
    expected = total + a @ b
    assert product.add_matmul(total, a, b) is total
    close(total, expected)


def test_small_ones_other_types_and_other_processors_stay(monkeypatch):
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    large = torch.randn(2**12, 2**6), torch.randn(2**6, 2**6)
    for prefers, pair, expected in ((True, (x, w), 0), (True, large, 1), (False, large, 0)):
        monkeypatch.setattr(product, "prefers_onednn", lambda prefers=prefers: prefers)
        with Counter() as counter:
            product.linear(*pair)
        assert counter.count == expected
    monkeypatch.setattr(product, "prefers_onednn", lambda: True)
    with Counter() as counter:
        product.linear(*(part.double() for part in large))
    assert counter.count == 0


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "AVX512", False),
    ],
)
def test_which_processors(vendor, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(product, "_processor", lambda: f"vendor_id\t: {vendor}\n")
    product.prefers_onednn.cache_clear()
    try:
        assert product.prefers_onednn() == expected
    finally:
        product.prefers_onednn.cache_clear()


@pytest.mark.parametrize("name", ["llama", "bloom", "mixtral"])
def test_a_models_gradients_and_what_it_computes_again(name, everywhere, monkeypatch):
    """Through layers, experts, head and loss; selective recompute keeps these products as it keeps torch's own."""
    batch = models.inputs(models.batches(1, 2, 32, 7)[0], name)

    def gradients(mode: str, memory_gib: float | None = None) -> tuple[dict[str, torch.Tensor], int]:
        model = Transformer(models.MODELS[name]()).init_weights(3).train()
        apply_recompute(model.layers.values(), mode, memory_gib=memory_gib)
        for _ in range(2):  # within a budget the first pass looks
            model.zero_grad()
            with Products() as counter:
                output = model(**batch)
                (output.loss_sum + output.aux_loss).backward()
        return {key: p.grad for key, p in model.named_parameters()}, counter.count

    found = {mode: gradients(mode) for mode in ("none", "selective", "full")}
    within = gradients("selective", 10_000 * 1024 / GIB)
    assert found["none"][1] == found["selective"][1] == within[1] < found["full"][1]
    monkeypatch.setattr(product, "prefers_onednn", lambda: False)
    expected, _ = gradients("none")
    for grads, _ in (*found.values(), within):
        for key, grad in grads.items():
            torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-5)
    assert ONEDNN in LINEAR
