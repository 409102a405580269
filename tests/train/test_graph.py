"""Recorded passes: the numbers of passes that ran as usual. Recording itself needs a GPU; its bookkeeping does not."""

from contextlib import nullcontext

import pytest
import torch

from tests.train.small import small_recipe
from trainwright.errors import UserError
from trainwright.train import graph
from trainwright.train.graph import GraphedPasses, check_graph, with_room
from trainwright.train.trainer import Trainer, train


class Replayed:
    """Stands for a CUDA graph on a CPU: runs the recorded pass again, into the same places."""

    def __init__(self):
        self.run = None

    def replay(self):
        self.run()


class Recorder:
    CUDAGraph = Replayed

    @staticmethod
    def graph(_, **__):
        return nullcontext()


class OnCpu(GraphedPasses):
    def _record(self, model, inputs, count, share):
        recorded = super()._record(model, inputs, count, share)

        def run():
            held = {p: p.grad for p in recorded.grads}
            for p in recorded.grads:
                p.grad = None
            output = model(**recorded.inputs)
            share(output, recorded.count).backward()
            for p, place in recorded.grads.items():
                place.copy_(p.grad)
                p.grad = held[p]
            recorded.loss_sum.copy_(output.loss_sum.detach())

        recorded.graph.run = run
        return recorded


@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_are_those_of_plain_passes(accumulation, tmp_path, monkeypatch):
    monkeypatch.setattr(graph.torch, "get_device_module", lambda device: Recorder)
    losses = {}
    for name in ("plain", "recorded"):
        settings = small_recipe(
            tmp_path / name, f"train.gradient_accumulation_steps={accumulation}", "data.packing=false", "train.steps=8"
        )
        trainer = Trainer(settings)
        if name == "recorded":
            trainer.take_step.graphs = OnCpu(trainer.optimizers.parameters)
        trainer.run()
        trainer.close()
        if name == "recorded":
            assert trainer.take_step.graphs.recorded
        losses[name] = (trainer.folder.metrics).read_text().count("\n"), trainer.loss
    assert losses["plain"] == losses["recorded"]


def test_offsets_get_one_shape():
    ids = torch.zeros(2, 128, dtype=torch.long)
    shapes = set()
    for ends in ([0, 100, 128, 256], [0, 7, 50, 128, 180, 256]):
        inputs = with_room({"input_ids": ids, "cu_seqlens": torch.tensor(ends, dtype=torch.int32), "max_seqlen": 100})
        offsets = inputs["cu_seqlens"]
        assert offsets[: len(ends)].tolist() == ends
        assert (offsets[len(ends) :] == 256).all()
        assert inputs["max_seqlen"] == 128
        shapes.add(tuple(offsets.shape))
    assert len(shapes) == 1
    many = {"input_ids": ids, "cu_seqlens": torch.arange(257, dtype=torch.int32), "max_seqlen": 1}
    assert with_room(many) is many


def test_where_passes_cannot_be_recorded(tmp_path):
    with pytest.raises(UserError, match="this is cpu"):
        train(small_recipe(tmp_path, "train.cuda_graph=true"))
    with pytest.raises(UserError, match="several"):
        check_graph(torch.device("cuda"), alone=False)


@pytest.mark.gpu
@pytest.mark.parametrize("packing", ["true", "false"])
def test_on_a_gpu(tmp_path, packing):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    lines = {}
    for value in ("false", "true"):
        words = (f"train.cuda_graph={value}", f"data.packing={packing}", "train.precision=bf16", "train.steps=10")
        lines[value] = train(small_recipe(tmp_path / value, *words)).loss
    assert lines["true"] == pytest.approx(lines["false"], rel=0.02)
