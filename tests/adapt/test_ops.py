"""The fused forward and backward against plain PyTorch, in every weight format, eager and compiled."""

import pytest
import torch
from torch import nn

from trainwright.adapt import ops
from trainwright.adapt.linear import LoraExperts, LoraLinear
from trainwright.adapt.lora import Lora
from trainwright.adapt.quantize import FewerBits
from trainwright.model.config import LinearConfig
from trainwright.model.kernels.grouped import grouped_linear

FORMATS = [None, "nf4", "int8", "fp8"]
# fp8 rounds activations and gradients on the way: about 3 bits of mantissa each.
BOUND = {None: 1e-5, "nf4": 1e-5, "int8": 1e-5, "fp8": 0.06}


def adapted(kind, *, bias=True, inputs=64, outputs=96, **lora):
    torch.manual_seed(0)
    leaf = LinearConfig(inputs, outputs, bias, quantization=FewerBits(kind) if kind else None)
    layer = LoraLinear(leaf, Lora(rank=8, alpha=16.0, **lora))
    layer.take_weight(torch.randn(outputs, inputs) * 0.05)
    nn.init.normal_(layer.lora_a, std=0.1)
    nn.init.normal_(layer.lora_b, std=0.1)
    if bias:
        nn.init.normal_(layer.bias)
    return layer


def gradients(layer, x, forward):
    """(y, gradients of x, A, B) of a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    for parameter in layer.parameters():
        parameter.grad = None
    y = forward(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), x.grad, layer.lora_a.grad.clone(), layer.lora_b.grad.clone()


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_are_those_of_two_linears(kind, bias):
    layer = adapted(kind, bias=bias)
    x = torch.randn(2, 5, 64)
    weight = layer.whole_weight(torch.float32)

    def plain(x):
        low = x @ layer.lora_a.t()
        y = x @ weight.t() + layer.lora.scale * (low @ layer.lora_b.t())
        return y + layer.bias if bias else y

    for mine, reference in zip(gradients(layer, x, layer), gradients(layer, x, plain), strict=True):
        assert distance(mine, reference) < BOUND[kind]
    assert layer.weight.grad is None


def test_nothing_but_the_input_and_a_rank_wide_tensor_is_kept():
    layer = adapted("nf4", inputs=64, outputs=128)
    x = torch.randn(32, 64, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    own = {parameter.data_ptr() for parameter in (*layer.parameters(), *layer.buffers())}
    beside = {pointer: tensor for pointer, tensor in kept.items() if pointer not in own}
    assert x.data_ptr() in beside
    assert sum(tensor.numel() for tensor in beside.values()) == x.numel() + 32 * layer.lora.rank


@pytest.mark.parametrize("kind", FORMATS)
def test_compiled_is_the_same(kind):
    layer = adapted(kind)
    x = torch.randn(3, 7, 64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for mine, reference in zip(gradients(layer, x, compiled), gradients(layer, x, layer), strict=True):
        torch.testing.assert_close(mine, reference)


def test_the_full_width_weight_is_not_kept_by_the_compiler():
    """Two layers on one input, compiled: what autograd keeps has no [out, in] tensor of a 4-bit weight."""
    layer = adapted("nf4", inputs=64, outputs=64)
    other = adapted("nf4", inputs=64, outputs=64)
    both = torch.compile(lambda x: other(torch.relu(layer(x))), backend="aot_eager")
    x = torch.randn(8, 64, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        both(x)
    assert kept
    assert all(tuple(tensor.shape) != (64, 64) for tensor in kept if tensor.is_floating_point())


def test_autocast_computes_in_its_type_and_keeps_float32_gradients():
    layer = adapted("nf4")
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_a.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), atol=0.1, rtol=0.05)


def test_dropout_acts_on_the_adapter_alone_and_only_in_training():
    layer = adapted("int8", dropout=0.5)
    x = torch.randn(64, 64)
    whole = layer.eval()(x)
    frozen = ops.frozen_linear(x, layer.format, layer.pieces, 64, layer.bias)
    layer.train()
    drawn = torch.stack([layer(x) for _ in range(200)])
    assert drawn.std(0).mean() > 0
    torch.testing.assert_close(drawn.mean(0), whole, atol=1.5, rtol=0)
    assert distance(drawn.mean(0) - frozen, whole - frozen) < 0.2


def test_dora_begins_as_the_base_and_rescales_rows():
    layer = adapted("nf4", dora=True, bias=False)
    nn.init.zeros_(layer.lora_b)
    layer.start_magnitude()
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), x @ layer.whole_weight(torch.float32).t())
    nn.init.normal_(layer.lora_b, std=0.1)
    merged = layer.merged_weight(torch.float32)
    expected = x @ (merged * (layer.magnitude / merged.norm(dim=1))[:, None]).t()
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    layer(x).sum().backward()
    assert layer.magnitude.grad.norm() > 0


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_experts_are_one_adapter_each(kind):
    torch.manual_seed(0)
    leaf = LinearConfig(64, 32, quantization=FewerBits(kind) if kind else None)
    layer = LoraExperts(leaf, Lora(rank=4, alpha=8.0), 3)
    layer.take_weight(torch.randn(3, 32, 64) * 0.1)
    nn.init.normal_(layer.lora_a, std=0.1)
    nn.init.normal_(layer.lora_b, std=0.1)
    x, counts = torch.randn(10, 64), torch.tensor([4, 0, 6])
    weight = layer.whole_weight(torch.float32)

    def plain(x):
        merged = weight + layer.lora.scale * layer.lora_b @ layer.lora_a
        return grouped_linear(x, merged, counts)

    mine = gradients(layer, x, lambda x: layer(x, counts))
    for one, reference in zip(mine, gradients(layer, x, plain), strict=True):
        assert distance(one, reference) < 1e-5
    torch.testing.assert_close(layer.merged_weight(torch.float32), weight + 2.0 * layer.lora_b @ layer.lora_a)
