"""Recompute, compilation and host memory with adapters: the same gradients, and only what is meant is kept."""

import functools

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from tests.adapt.models import adapter
from tests.train.small import CONFIG
from trainwright.adapt import ops
from trainwright.adapt.rewrite import adapted_config
from trainwright.adapt.setup import freeze_base, start_adapters
from trainwright.model.checkpoint import load_config
from trainwright.model.transformer import Transformer
from trainwright.parallel import offload, recompute
from trainwright.parallel.budget import apply_budget
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
    right = ops.product
    monkeypatch.setattr(ops, "product", lambda *args: calls.append(1) or right(*args))
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


def partitioned(built, apply):
    """Of the last layer, compiled with the partitioner that inductor uses: (sizes of what the forward pass keeps beside
    its inputs, how many frozen products the backward pass computes again)."""
    found = {"forward": [], "backward": []}

    def compiler(which):
        def note(graph, inputs):
            found[which].append(graph.graph)
            return make_boxed_func(graph.forward)

        return note

    backend = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table,
    )
    torch._dynamo.reset()
    built.set_attention_backend("eager")  # the CPU's own kernel has a random state, which torch 2.11 cannot compile
    apply(list(built.layers.values()), functools.partial(torch.compile, backend=backend))
    gradients(built)
    forward, backward = found["forward"][-1], found["backward"][0]
    given = {node for node in forward.nodes if node.op == "placeholder"}
    kept = [node.meta["val"] for node in forward.output_node().args[0][1:] if node not in given]
    loras = torch.ops.trainwright
    again = sum(node.target is loras.lora_linear.default for node in backward.nodes)
    again += sum(len(node.args[6]) for node in backward.nodes if node.target is loras.lora_linears.default)
    return [tensor.numel() for tensor in kept if isinstance(tensor, torch.Tensor)], again


def test_full_recompute_is_not_lost_in_compilation():
    def apply(layers, compile_):
        apply_recompute(layers, "full")
        for layer in layers:
            layer.forward = compile_(layer.forward)

    kept, again = partitioned(model(), apply)
    assert sum(kept) < 64 * 64  # less than the stream: a row of 64 tokens
    assert again == 6  # the result of down_proj is nobody's, so it is not computed again


@pytest.mark.parametrize(("level", "widths", "again"), [("all", 64 * 4 + 2 * 128, 0), ("attention", 64 * 4, 2)])
def test_a_layer_within_a_budget_keeps_its_products(level, widths, again):
    def apply(layers, compile_):
        apply_budget(layers, 1.0, compile_=compile_).levels = [level] * 3

    kept, found = partitioned(model(), apply)
    assert found == again
    assert sum(kept) < 64 * (widths + 7 * 4) + 2 * 4 * 64 * 64  # with x A^T; eager attention keeps its scores twice


def test_cost_of_a_kept_product():
    x, weight = torch.empty(2, 5, 64), torch.empty(96, 64)
    assert recompute._cost(next(iter(ops.KEPT)), (x, "plain", [weight])) == (10 * 96 * 4, 2.0 * 10 * 96 * 64)
    joined = (x, "plain", [weight, weight], torch.empty(10, 16), [], [torch.empty(8, 64)] * 2, [torch.empty(96, 8)] * 2)
    operation = torch.ops.trainwright.lora_linears.default
    assert recompute._cost(operation, joined) == (2 * 10 * 96 * 4, 2 * 2.0 * 10 * 96 * 64)
