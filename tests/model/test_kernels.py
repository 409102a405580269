"""Every kernel against its plain form: values and gradients, on the CPU here and on a GPU in tests/gpu."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.model.attention_cases import CASES, MASKS, run
from trainwright.model.config import MoeConfig
from trainwright.model.generate import pad_left, sample
from trainwright.model.kernels import cross_entropy
from trainwright.model.kernels.cross_entropy import VocabShard, linear_cross_entropy, linear_cross_entropy_plain
from trainwright.model.kernels.gated import gated
from trainwright.model.kernels.grouped import cast_grouped_linear, grouped_linear
from trainwright.model.kernels.norm import rms_norm, rms_norm_plain
from trainwright.model.moe import Moe, load_balancing_loss


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


# ---- attention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_backends_agree(case: tuple[int, int, int, int], mask: str, alibi: bool) -> None:
    plain = run(case, mask, alibi, "eager")
    for one, two in zip(plain, run(case, mask, alibi, "auto"), strict=True):
        assert (one - two).abs().max() < 1e-5


def test_attention_masks_differ() -> None:
    """The cases above tell masks apart: no two of them compute the same."""
    outs = {mask: run(CASES[0], mask, False, "eager")[0] for mask in MASKS}
    for one in MASKS:
        for two in MASKS:
            assert one == two or (outs[one] - outs[two]).abs().max() > 1e-3


# ---- cross entropy ----------------------------------------------------------------------------------------------


def head_case(bias: bool, ignored: float, vocab: int = 50) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 11, 16, generator=random, requires_grad=True)
    weight = torch.randn(vocab, 16, generator=random, requires_grad=True)
    labels = torch.randint(0, vocab, (3, 11), generator=random)
    labels[torch.rand(3, 11, generator=random) < ignored] = -100
    return x, weight, (torch.randn(vocab, generator=random, requires_grad=True) if bias else None), labels


@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "more"), [(1, 0), (7, 0), (7, 6), (100, 0)])
def test_cross_entropy(monkeypatch: pytest.MonkeyPatch, bias: bool, ignored: float, rows: int, more: int) -> None:
    """more: words of nothing behind the vocabulary, as matrix units of a GPU want them behind an odd one."""
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda *_: rows)
    monkeypatch.setattr(cross_entropy, "_whole_units", lambda _, vocab: vocab + more)
    x, weight, b, labels = head_case(bias, ignored)
    leaves = [leaf for leaf in (x, weight, b) if leaf is not None]
    expected = linear_cross_entropy_plain(x, weight, labels, b)
    given = linear_cross_entropy(x, weight, labels, b)
    assert given.dtype == torch.float32
    assert (given - expected).abs() < 1e-4
    for one, two in zip(gradients(given * 0.3, *leaves), gradients(expected * 0.3, *leaves), strict=True):
        assert (one - two).abs().max() < 1e-5


def test_a_gradient_with_room_behind_its_rows_is_widened_in_place() -> None:
    wider = torch.full((3, 8), float("nan"))
    wider[:, :5] = 1.0
    found = cross_entropy._widened(wider[:, :5], 8)
    assert found.data_ptr() == wider.data_ptr()
    assert found.tolist() == [[1.0] * 5 + [0.0] * 3] * 3


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_cross_entropy_of_frozen_parts(frozen: str) -> None:
    x, weight, _, labels = head_case(False, 0.3)
    {"x": x, "weight": weight}[frozen].requires_grad_(False)
    leaf = weight if frozen == "x" else x
    expected = gradients(linear_cross_entropy_plain(x, weight, labels), leaf)[0]
    assert (gradients(linear_cross_entropy(x, weight, labels), leaf)[0] - expected).abs().max() < 1e-5


def test_cross_entropy_is_stable_and_inference_keeps_nothing() -> None:
    x = torch.full((1, 1, 1), 200.0)
    weight = torch.tensor([[1.0], [-1.0]])
    assert linear_cross_entropy(x, weight, torch.tensor([[1]])).item() == pytest.approx(400.0)
    assert linear_cross_entropy(x, weight, torch.tensor([[0]])).item() == pytest.approx(0.0)


def test_cross_entropy_of_vocabulary_slices() -> None:
    """Two slices of the vocabulary that reduce with each other give the whole's loss and gradients.

    Both halves run at the same time in two threads; a barrier stands for the collective.
    """
    import threading

    x, weight, _, labels = head_case(False, 0.3)
    expected = gradients(linear_cross_entropy_plain(x, weight, labels), x, weight)
    barrier, shared = threading.Barrier(2), [None, None]

    def reducer(rank: int, combine: Any) -> Any:
        def reduce(tensor: Tensor) -> None:
            shared[rank] = tensor.clone()
            barrier.wait()
            total = combine(shared[0], shared[1])
            barrier.wait()
            tensor.copy_(total)

        return reduce

    out: list[Any] = [None, None]

    def work(rank: int) -> None:
        own_x = x.detach().clone().requires_grad_()
        own_w = weight.detach()[rank * 25 : rank * 25 + 25].clone().requires_grad_()
        shard = VocabShard(rank * 25, 25, reducer(rank, torch.maximum), reducer(rank, torch.add))
        loss = linear_cross_entropy(own_x, own_w, labels, shard=shard)
        out[rank] = (loss, *gradients(loss, own_x, own_w))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    whole = linear_cross_entropy_plain(x, weight, labels)
    assert (out[0][0] - whole).abs() < 1e-4
    assert (out[1][0] - whole).abs() < 1e-4
    assert (out[0][1] + out[1][1] - expected[0]).abs().max() < 1e-5  # x's gradient is the sum over slices
    assert (torch.cat([out[0][2], out[1][2]]) - expected[1]).abs().max() < 1e-5


class Largest(TorchDispatchMode):
    """The most elements that any tensor made under it has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_cross_entropy_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy._CHUNK_BYTES, "cpu", 16 * 4000 * 4)
    x, weight = torch.randn(1, 256, 8, requires_grad=True), torch.randn(4000, 8, requires_grad=True)
    labels = torch.randint(0, 4000, (1, 256))
    with Largest() as ours:
        linear_cross_entropy(x, weight, labels).backward()
    with Largest() as plain:
        linear_cross_entropy_plain(x, weight, labels).backward()
    assert plain.numel == 256 * 4000
    assert ours.numel == 16 * 4000


# ---- norm, activation, experts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    x = torch.randn(4, 5, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(24, dtype=dtype, requires_grad=True)
    upstream = torch.randn(4, 5, 24, dtype=dtype)
    one, two = rms_norm(x, weight, 1e-6), rms_norm_plain(x, weight, 1e-6)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(one, two, **close)
    for a, b in zip(
        torch.autograd.grad(one, (x, weight), upstream), torch.autograd.grad(two, (x, weight), upstream), strict=True
    ):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated(name: Any) -> None:
    gate, up = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    act = {"silu": F.silu, "relu": F.relu}.get(
        name, lambda x: F.gelu(x, approximate="tanh" if "tanh" in name else "none")
    )
    one, two = gated(name, gate, up), act(gate) * up
    assert torch.allclose(one, two, atol=1e-6)
    for a, b in zip(gradients(one.sum(), gate, up), gradients(two.sum(), gate, up), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_gated_product_that_is_computed_again_needs_four_tensors_of_its_width() -> None:
    """Compiled: the same numbers, and in the backward pass gate, up and two gradients where there were six tensors."""
    draw = torch.Generator().manual_seed(0)
    x, weights = torch.randn(32, 16, generator=draw), torch.randn(3, 64, 16, generator=draw)
    found = []
    for again in (False, True):
        leaves = [x.clone().requires_grad_(), *(weight.clone().requires_grad_() for weight in weights)]

        def layer(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, again: bool = again) -> Tensor:
            return gated("silu", x @ gate.t(), x @ up.t(), again=again) @ down

        def run(layer: Any = layer, leaves: Any = leaves) -> Any:
            compiled = torch.compile(lambda *leaves: checkpoint(layer, *leaves, use_reentrant=False))
            return torch.autograd.grad(compiled(*leaves).square().sum(), leaves)

        grads, codes = run_and_get_code(run)
        found.append((grads, codes[-1]))
    for one, two in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    fused, apart = (code.split("def call(")[1].split("return")[0] for _, code in found)
    wide = "= empty_strided_cpu((32, 64)"
    assert fused.count(wide) == 6
    # gate and up; what the operations give: the product, whose room the gradients then take, and that of up.
    assert (apart.count(wide), apart.count("gated_silu.default("), apart.count("gradients.default(")) == (2, 1, 1)
    assert "clone" not in apart


def test_grouped_linear() -> None:
    counts = torch.tensor([3, 0, 5, 1])
    x, weight = torch.randn(9, 8, requires_grad=True), torch.randn(4, 6, 8, requires_grad=True)
    expert = torch.repeat_interleave(torch.arange(4), counts)
    expected = torch.einsum("mi,moi->mo", x, weight[expert])
    given = grouped_linear(x, weight, counts)
    assert torch.allclose(given, expected, atol=1e-5)
    for a, b in zip(
        gradients(given.square().sum(), x, weight), gradients(expected.square().sum(), x, weight), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("norm_topk", [False, True])
def test_experts_against_a_loop_over_tokens(norm_topk: bool) -> None:
    torch.manual_seed(0)
    moe = Moe(MoeConfig.of(8, 12, 5, 2, "silu", norm_topk=norm_topk))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 7, 8)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, 4:] = False
    out, statistics = moe(x, real)
    probabilities = moe.gate(x).softmax(-1)
    weights, chosen = probabilities.topk(2)
    if norm_topk:
        weights = weights / weights.sum(-1, keepdim=True)
    experts = moe.experts
    for b in range(2):
        for s in range(7):
            total = torch.zeros(8)
            for w, e in zip(weights[b, s], chosen[b, s], strict=True):
                hidden = F.silu(experts.gate_proj.weight[e] @ x[b, s]) * (experts.up_proj.weight[e] @ x[b, s])
                total += w * (experts.down_proj.weight[e] @ hidden)
            assert torch.allclose(out[b, s], total, atol=1e-5)
    assert torch.allclose(statistics[0], probabilities[real].sum(0), atol=1e-5)
    assert torch.equal(statistics[1], chosen[real].flatten().bincount(minlength=5).float())


def test_load_balancing_loss_of_an_even_load() -> None:
    """With k choices a token it is k; with all tokens on one expert of E, E times that expert's probability."""
    assert load_balancing_loss([torch.full((2, 4), 3.0) * torch.tensor([[1.0], [2.0]])], 2).item() == pytest.approx(2.0)
    one = torch.tensor([[6.0, 0, 0], [6.0, 0, 0]])
    assert load_balancing_loss([one], 1).item() == pytest.approx(3.0)


# ---- sampling ---------------------------------------------------------------------------------------------------


def test_sampling() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(2000, 1)
    random = torch.Generator().manual_seed(0)
    assert (sample(logits, 0.0, 0, 1.0, random) == 3).all()
    drawn = sample(logits, 1.0, 0, 1.0, random).bincount(minlength=4) / 2000
    assert torch.allclose(drawn, logits[0].softmax(-1), atol=0.04)
    assert set(sample(logits, 1.0, 2, 1.0, random).tolist()) == {2, 3}
    assert set(sample(logits, 1.0, 0, 0.7, random).tolist()) == {2, 3}  # 0.64 is not yet 0.7
    assert set(sample(logits, 1.0, 0, 0.6, random).tolist()) == {3}
    same = [sample(logits, 2.0, 0, 1.0, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*same)


def test_pad_left() -> None:
    ids, mask = pad_left([[1, 2, 3], [4]], pad_id=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_grouped_weight_that_is_cast_again_is_not_kept():
    """The same products and gradients bit for bit; instead of a narrow copy the weight itself waits."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(9, 16, generator=draw).bfloat16().requires_grad_()
    weight = torch.randn(3, 8, 16, generator=draw).requires_grad_()
    counts, upper = torch.tensor([4, 0, 5]), torch.randn(9, 8, generator=draw).bfloat16()
    found = []
    for way in (cast_grouped_linear, lambda x, weight, counts: grouped_linear(x, weight.to(x.dtype), counts)):
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = way(x, weight, counts)
        own = {tensor.untyped_storage().data_ptr() for tensor in (x, weight, counts)}
        found.append((out, *torch.autograd.grad(out, (x, weight), upper)))
        assert found[-1][2].dtype == torch.float32
        copies = sum(size for place, size in kept.items() if place not in own)
        assert copies == (0 if way is cast_grouped_linear else 2 * weight.numel())
    for ours, plain in zip(*found, strict=True):
        assert torch.equal(ours, plain)
    # torch's grouped kernel, which a CPU has too, takes the same operands for the weight's gradient.
    offsets = counts.cumsum(0).to(torch.int32)
    torch.testing.assert_close(F.grouped_mm(upper.t(), x.detach(), offs=offsets).float(), found[0][2])
