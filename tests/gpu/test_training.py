"""The loop on a GPU: killed and resumed bit for bit, one wait a step, bf16 beside float32."""

import warnings
from itertools import islice

import pytest
import torch

from tests.train.small import small_recipe
from trainwright.device import fetch
from trainwright.train.metrics import read_lines
from trainwright.train.trainer import Trainer, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_deterministic_runs_resume_bit_for_bit(tmp_path, precision):
    fixed = ["train.deterministic=true", "train.compile=false", "train.schedule=constant"]
    options = [f"train.precision={precision}", *fixed]
    train(small_recipe(tmp_path, "name=halves", "train.steps=6", *options))
    results = [
        train(small_recipe(tmp_path, "name=whole", "train.steps=12", *options)),
        train(small_recipe(tmp_path, "name=halves", "train.steps=12", *options), resume=True),
    ]
    whole, halves = [(result.folder / "model" / "model.safetensors").read_bytes() for result in results]
    assert whole == halves
    whole, halves = [[line["loss"] for line in read_lines(r.folder / "metrics.jsonl")] for r in results]
    assert whole == halves


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_waits_for_its_report_alone(tmp_path, packing):
    trainer = Trainer(small_recipe(tmp_path, "train.precision=bf16", f"data.packing={str(packing).lower()}"))
    trainer.clock = 0.0
    steps = [list(islice(trainer.loader, trainer.loader.accumulation)) for _ in range(5)]
    for batches in steps[:3]:
        trainer._one_step(batches, False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for batches in steps[3:]:
            trainer._one_step(batches, False)
        torch.cuda.set_sync_debug_mode("default")
    trainer.close()
    waits = [f"{w.filename}:{w.lineno}" for w in seen if "called a synchronizing" in str(w.message)]
    assert not waits  # the report's own event is not among what torch reports


def test_bf16_with_float32_masters_follows_float32(tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        result = train(small_recipe(tmp_path, f"name={precision}", f"train.precision={precision}", "train.steps=40"))
        losses[precision] = [line["loss"] for line in read_lines(result.folder / "metrics.jsonl")]
    assert losses["bf16"][:10] == pytest.approx(losses["fp32"][:10], rel=0.02)
    assert losses["bf16"][-1] == pytest.approx(losses["fp32"][-1], rel=0.1)


def test_the_host_has_a_step_before_the_device_has_updated():
    """What is fetched is what the tensor was; the host goes on while the device does what was queued since."""
    tensor, work = torch.ones(3, device="cuda", dtype=torch.float64), torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    numbers, done = fetch(tensor), torch.cuda.Event()
    tensor.zero_()
    for _ in range(20):
        work = work @ work
    done.record()
    assert numbers() == [1.0, 1.0, 1.0]
    assert not done.query()
