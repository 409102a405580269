"""Sharded gradients lie in the computing stream's memory, which activations use between two optimizer steps."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from trainwright.parallel.reduce import Reduce

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stream_of(tensor: torch.Tensor) -> int:
    """Whose memory a tensor is in."""
    place = tensor.data_ptr()
    return next(
        segment["stream"]
        for segment in torch.cuda.memory_snapshot()
        if segment["address"] <= place < segment["address"] + segment["total_size"]
    )


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_lie_where_activations_do(alone, micro_batches):
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(512, 512, device="cuda") for _ in range(4)))
    sharded = nn.Sequential(*(nn.Linear(512, 512, device="cuda") for _ in range(4)))
    sharded.load_state_dict(plain.state_dict())
    for module in [*sharded, sharded]:
        fully_shard(module)
        assert isinstance(module, FSDPModule)
        module.set_custom_reduce_scatter(Reduce())
    for _ in range(micro_batches):
        x = torch.randn(256, 512, device="cuda")
        for model in (plain, sharded):
            model(x).square().mean().backward()
    torch.cuda.synchronize()
    computing = torch.cuda.current_stream().cuda_stream
    for ours, expected in zip(sharded.parameters(), plain.parameters(), strict=True):
        grad = ours.grad.to_local()
        torch.testing.assert_close(grad, expected.grad)
        assert stream_of(grad) == computing
