"""Recompute, compilation and host memory with adapters: the same gradients, and only what is meant is kept."""

import pytest
import torch

from tests.adapt.models import adapter
from tests.train.small import CONFIG
from trainwright.adapt import ops
from trainwright.adapt.rewrite import adapted_config
from trainwright.adapt.setup import freeze_base, start_adapters
from trainwright.model.checkpoint import load_config
from trainwright.model.transformer import Transformer
from trainwright.parallel import offload, recompute
from trainwright.parallel.offload import apply_offload
from trainwright.parallel.recompute import apply_recompute

SIZES = CONFIG | {"vocab_size": 256, "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128}


def model(quantize="nf4", **settings):
    config = adapted_config(load_config(SIZES), adapter(**settings), quantize)
    built = Transformer(config).init_weights(0)
    start_adapters(built, 0)
    freeze_base(built)
    for name, parameter in built.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return built


def gradients(built, steps=1):
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(0, 256, (1, 64), generator=generator) for _ in range(2))
    for _ in range(steps):
        built.zero_grad()
        built(ids, labels=labels).loss_sum.backward()
    return {name: p.grad for name, p in built.named_parameters() if p.grad is not None}


def check(one, other):
    assert one.keys() == other.keys()
    for name, grad in one.items():
        torch.testing.assert_close(grad, other[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("away", [False, True])
def test_gradients_are_the_same(mode, compiled, away, monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 4096)
    plain = gradients(model())
    built = model()
    layers = list(built.layers.values())
    apply_recompute(layers, mode)
    if compiled:
        torch._dynamo.reset()
        for layer in layers:
            layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    host = apply_offload(layers, torch.device("cpu")) if away else None
    check(gradients(built, steps=2), plain)
    if host is not None:
        assert host.bytes > 0


def test_layers_that_recompute_are_compiled():
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    built = model()
    apply_recompute(built.layers.values(), "full")
    for layer in built.layers.values():
        layer.forward = torch.compile(layer.forward, backend=backend)
    gradients(built)
    assert seen


def test_selective_recompute_runs_no_frozen_product_twice(monkeypatch):
    calls = []
    right = ops._forward
    monkeypatch.setattr(ops, "_forward", lambda *args: calls.append(1) or right(*args))
    built = model()
    gradients(built)
    once = len(calls)
    assert once == 3 * 7
    for mode, times in (("selective", 1), ("full", 2)):
        calls.clear()
        built = model()
        apply_recompute(built.layers.values(), mode)
        gradients(built)
        assert len(calls) == times * once


def test_cost_of_a_kept_product():
    x, weight = torch.empty(2, 5, 64), torch.empty(96, 64)
    assert recompute._cost(next(iter(ops.KEPT)), (x, "plain", [weight])) == (10 * 96 * 4, 2.0 * 10 * 96 * 64)
