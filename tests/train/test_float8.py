"""Training with 8-bit products: the losses of the plain run, and what it refuses."""

import statistics

import pytest

from tests.train.small import small_recipe
from trainwright.errors import UserError
from trainwright.model.linear import Linear
from trainwright.train.metrics import read_lines
from trainwright.train.trainer import Trainer, train


def losses(folder, *words: str) -> list[float]:
    result = train(small_recipe(folder, "train.steps=12", *words))
    return [line["loss"] for line in read_lines(result.folder / "metrics.jsonl")]


def test_the_losses_are_those_of_the_plain_run_within_one_percent(tmp_path):
    plain = losses(tmp_path / "plain")
    for scaling in ("tensorwise", "rowwise"):
        found = losses(tmp_path / scaling, f"train.float8={scaling}")
        assert found != plain
        assert abs(statistics.mean(found) / statistics.mean(plain) - 1) < 0.01
        assert found[-1] < 0.9 * found[0]


def test_layers_are_8_bit_and_the_head_is_not(tmp_path):
    trainer = Trainer(small_recipe(tmp_path, "train.float8=rowwise", "train.steps=1"))
    trainer.close()
    inside = [module for module in trainer.model.layers.modules() if isinstance(module, Linear)]
    assert inside
    assert all(module.float8 == "rowwise" for module in inside)


@pytest.mark.parametrize(
    ("words", "said"),
    [(("adapter.rank=4",), "trains whole weights"), (("train.precision=fp16",), "set train.precision=bf16")],
)
def test_refusals(tmp_path, words, said):
    with pytest.raises(UserError, match=said):
        Trainer(small_recipe(tmp_path, "train.float8=tensorwise", "train.steps=1", *words))
