"""Every family on a GPU in float32: the golden numbers again; and one bf16 step in every backend, finite and close."""

from __future__ import annotations

import pytest
import torch

from tests.golden import golden_dir
from tests.model.golden_case import GoldenCase
from trainwright.model import families

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("family", families.names())
def test_logits_and_a_bf16_step(family: str) -> None:
    case = GoldenCase(golden_dir(family), family)
    model = case.model.cuda()
    ids, labels = case.input_ids.cuda(), case.labels.cuda()
    inputs = {name: tensor.cuda() for name, tensor in case.inputs().items()}
    with torch.no_grad():
        logits = model(ids, **inputs).cpu()
    assert (logits - case.io["logits"]).abs().max() < 1e-4
    model.bfloat16()
    documents = torch.zeros_like(ids, dtype=torch.int32)
    for extra in ({}, {"document_ids": documents}):
        out = model(ids, **{k: v for k, v in inputs.items() if k != "attention_mask"}, **extra, labels=labels)
        (out.loss_sum / out.num_tokens).backward()
        assert abs((out.loss_sum / out.num_tokens).item() - case.io["loss"].item()) < 0.05
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
