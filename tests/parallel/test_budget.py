"""Memory of compiled layers: a budget by layer, MLPs in tiles; never another number."""

import pytest
import torch

from tests.adapt.test_memory import check, gradients, model
from trainwright.parallel.budget import Budget, apply_budget
from trainwright.parallel.recompute import GIB, apply_recompute
from trainwright.parallel.tiles import apply_tiles


def aot(function):
    return torch.compile(function, backend="aot_eager")


def levels(built):
    return [layer.forward.level for layer in built.layers.values()]


def test_gradients_stay_and_levels_follow_the_budget():
    plain = gradients(model())
    seen, bytes_ = [], 0.0
    for _ in range(3):
        torch._dynamo.reset()
        built = model()
        budget = apply_budget(built.layers.values(), bytes_ / GIB, compile_=aot)
        check(gradients(built, steps=2), plain)
        assert budget.kept["all"] > budget.kept["attention"] > 0
        seen.append(levels(built))
        bytes_ = bytes_ * 100 or 1.5 * budget.kept["attention"]
    assert seen[0] == ["input"] * 3
    assert seen[-1] == ["all"] * 3
    assert all(sorted(order, key=["input", "attention", "all"].index) == order for order in seen)
    assert "attention" in seen[1]


def test_less_is_kept_at_each_level():
    kept = {}
    for level in ("all", "attention", "input"):
        torch._dynamo.reset()
        built = model()
        budget = apply_budget(built.layers.values(), 1.0, compile_=aot)
        budget.levels = [level] * 3
        total = {}

        def note(tensor, total=total):
            total[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            built(torch.arange(64)[None], labels=torch.arange(64)[None])
        kept[level] = sum(total.values())
    assert kept["all"] > kept["attention"] > kept["input"]


def test_attention_is_kept_alike_whichever_matrices_have_adapters():
    """Products with and without adapters are different operations; the MLP's count among neither."""
    kept = []
    for targets in ("all-linear", ["q_proj", "v_proj"], ["o_proj", "down_proj"]):
        torch._dynamo.reset()
        built = model(targets=targets)
        budget = apply_budget(built.layers.values(), 1.0, compile_=aot)
        gradients(built)
        kept.append(budget.kept["attention"])
    inner = 64 * built.config.layers[0].mlp.intermediate_size * 4  # one result inside the MLP, 64 tokens in float32
    assert max(kept) - min(kept) < inner, kept


def test_the_choice_by_hand():
    budget = Budget(100.0, layers=4)
    budget.kept = {"attention": 20, "all": 50}
    assert budget.choose() == ["input", "attention", "attention", "all"]
    budget.bytes = 145.0
    assert budget.choose() == ["input", "attention", "all", "all"]
    budget.bytes = 199.0  # what the first would keep is there until all gradients are
    assert budget.choose() == ["input", "all", "all", "all"]
    budget.bytes = 45.0
    assert budget.choose() == ["input", "input", "attention", "attention"]
    budget.bytes = 1000.0
    assert budget.choose() == ["all"] * 4


@pytest.mark.parametrize(
    ("mode", "compiled", "tokens"), [("none", False, 24), ("full", False, 16), ("full", True, 24), ("none", False, 100)]
)
def test_tiles_change_no_gradient(mode, compiled, tokens):
    torch._dynamo.reset()
    built = model()
    apply_tiles(built.layers.values(), tokens, aot if compiled else None)
    apply_recompute(built.layers.values(), mode)
    check(gradients(built, steps=2), gradients(model()))


def test_tiles_keep_no_wide_tensor():
    built = model()
    apply_tiles(built.layers.values(), 16)
    widest = []

    def note(tensor):
        widest.append(tensor.shape[-1] if tensor.dim() == 3 else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        built(torch.arange(64)[None], labels=torch.arange(64)[None])
    assert max(widest) <= 64
