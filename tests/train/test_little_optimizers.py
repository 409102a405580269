"""Optimizers for little memory: AdamW with 8-bit moments, Lion."""

import pytest
import torch
from torch import nn

from trainwright.train import adamw8bit
from trainwright.train.adamw8bit import AdamW8bit, compress, decompress
from trainwright.train.lion import Lion
from trainwright.train.muon import Muon
from trainwright.train.optimizer import build_optimizer


def test_codes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        mine = adamw8bit.code(signed, torch.device("cpu"))
        assert torch.equal(mine, functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_have_256_values_and_zero(signed):
    values = adamw8bit.code(signed, torch.device("cpu"))
    assert values.unique().numel() == 256
    assert 0.0 in values
    assert values[-1] == 1.0
    assert (values[0] == 0) != signed


@pytest.mark.parametrize("shape", [(20, 256), (7, 300), (3, 5, 70), (600,)])
@pytest.mark.parametrize("signed", [True, False])
def test_compressed_moments_come_back(shape, signed):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 3
    values = values if signed else values.abs()
    codes, scale = compress(values, signed)
    assert codes.shape == values.shape
    assert scale.shape == (*shape[:-1], -(-shape[-1] // 256))
    back = decompress(codes, scale, signed)
    assert ((back - values).norm() / values.norm()) < 0.02
    assert (back - values).abs().max() <= values.abs().max() * 0.05


def regression(optimizer_of, steps=60):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    goal = nn.Linear(64, 64)
    optimizer = optimizer_of(model)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 64)
        loss = (model(x) - goal(x)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_it_learns_as_adamw_does():
    exact = regression(lambda model: torch.optim.AdamW(model.parameters(), 3e-3, (0.9, 0.95)))
    small = regression(lambda model: AdamW8bit(model.parameters(), 3e-3))
    assert small[-1] < 0.3 * small[0]
    for one, other in zip(exact, small, strict=True):
        assert one == pytest.approx(other, rel=0.05)


def test_small_parameters_are_exact():
    torch.manual_seed(0)
    one, other = nn.Linear(8, 8), nn.Linear(8, 8)
    other.load_state_dict(one.state_dict())
    exact = torch.optim.AdamW(one.parameters(), 1e-2, (0.9, 0.95), weight_decay=0.1)
    groups = [{"params": list(other.parameters()), "weight_decay": 0.1}]
    small = AdamW8bit(groups, 1e-2)
    for _ in range(5):
        x = torch.randn(4, 8)
        for layer, optimizer in ((one, exact), (other, small)):
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(one.weight, other.weight)


def built(name):
    torch.manual_seed(0)
    model = nn.Linear(128, 64)
    return model, build_optimizer(model, name, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def test_a_refused_step_changes_nothing():
    model, optimizers = built("adamw8bit")
    assert optimizers.guards_itself
    optimizers.set_learning_rate(1e-2)
    one, zero = torch.ones(()), torch.zeros(())
    for bad in (zero, one):
        model(torch.randn(4, 128)).sum().backward()
        if bad:
            model.weight.grad[0, 0] = float("nan")
        before = [tensor.clone() for tensor in (*model.parameters(), *optimizers.state_tensors().values())]
        optimizers.step(one, bad)
        after = [*model.parameters(), *optimizers.state_tensors().values()]
        optimizers.zero_grad()
        if bad:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizers.state_tensors()["weight.step"] == 1


def test_gradients_are_scaled_on_the_way():
    steps = []
    for factor in (1.0, 8.0):
        model, optimizers = built("adamw8bit")
        optimizers.set_learning_rate(1e-2)
        (model(torch.ones(4, 128)).square().sum() * factor).backward()
        optimizers.step(torch.tensor(1 / factor), torch.zeros(()))
        steps.append(model.weight.detach().clone())
    torch.testing.assert_close(steps[0], steps[1])


def test_states_take_two_bytes_a_parameter():
    _, optimizers = built("adamw8bit")
    optimizers.create_states()
    sizes = {name: tensor.nbytes for name, tensor in optimizers.state_tensors().items()}
    assert sum(size for name, size in sizes.items() if name.startswith("weight.")) == 2 * 64 * 128 + 2 * 4 * 64 + 4


def test_lion_by_hand():
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = Lion([weight], lr=0.1, betas=(0.9, 0.99))
    optimizer.param_groups[0]["weight_decay"] = 0.5
    for grad in (torch.tensor([1.0, -1.0, 0.0]), torch.tensor([-20.0, -1.0, 1.0])):
        weight.grad = grad
        optimizer.step()
    # step 1: w = 0.95 w - 0.1 sign(g), m = 0.01 g; step 2: w = 0.95 w - 0.1 sign(0.9 m + 0.1 g)
    first = [0.85, -1.8, 2.85]
    expected = [0.95 * first[0] + 0.1, 0.95 * first[1] + 0.1, 0.95 * first[2] - 0.1]
    torch.testing.assert_close(weight.detach(), torch.tensor(expected))


def test_lion_learns():
    losses = regression(lambda model: Lion(model.parameters(), 1e-3))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor", "lion", "muon", "sgd"])
def test_every_name_of_the_recipe_is_built(name):
    model, optimizers = built(name)
    optimizers.create_states()
    before = model.weight.detach().clone()
    optimizers.set_learning_rate(1e-2)
    model(torch.ones(4, 128)).sum().backward()
    optimizers.step(torch.ones(()), torch.zeros(()))
    assert not torch.equal(before, model.weight)


def one_step(name, rate=0.01, shape=(64, 128)):
    """(weight before, gradient, weight after) of one step of the recipe's optimizer on a layer's matrix, no decay."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.Linear(shape[1], shape[0], bias=False)  # Muon takes what is called layers.*
    optimizers = build_optimizer(model, name, betas=(0.95, 0.95), eps=1e-8, weight_decay=0.0)
    optimizers.set_learning_rate(rate)
    weight = model.layers.weight
    weight.grad = torch.randn(shape)
    before, grad = weight.detach().clone(), weight.grad.clone()
    optimizers.step(torch.ones(()), torch.zeros(()))
    return before, grad, weight.detach()


def test_muon_steps_along_the_orthogonal_matrix_next_to_the_gradient():
    before, grad, after = one_step("muon")
    step = (before - after) / 0.01
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    size = 0.2 * 128**0.5  # Liu et al. 2025, equation 4: as large as AdamW's
    sizes = torch.linalg.svdvals(step) / size
    assert sizes.min() > 0.6  # five Newton-Schulz steps bring singular values near 1, not to 1
    assert sizes.max() < 1.3
    assert torch.nn.functional.cosine_similarity(step.flatten(), (u @ vh).flatten(), 0) > 0.98


def test_muon_takes_matrices_of_one_shape_together_and_each_as_if_alone(monkeypatch):
    """Beside torch's, which goes through them one after another; ours also in batches that end between them."""
    monkeypatch.setattr("trainwright.train.muon.BATCH_ELEMENTS", 2 * 64 * 128)
    torch.manual_seed(0)
    shapes = [(64, 128), (128, 64), (64, 128), (32, 32), (64, 128)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizer = Muon(ours, 0.9, 0.1)
    optimizer.param_groups[0]["lr"] = 0.01
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    size = 0.01 * 0.2 * 128**0.5
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=3 * 0.02 * size, rtol=0)  # theirs rounds to bfloat16


def test_adafactor_by_hand():
    """Shazeer & Stern 2018, algorithm 4, first step: the second moment is the rank-one fit of the squared gradient."""
    before, grad, after = one_step("adafactor")
    squares = grad.square()
    fit = squares.mean(1, keepdim=True) * squares.mean(0, keepdim=True) / squares.mean()
    update = grad / fit.sqrt()
    update /= max(1.0, float(update.square().mean().sqrt()))
    rate = 0.01 * max(1e-3, float(before.square().mean().sqrt()))
    torch.testing.assert_close(after, before - rate * update, atol=1e-7, rtol=1e-4)


def test_adamw_by_hand():
    before, grad, after = one_step("adamw")
    torch.testing.assert_close(after, before - 0.01 * grad.sign(), atol=1e-6, rtol=1e-4)
