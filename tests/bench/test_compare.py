"""The arithmetic of comparisons, against figures computed by hand from the published tables."""

from __future__ import annotations

import json

import pytest

from trainwright.bench.compare import (
    against,
    document,
    flagperf_flops,
    of_earlier,
    of_published,
    published_row,
    read_earlier,
    tokens_per_second_per_gpu,
    xtuner_flops,
)
from trainwright.errors import UserError
from trainwright.planner.build import model_config


def test_what_seed_000_counts():
    row = published_row("000", "8k on 8 GPUs")
    config = model_config(row.recipe)
    # 4 x 32 x (29 x 4096^2 + 2 x 8192 x 4096) + 6 x 4096 x 128256
    assert xtuner_flops(config, 8192) == 4 * 32 * (29 * 4096**2 + 2 * 8192 * 4096) + 6 * 4096 * 128256
    assert xtuner_flops(config, 8192) == pytest.approx(74.02e9, rel=1e-4)
    theirs = of_published(row)
    assert theirs.own_tflops == pytest.approx(205.1, abs=0.05)
    # Ours of the same speed: 6 N + 12 L h s, N = 8,030,261,248; recomputation is not model work.
    palm = 6 * 8_030_261_248 + 12 * 32 * 4096 * 8192
    assert theirs.tflops == pytest.approx(2771.2 * palm / 1e12, rel=1e-9)
    assert theirs.mfu == pytest.approx(2771.2 * palm / 312e12, rel=1e-9)
    assert (theirs.device, theirs.gpus, theirs.peak_tflops) == ("A100-80", 8, 312)


@pytest.mark.parametrize("row", document("000").rows, ids=lambda row: row.name)
def test_every_tflops_of_seed_000_is_met_again(row):
    assert of_published(row).own_tflops == pytest.approx(row.figures["tflops"], rel=2e-3)


@pytest.mark.parametrize(("row", "mfu"), [("TP4PP1DP2", 0.386), ("TP4PP1DP2, GAS 512", 0.391)])
def test_what_seed_004_counts(row, mfu):
    found = published_row("004", row)
    assert flagperf_flops(model_config(found.recipe), 4096) == 6 * 7e9
    assert of_published(found).own_tflops / 312 == pytest.approx(mfu, abs=5e-4)


def test_a_sample_is_a_row_of_tokens():
    assert tokens_per_second_per_gpu({"tokens_per_second_per_gpu": 7}, 512, 8) == 7
    assert tokens_per_second_per_gpu({"samples_per_second": 1.53}, 8192, 16) == pytest.approx(1.53 * 8192 / 16)
    assert tokens_per_second_per_gpu({"seconds_per_sample": 0.4215}, 512, 1) == pytest.approx(512 / 0.4215)
    assert tokens_per_second_per_gpu({"oom": True}, 512, 1) is None


def test_frozen_weights_need_no_weight_gradient():
    row = published_row("002", "fp16 4 x 512")
    theirs = of_published(row)
    # Rank 8 on queries and values of 32 layers of width 4096; 4 of the frozen weights, 6 of the adapters, 12 L h s.
    adapters = 32 * 2 * 8 * (4096 + 4096)
    flops = 4 * 6_738_415_616 + 6 * adapters + 12 * 32 * 4096 * 512
    assert theirs.tflops == pytest.approx(512 / 0.4215 * flops / 1e12, rel=1e-9)
    assert theirs.peak_memory_gib == pytest.approx(15.81 * 1000 / 1024)
    assert theirs.own_tflops is None


def test_ratios():
    row = published_row("000", "8k on 8 GPUs")
    config, theirs = model_config(row.recipe), of_published(row)
    ours = {"tokens_per_second_per_gpu": 2 * 2771.2, "mfu": 0.6, "peak_memory_gib": 40.0, "seq_len": 8192}
    found = against(ours, theirs, config)
    assert found["speed_ratio"] == pytest.approx(2)
    assert found["mfu_ratio"] == pytest.approx(0.6 / theirs.mfu)
    assert found["ours_own_tflops"] == pytest.approx(2 * 205.1, rel=1e-3)
    assert found["memory_ratio"] is None  # theirs is not given
    nothing = against({"seq_len": 8192}, theirs, config)
    assert (nothing["speed_ratio"], nothing["mfu_ratio"], nothing["ours_own_tflops"]) == (None, None, None)


def test_earlier_results_stand_beside(tmp_path):
    row = {
        "name": "a", "status": "ok", "gpus": 2, "device": "H200", "peak_tflops": 989.4, "mfu": 0.4, "seq_len": 512,
        "tokens_per_second_per_gpu": 1000.0, "peak_memory_gib": 10.0, "trainwright": "0.1",
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps({"rows": [row]}))
    theirs = read_earlier(tmp_path)["a"]
    assert theirs == of_earlier(row, str(tmp_path))
    found = against({**row, "tokens_per_second_per_gpu": 1500.0, "mfu": 0.5}, theirs, None)
    assert (found["speed_ratio"], found["mfu_ratio"], found["memory_ratio"]) == (1.5, 1.25, 1.0)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="neither a published document"):
        read_earlier(tmp_path / "other.json")


def test_names_that_are_not_there():
    with pytest.raises(UserError, match="no published document 009: there are 000_xtuner"):
        document("009")
    with pytest.raises(UserError, match="no row '8k on 3 GPUs': did you mean '8k on"):
        published_row("000", "8k on 3 GPUs")
