"""Recompute and offload change memory, never a number; a budget is kept to; a stale random state is noticed."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.parallel import models
from trainwright.model.transformer import Transformer
from trainwright.parallel import offload, recompute
from trainwright.parallel.offload import apply_offload
from trainwright.parallel.recompute import GIB, KEPT, PRODUCTS, Budget, apply_recompute
from trainwright.parallel.split import away_layers


def build(name: str = "llama") -> Transformer:
    return Transformer(models.MODELS[name]()).init_weights(3).train()


def gradients(model: Transformer, passes: int = 1, name: str = "llama") -> dict[str, Tensor]:
    batch = models.inputs(models.batches(1, 2, 32, 7, prompts=name == "glm")[0], name)
    for _ in range(passes):
        model.zero_grad()
        output = model(**batch)
        (output.loss_sum + output.aux_loss).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in PRODUCTS
        return function(*args, **(kwargs or {}))


class SavedBytes:
    """Bytes that the graph of one forward pass keeps, each storage once, weights left out."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[int, int] = {}
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __call__(self, run) -> int:
        with torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor):
            run()
        return sum(self.seen.values())

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.seen[storage.data_ptr()] = storage.nbytes()
        return tensor


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("away", [False, True])
def test_gradients_are_those_without(name, mode, away, monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    expected = gradients(build(name), name=name)
    model = build(name)
    apply_recompute(model.layers.values(), mode)
    host = apply_offload(model.layers.values(), torch.device("cpu")) if away else None
    found = gradients(model, passes=2, name=name)
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        assert torch.equal(grad, expected[key]), key
    assert host is None or host.bytes > 0


def products(mode: str, memory_gib: float | None = None, passes: int = 1) -> int:
    model = build()
    apply_recompute(model.layers.values(), mode, memory_gib=memory_gib)
    gradients(model, passes)
    with Products() as counter:
        gradients(model)
    return counter.count


def test_selective_repeats_no_matrix_product_and_full_repeats_all():
    none, selective, full = (products(mode) for mode in ("none", "selective", "full"))
    assert selective == none
    assert full == none + 3 * 7 - 3  # seven linear layers a block; each block's last one is not needed again


def test_a_budget_keeps_what_fits_and_the_best_first():
    """From nothing (all is repeated) to everything (nothing is), and never the other way."""
    counts = [products("selective", kib * 1024 / GIB) for kib in (0, 24, 48, 96, 10_000)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == products("full")
    assert counts[-1] == products("none")
    assert len(set(counts)) > 3


def test_a_budget_is_kept_to():
    budget = Budget(50_000)
    for layer in range(3):
        budget.seen[layer] = [
            recompute.Result(layer, ("a", 1), 20_000, 3e6),  # the best per byte
            recompute.Result(layer, ("b", 1), 8_000, 1e6),
            recompute.Result(layer, ("c", 1), 40_000, 4e6),
        ]
    kept = budget._choose()
    assert kept == {0: {("a", 1), ("b", 1)}, 1: {("a", 1)}, 2: frozenset()}
    taken = {("a", 1): 20_000, ("b", 1): 8_000, ("c", 1): 40_000}
    assert sum(taken[key] for keys in kept.values() for key in keys) <= 50_000


def test_less_is_kept_with_more_recompute():
    batch = models.batches(1, 2, 32, 7)[0]
    held = {}
    for mode in ("none", "selective", "full"):
        model = build()
        apply_recompute(model.layers.values(), mode)
        held[mode] = SavedBytes(model)(lambda model=model: model(batch.input_ids, labels=batch.labels))
    assert held["full"] < held["none"]
    assert held["selective"] < held["none"]


def test_offload_leaves_weights_and_the_last_layer(monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    model = build()
    host = apply_offload(model.layers.values(), torch.device("cpu"))
    sent = []
    real = offload.Trip._send
    monkeypatch.setattr(
        offload.Trip, "_send", lambda trip, tensor: sent.append((trip.layer, tensor)) or real(trip, tensor)
    )
    gradients(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert sent
    assert not any(tensor.untyped_storage().data_ptr() in weights for _, tensor in sent)
    layers = list(model.layers.values())
    assert {id(layer) for layer, _ in sent} == {id(layer) for layer in layers[:-1]}
    assert host.bytes == sum(tensor.nbytes for _, tensor in sent)


@pytest.mark.parametrize(("share", "expected"), [(1.0, [0, 1, 2, 3, 4]), (0.5, [1, 3]), (2 / 3, [0, 1, 3]), (0.1, [])])
def test_a_share_of_the_layers_goes_evenly_spread(share, expected):
    assert away_layers(6, share) == expected


def test_only_that_share_travels_and_nothing_changes(monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    expected, sent = gradients(build()), {}
    for share in (0.5, 1.0):
        model = build()
        host = apply_offload(model.layers.values(), torch.device("cpu"), share)
        found = gradients(model)
        assert all(torch.equal(grad, expected[key]) for key, grad in found.items())
        sent[share] = host.bytes
    assert 0 < sent[0.5] < sent[1.0]


def test_what_was_sent_is_let_go_a_layer_later_and_called_back_a_layer_early(monkeypatch):
    """The next layer runs while one is copied out, the next in the backward pass while one is copied back. When that
    pass begins, nothing is on its way out any more, and the last layer that travelled is on its way back."""
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    model, told = Transformer(models.llama(5)).init_weights(3).train(), []
    layers = list(model.layers.values())
    for name in ("let_go", "fetch", "_send"):
        real = getattr(offload.Trip, name)

        def spy(trip, *args, name=name, real=real):
            event = (name, layers.index(trip.layer))
            if event not in told:
                told.append(event)
            return real(trip, *args)

        monkeypatch.setattr(offload.Trip, name, spy)
    apply_offload(layers, torch.device("cpu"))
    gradients(model)
    assert told == [
        *(("_send", 0), ("_send", 1), ("let_go", 0), ("_send", 2), ("let_go", 1), ("_send", 3)),
        *(("let_go", 2), ("let_go", 3), ("fetch", 3), ("fetch", 2), ("fetch", 1), ("fetch", 0)),
    ]


class Noisy(nn.Module):
    """A layer whose backward pass needs its own dropout again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(self.linear(x), 0.5) * x


def forgetful(*args, **settings):
    """`checkpoint` that repeats a layer with whatever random numbers come."""
    return checkpoint(*args, **settings | {"preserve_rng_state": False})


def noisy_gradient(stale: bool) -> list[Tensor]:
    grads = []
    for repeat in (False, True):
        torch.manual_seed(0)
        layer = Noisy()
        if repeat:
            apply_recompute([layer], "full")
        with mock.patch.object(recompute, "checkpoint", forgetful if stale else recompute.checkpoint):
            layer(torch.ones(4, 16, requires_grad=True)).sum().backward()
        grads.append(layer.linear.weight.grad)
    return grads


def test_dropout_is_repeated_alike_and_a_stale_random_state_is_noticed():
    plain, repeated = noisy_gradient(stale=False)
    assert torch.equal(plain, repeated)
    plain, repeated = noisy_gradient(stale=True)
    assert not torch.allclose(plain, repeated)


def test_every_kept_operator_is_one():
    assert len(KEPT) >= 10
    assert all(isinstance(operation, torch._ops.OpOverload | torch._ops.HigherOrderOperator) for operation in KEPT)
