"""The loss's denominator, clipping, the loss scale, and the refusal of NaN: in every optimizer."""

import pytest
import torch

from tests.train.tiny import TinyModel, rows, split
from trainwright.parallel.layout import Layout
from trainwright.parallel.mesh import World
from trainwright.train.optimizer import build_optimizer
from trainwright.train.step import LossScale, TrainStep

WORLD = World(0, Layout(), torch.device("cpu"))
OPTIONS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
UNEVEN = [6, 1, 0, 3, 2, 6]


def make(model, name="adamw", max_grad_norm=0.0, scale=None, step=TrainStep, **options):
    optimizers = build_optimizer(model, name, **{**OPTIONS, **options})
    return step(
        model,
        optimizers,
        WORLD,
        max_grad_norm=max_grad_norm,
        loss_scale=scale or LossScale(False),
    )


def gradients(step, batches):
    """The gradients that a step would use."""
    found = {}
    original = step.optimizers.step

    def look(coefficient, bad):
        found.update({n: p.grad.clone() for n, p in step.model.named_parameters()})
        original(coefficient, bad)

    step.optimizers.step = look
    result = step(batches, 1e-3)
    return found, result


def check_accumulation(kind):
    """Accumulating micro batches with uneven counts of supervised tokens is the same as one large batch."""
    batch = rows(6, supervised=UNEVEN)
    whole, one = gradients(make(TinyModel(), step=kind), [batch])
    for size in (1, 2, 3):
        parts, many = gradients(make(TinyModel(), step=kind), split(batch, size))
        assert many.loss == pytest.approx(one.loss, rel=1e-6)
        assert many.supervised_tokens == sum(UNEVEN)
        for name, grad in whole.items():
            torch.testing.assert_close(parts[name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_accumulation_equals_one_large_batch():
    check_accumulation(TrainStep)


def test_the_accumulation_test_catches_a_mean_of_means():
    """Mutant: every micro batch divided by its own count, then averaged."""

    class MeanOfMeans(TrainStep):
        def __call__(self, batches, rate, stop_asked=False):
            self.micro_batches = len(batches)
            return super().__call__(batches, rate, stop_asked)

        def share(self, output, count):
            return output.loss_sum / output.num_tokens.clamp(min=1) / self.micro_batches

    with pytest.raises(AssertionError):
        check_accumulation(MeanOfMeans)


def test_the_loss_is_the_mean_over_supervised_tokens():
    batch = rows(6, supervised=UNEVEN)
    model = TinyModel()
    out = model(batch.input_ids, labels=batch.labels)
    expected = out.loss_sum.item() / sum(UNEVEN)
    assert make(model)(split(batch, 2), 1e-3).loss == pytest.approx(expected, rel=1e-6)


def test_a_batch_without_supervised_tokens_changes_nothing_but_decay():
    model = TinyModel()
    result = make(model, weight_decay=0.0)([rows(2, supervised=[0, 0])], 1e-3)
    assert (result.loss, result.supervised_tokens, result.finite) == (0.0, 0, True)
    for before, after in zip(TinyModel().parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(before, after)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "muon"])
def test_clipping_uses_the_global_norm(name):
    """A step with clipping equals a step on gradients that were clipped by torch's own function."""
    batch = rows(4)
    model, twin = TinyModel(), TinyModel()
    result = make(model, name, max_grad_norm=0.01)([batch], 0.1)
    out = twin(batch.input_ids, labels=batch.labels)
    (out.loss_sum / out.num_tokens).backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    optimizers = build_optimizer(twin, name, **OPTIONS, fused=False)
    optimizers.set_learning_rate(0.1)
    optimizers.step(torch.ones(()), torch.zeros(()))
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-6)
    for (key, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "muon"])
def test_a_nonfinite_gradient_updates_nothing(name):
    model = TinyModel(poison=3)
    step = make(model, name, max_grad_norm=1.0)
    good, bad = rows(2, vocab=3), rows(2, vocab=3)
    bad.input_ids[1, 2] = 3
    assert step([good], 0.1).finite
    before = {n: p.clone() for n, p in model.named_parameters()}
    states = {n: t.clone() for n, t in step.optimizers.state_tensors().items()}
    result = step([good, bad], 0.1)
    assert not result.finite
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]), n
        assert p.grad is None
    for n, t in step.optimizers.state_tensors().items():
        assert torch.equal(t, states[n]), n
    assert step([good], 0.1).finite


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_loss_scale_changes_no_update(name):
    batch = rows(4, supervised=[6, 2, 1, 5])
    plain, scaled = TinyModel(), TinyModel()
    a = make(plain, name, max_grad_norm=0.5)([batch], 0.1)
    b = make(scaled, name, max_grad_norm=0.5, scale=LossScale(True))([batch], 0.1)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-6)
    assert a.loss == pytest.approx(b.loss, rel=1e-6)
    for ours, theirs in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_loss_scale_halves_and_doubles():
    scale = LossScale(True, value=8.0, patience=3)
    scale.update(False)
    assert scale.value == 4.0
    for _ in range(3):
        scale.update(True)
    assert scale.value == 8.0
    again = LossScale(True)
    again.restore(scale.state())
    assert again.state() == scale.state()
    assert LossScale(False).value == 1.0


def test_decay_on_matrices_only():
    model = TinyModel()
    decays = {
        step.names[tensor]: group["weight_decay"]
        for step in [build_optimizer(model, "adamw", **OPTIONS)]
        for group in step.parts[0].param_groups
        for tensor in group["params"]
    }
    assert {name for name, decay in decays.items() if decay} == {
        "embed_tokens.weight", "layers.0.0.weight", "lm_head.weight",
    }  # fmt: skip
    assert len(decays) == 6


def test_muon_takes_the_matrices_of_the_layers():
    optimizers = build_optimizer(TinyModel(), "muon", **OPTIONS)
    muon = [optimizers.names[t] for g in optimizers.parts[0].param_groups for t in g["params"]]
    assert muon == ["layers.0.0.weight"]
    assert len(optimizers.parameters) == 6


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "muon"])
def test_states_can_be_made_without_a_change(name):
    model = TinyModel()
    optimizers = build_optimizer(model, name, **OPTIONS)
    optimizers.create_states()
    for before, after in zip(TinyModel().parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after)
    step = make(TinyModel(), name)
    step([rows(2)], 1e-3)
    assert set(step.optimizers.state_tensors()) == set(optimizers.state_tensors())
