"""Compiled layers train as eager ones do, whole and split, each as one graph. It is captured and differentiated, not
lowered."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.model.varlen_on_cpu import varlen_on_cpu
from tests.parallel import models, parity
from tests.parallel.parity import TOLERANCE, Case, Trace, differences
from tests.parallel.test_mutants import replaced
from tests.parallel.worlds import run
from trainwright.model.kernels import attention as kernel
from trainwright.model.mask import document_offsets
from trainwright.model.transformer import Transformer
from trainwright.parallel import apply
from trainwright.parallel.layout import Layout
from trainwright.recipe.parallel import ParallelRecipe


def compiled(case: Case) -> Trace:
    """The case with every layer compiled for torch's own `aot_eager`."""
    real = parity.parallelize

    def with_compile(*args, **options):  # type: ignore[no-untyped-def]
        return real(*args, **{**options, "compile_layers": True})

    with (
        replaced(torch, "compile", functools.partial(torch.compile, backend="aot_eager")),
        replaced(parity, "parallelize", with_compile),
    ):
        torch._dynamo.reset()
        counters.clear()
        trace = parity.trace_of(case)
    breaks = dict(counters["graph_break"])
    assert not breaks or case.layout.ep > 1, f"a layer is not one graph, or not compiled at all: {breaks}"
    assert counters["stats"]["unique_graphs"] >= 1
    return trace


@pytest.mark.parametrize(
    "case",
    [
        Case("llama", Layout(world_size=2)),
        Case("llama", Layout(world_size=2, tp=2)),
        Case("llama", Layout(world_size=2, tp=2), (("recompute", "full"),)),
        Case("bloom", Layout(world_size=2, tp=2), (("recompute", "selective"),)),
        Case("llama", Layout(world_size=2, tp=2), (("async_tp", True),)),
        Case("bloom", Layout(world_size=2, tp=2), (("async_tp", True), ("recompute", "selective"))),
        Case("llama", Layout(world_size=2, cp=2), (("recompute", "full"),)),
        Case("mixtral", Layout(world_size=2, ep=2)),  # the journey of the rows is not compiled
    ],
    ids=str,
)
def test_compiled_layers(case: Case) -> None:
    worst = differences(case, run(2, compiled, case))
    assert max(worst.values()) <= TOLERANCE, worst


def as_on_a_gpu() -> Any:
    """The attention that CUDA takes, which `varlen_on_cpu` has kernels for."""
    real = kernel.choose

    def choose(mask: Any, **facts: Any) -> Any:
        return real(mask, **{**facts, "device": torch.device("cuda"), "dtype": torch.bfloat16})

    return replaced(kernel, "choose", choose)


def rows(documents: int) -> dict[str, Any]:
    """Two rows of so many documents each, as the step gives them."""
    ids = torch.randint(0, models.VOCAB, (2, 32))
    given: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if documents > 1:
        document_ids = (torch.arange(32)[None].expand(2, -1) * documents // 32).int()
        offsets = document_offsets(document_ids)
        given |= {"document_ids": document_ids, "cu_seqlens": offsets, "max_seqlen": int(offsets.diff().max())}
    return given


def passes(recipe: ParallelRecipe, backend: str, layers: int) -> tuple[Transformer, Transformer]:
    """(compiled, plain) models of the same weights."""
    torch._dynamo.reset()
    counters.clear()
    compiled, plain = (Transformer(models.llama(layers)).init_weights(3) for _ in range(2))
    with replaced(torch, "compile", functools.partial(torch.compile, backend=backend)):
        apply._recompute_and_compile(list((compiled.layers or {}).values()), recipe, recipe.recompute_memory, True)
    return compiled, plain


def test_packed_rows_are_compiled_once_and_once_for_any_number_of_documents() -> None:
    """By the path of GPUs: every step has other offsets and another longest document."""
    with as_on_a_gpu(), varlen_on_cpu():
        compiled, plain = passes(ParallelRecipe(), "aot_eager", 1)
        for documents in (3, 4, 5, 7):
            given = rows(documents)
            for model in (compiled, plain):
                model.zero_grad()
                model(**given).loss_sum.backward()
            for one, two in zip(compiled.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(one.grad, two.grad)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2


def test_a_layer_has_more_programs_than_torch_allows_by_itself() -> None:
    """Three levels of what is kept, whole rows and packed ones, training and evaluation: nothing runs uncompiled."""
    recipe = ParallelRecipe(recompute="selective", recompute_memory=1e-6)
    with as_on_a_gpu(), varlen_on_cpu():
        compiled, _ = passes(recipe, "eager", 3)
        for documents in (1, 3, 4, 1):
            compiled(**rows(documents)).loss_sum.backward()
        with torch.no_grad():
            for documents in (1, 3):
                compiled.eval()(**rows(documents))
    assert counters["frames"]["total"] == counters["frames"]["ok"] > 8
