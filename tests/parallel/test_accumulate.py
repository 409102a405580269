"""Gradients of micro batches added up: FSDP does it by our one pass, with the sums of one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from trainwright.parallel import accumulate


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp_adds_micro_batches_by_it(alone, monkeypatch):
    """One call for each parameter and micro batch after the first."""
    calls, real = [], accumulate.accumulate
    monkeypatch.setattr(accumulate, "accumulate", lambda *both: (calls.append(both[0].dtype), real(*both)))
    accumulate.accumulate_fast()
    plain = nn.Linear(8, 4).to(torch.bfloat16)
    model = nn.Linear(8, 4)
    model.load_state_dict(plain.state_dict())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_shard(model, mp_policy=policy)
    totals = [torch.zeros(4, 8), torch.zeros(4)]
    rows = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for count, batch in enumerate(rows, 1):
        model.set_requires_gradient_sync(count == len(rows))
        model(batch).float().square().sum().backward()
        out = F.linear(batch, plain.weight, plain.bias).float().square().sum()
        for total, grad in zip(totals, torch.autograd.grad(out, [plain.weight, plain.bias]), strict=True):
            total += grad
    assert calls == [torch.float32] * 4
    for ours, total in zip([model.weight.grad, model.bias.grad], totals, strict=True):
        assert torch.equal(ours.to_local(), total)
