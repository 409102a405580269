"""Updates within the backward pass: weights, losses and norms of updates after it, in every layout that has them."""

import pytest
import torch

from tests.parallel import models
from tests.parallel.parity import Case, micro_batches
from tests.parallel.worlds import run, world_of
from trainwright.errors import UserError
from trainwright.model.transformer import Transformer
from trainwright.parallel.apply import parallelize
from trainwright.parallel.layout import Layout
from trainwright.parallel.split import check_one_pass
from trainwright.train.in_backward import InBackward
from trainwright.train.optimizer import build_optimizer
from trainwright.train.step import LossScale, TrainStep

OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "lion", "muon", "sgd")
LAYOUTS = [
    Layout(world_size=2, zero=0),
    Layout(world_size=2, zero=1),
    Layout(world_size=2, zero=2),
    Layout(world_size=2),
    Layout(world_size=2, cp=2),
    Layout(world_size=4, dp_replicate=2),
]


class Trained:
    """A model and its step, updated in either way."""

    def __init__(self, case, optimizer, in_backward):
        world = world_of(case.layout)
        with torch.device("meta"):
            self.model = Transformer(models.build(case.model, case.layers))
        parallelize(self.model, world, case.recipe, precision="fp32", compile_layers=False, seq_len=case.length)
        self.model.to_empty(device="cpu")
        self.model.tie_weights()
        self.model.reset_buffers(torch.device("cpu"))
        self.model.init_weights(3).train()
        options = {"betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}
        self.optimizers = build_optimizer(self.model, optimizer, **options, by_layer=in_backward)
        self.take = TrainStep(
            self.model,
            self.optimizers,
            world,
            max_grad_norm=0.0,
            loss_scale=LossScale(False),
            in_backward=InBackward(self.optimizers, world) if in_backward else None,
        )

    def weights(self):
        whole = {name: weight.detach() for name, weight in self.model.named_parameters()}
        return {name: getattr(weight, "full_tensor", weight.clone)() for name, weight in whole.items()}


def trained(case, optimizer, in_backward):
    """Three steps: losses, norms, weights, states."""
    it = Trained(case, optimizer, in_backward)
    results = [it.take(micro_batches(case, step, it.take.world.data_rank), 1e-2) for step in range(3)]
    states = {
        name: getattr(state, "full_tensor", state.clone)() for name, state in it.optimizers.state_tensors().items()
    }
    return [(r.loss, r.grad_norm, r.finite) for r in results], it.weights(), states


def both(case, optimizer):
    return trained(case, optimizer, False), trained(case, optimizer, True)


def compare(plain, given):
    for (loss, norm, finite), (loss_given, norm_given, finite_given) in zip(plain[0], given[0], strict=True):
        assert (loss_given, finite_given) == (loss, finite)
        assert norm_given == pytest.approx(norm, rel=1e-6)
    for expected, found in zip(plain[1:], given[1:], strict=True):
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_process(optimizer):
    compare(*both(Case("llama", Layout(), accumulation=1), optimizer))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout} zero {layout.zero}")
def test_layouts(layout):
    for plain, given in run(layout.world_size, both, Case("llama", layout, accumulation=1), "adamw"):
        compare(plain, given)


def test_experts():
    for plain, given in run(2, both, Case("mixtral", Layout(world_size=2, ep=2), accumulation=1), "adamw8bit"):
        compare(plain, given)


def most_gradients(in_backward):
    """Of all weights, the largest share of elements that have a gradient when some layer's have just come."""
    it = Trained(Case("llama", Layout(), accumulation=1, layers=8), "adamw", in_backward)
    weights, found = list(it.model.parameters()), []

    def look(_):
        held = sum(weight.numel() for weight in weights if weight.grad is not None)
        found.append(held / sum(weight.numel() for weight in weights))

    for weight in weights:
        weight.register_post_accumulate_grad_hook(look)
    it.take(micro_batches(Case("llama", Layout(), accumulation=1), 0, 0), 1e-2)
    return max(found)


def test_gradients_do_not_stay():
    assert most_gradients(False) > 0.9
    assert most_gradients(True) < 0.3


def poisoned(case, optimizer):
    """One layer's gradient is not finite on rank 1 alone: what changed, and what the step said."""
    it = Trained(case, optimizer, True)
    rank = it.take.world.rank
    if rank == case.layout.world_size - 1:
        it.model.layers["1"].mlp.down_proj.register_full_backward_pre_hook(lambda _, grads: (grads[0] * float("inf"),))
    before = it.weights()
    result = it.take(micro_batches(case, 0, it.take.world.data_rank), 1e-2)
    after = it.weights()
    return result.finite, {name for name, weight in before.items() if not torch.equal(weight, after[name])}


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("layout", [Layout(), Layout(world_size=2)], ids=str)
def test_a_layer_without_finite_gradients_is_left(layout, optimizer):
    case = Case("llama", layout, accumulation=1)
    answers = run(2, poisoned, case, optimizer) if layout.world_size == 2 else [poisoned(case, optimizer)]
    for finite, changed in answers:
        assert not finite
        assert any(name.startswith("layers.2.") for name in changed)  # above it, gradients are as ever
        assert not any(name.startswith(("layers.0.", "layers.1.")) for name in changed)


def test_a_pass_outside_of_a_step_changes_nothing():
    case = Case("llama", Layout(), accumulation=1)
    it = Trained(case, "adamw", True)
    before = it.weights()
    it.take.probe(micro_batches(case, 0, 0)[0]).backward()
    assert all(torch.equal(before[name], weight) for name, weight in it.weights().items())


def test_several_passes_a_step_are_refused():
    check_one_pass(True, 1)
    with pytest.raises(UserError, match=r"a step has 4: use train\.gradient_accumulation_steps=1"):
        check_one_pass(True, 4)
