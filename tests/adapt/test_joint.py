"""Layers of one input as one operation: what each of them gives, forward and backward, and when they are not joined."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.adapt.models import adapter, golden_model
from tests.adapt.test_ops import BOUND, FORMATS, distance
from trainwright.adapt.linear import LoraLinear
from trainwright.adapt.lora import Lora
from trainwright.adapt.quantize import FewerBits
from trainwright.model.config import LinearConfig
from trainwright.model.linear import project

WIDTHS = (96, 32, 48)


def layers_of(kind: str | None, *, bias: bool = False, ranks: tuple[int, ...] = (8, 8, 8), **lora) -> list[LoraLinear]:
    torch.manual_seed(0)
    made = []
    for outputs, rank in zip(WIDTHS, ranks, strict=True):
        leaf = LinearConfig(64, outputs, bias, quantization=FewerBits(kind) if kind else None)
        layer = LoraLinear(leaf, Lora(rank=rank, alpha=2.0 * rank, **lora))
        layer.take_weight(torch.randn(outputs, 64) * 0.05)
        for parameter in (layer.lora_a, layer.lora_b, *([layer.bias] if bias else [])):
            nn.init.normal_(parameter, std=0.1)
        made.append(layer)
    return made


def results(layers: list[LoraLinear], x: Tensor, forward) -> list[Tensor]:
    """All outputs, the gradient of x, then of every A and B, of a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    for layer in layers:
        layer.zero_grad()
    outputs = forward(x)
    sum((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in outputs).backward()
    grads = [part.grad.clone() for layer in layers for part in (layer.lora_a, layer.lora_b)]
    return [*(y.detach() for y in outputs), x.grad, *grads]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_joined_layers_are_what_each_is(kind, bias, compiled):
    layers = layers_of(kind, bias=bias, ranks=(8, 4, 8))
    x = torch.randn(2, 5, 64)

    def joined(x):
        made = layers[0].together(x, layers[1:])
        assert made is not None
        return made

    ours = results(layers, x, torch.compile(joined) if compiled else joined)
    for given, expected in zip(ours, results(layers, x, lambda x: [layer(x) for layer in layers]), strict=True):
        assert distance(given, expected) < BOUND[kind]


def test_an_input_without_gradient():
    layers, x = layers_of(None), torch.randn(3, 64)
    for given in (layers[0].together(x, layers[1:]), [layer(x) for layer in layers]):
        assert given is not None
        sum(y.square().sum() for y in given).backward()
    first = [layer.lora_a.grad for layer in layers]
    assert x.grad is None
    assert all(grad is not None and grad.abs().sum() > 0 for grad in first)


@pytest.mark.parametrize("lora", [{"dropout": 0.1}, {"dora": True}], ids=str)
def test_other_adapters_are_not_joined(lora):
    layers = layers_of(None, **lora)
    assert layers[0].together(torch.randn(3, 64), layers[1:]) is None


def test_layers_that_differ_or_are_watched_are_not_joined():
    x, layers = torch.randn(3, 64), layers_of(None)
    other = layers_of("int8")[1]
    assert layers[0].together(x, [other]) is None
    assert layers[0].together(x, [nn.Linear(64, 8)]) is None
    assert layers[0].together(x, layers_of(None, bias=True)[1:]) is None
    seen = []
    layers[1].register_forward_hook(lambda *_: seen.append(1))
    assert [tuple(y.shape) for y in project(x, *layers)] == [(3, width) for width in WIDTHS]
    assert seen == [1]


class Counted(TorchDispatchMode):
    """How often each of our operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, int] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name()
        if name.startswith("trainwright::lora"):
            self.runs[name] = self.runs.get(name, 0) + 1
        return operation(*args, **(kwargs or {}))


def test_a_llama_has_two_such_operations_in_a_layer():
    model = golden_model("llama", adapter())
    ids = torch.randint(0, 32, (2, 8))
    with Counted() as counted:
        model(ids, labels=ids).loss_sum.backward()
    layers = model.config.num_layers
    names = ("lora_linears", "lora_linears_backward", "lora_linear", "lora_linear_backward")
    assert [counted.runs.get(f"trainwright::{name}", 0) for name in names] == [2 * layers] * 4
