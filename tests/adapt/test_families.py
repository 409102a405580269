"""Adapters in every family, beside a base in full precision and in fewer bits: each learns, and nothing else does."""

import pytest
import torch

from tests.adapt.models import adapter, golden_model
from trainwright.adapt.peft import adapters_of
from trainwright.model import families
from trainwright.model.config import linears


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("family", families.names())
def test_every_linear_layer_has_an_adapter_that_learns(family, quantize):
    model = golden_model(family, adapter(), quantize=quantize).train()
    ids = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(0))
    output = model(ids, labels=ids.roll(-1, 1))
    (output.loss_sum + output.aux_loss).backward()
    expected = {path for path, _ in linears(model.config) if not path.endswith(".mlp.gate")}
    assert set(adapters_of(model)) == expected
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_a", "lora_b")):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.norm() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize(
    ("family", "targets", "leaves"),
    [
        ("gpt2", ["c_attn"], {"q_proj", "k_proj", "v_proj"}),  # a published name
        ("llama", "layers.1.*", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("mixtral", "all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("mixtral", ["self_attn.q_proj", "layers.?.mlp.experts.up_proj"], {"q_proj", "up_proj"}),
    ],
)
def test_targets(family, targets, leaves):
    paths = adapters_of(golden_model(family, adapter(targets=targets))).keys()
    assert {path.rpartition(".")[2] for path in paths} == leaves
    assert all(path.startswith("layers.1.") for path in paths) == (targets == "layers.1.*")
