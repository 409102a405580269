"""Adafactor: torch's own numbers, and the same ones over shards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.parallel.worlds import run
from trainwright.train.adafactor import Adafactor

SHAPES = {"matrix": (10, 6), "experts": (4, 6, 8), "bias": (7,)}
PLACES = {
    "rows": (Replicate(), Shard(0)),
    "rows over all": (Shard(0), Shard(0)),
    "rows and columns": (Shard(0), Shard(-1)),
}


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def weights() -> dict[str, torch.Tensor]:
    return {name: 0.1 * value for name, value in gradients(99).items()}


def stepped(make, place=lambda tensor: tensor) -> dict[str, torch.Tensor]:
    trained = {name: nn.Parameter(place(value)) for name, value in weights().items()}
    optimizer = make([{"params": list(trained.values()), "weight_decay": 0.1}])
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    for step in range(4):
        for name, grad in gradients(step).items():
            trained[name].grad = place(grad)
        optimizer.step()
    return {name: value.detach() for name, value in trained.items()}


def test_as_torch_has_it() -> None:
    theirs = stepped(lambda groups: torch.optim.Adafactor(groups, lr=0.05))
    ours = stepped(Adafactor)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=name)


def over_shards(name: str) -> float:
    """The largest difference of any rank's piece from the plain one's."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))

    def place(tensor: torch.Tensor) -> DTensor:
        places = [Shard(p.dim % tensor.ndim) if isinstance(p, Shard) else p for p in PLACES[name]]
        return distribute_tensor(tensor, mesh, places)

    got, wanted = stepped(Adafactor, place), stepped(Adafactor)
    return max(float((got[key].full_tensor() - wanted[key]).abs().max()) for key in wanted)


@pytest.mark.parametrize("name", PLACES)
def test_over_shards(name: str) -> None:
    assert max(run(4, over_shards, name)) < 1e-6
