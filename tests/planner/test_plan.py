"""Plans as a whole: clusters, what makes a run fit, the search, and the command line."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from trainwright.cli import app
from trainwright.errors import UserError
from trainwright.model.kernels.cross_entropy import TRAINED_ROWS, chunk_rows
from trainwright.planner.calibration import load_calibration, read_calibration, write_calibration
from trainwright.planner.hardware import GIB, Cluster, card_named, cluster_of
from trainwright.planner.plan import changed, find_changes, largest_micro_batch, plan
from trainwright.planner.program import chunk_tokens, own_program
from trainwright.planner.search import search
from trainwright.recipe.load import load_recipe

BASE = {
    "name": "planned",
    "task": "sft",
    "model": {"config": "meta-llama/Meta-Llama-3-8B", "tokenizer": "byte"},
    "data": {"path": "shipped:arithmetic", "seq_len": 8192},
    "train": {"steps": 1000, "global_batch_size": 64},
}


def recipe(*overrides):
    return load_recipe(BASE, overrides)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(BASE))
    return str(path)


# ---- memory and speed move as they must


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("card", "device"), [("cpu", "cpu"), ("H200", "cuda")])
@pytest.mark.parametrize("vocab", [320, 32000, 128256])
def test_chunks_of_the_loss_are_the_program_s(vocab, card, device, trained):
    program = own_program(recipe(), card_named(card), 1)
    for tokens in (1, 100, 4097, 8192, 65536):
        chunk = chunk_rows(tokens, vocab, device, trained)
        assert chunk == chunk_tokens(program, tokens, vocab, "cpu" if card == "cpu" else "gpu", trained)
        if trained and device == "cuda":  # else the gradient's own bytes show
            assert chunk > TRAINED_ROWS // 2 or chunk == tokens


def test_sharding_and_recomputation_save_memory():
    def peak(gpus, *overrides):
        return plan(recipe(*overrides), cluster_of("H200", gpus)).memory.allocated

    assert peak(8) < peak(4) < peak(2)
    assert peak(4, "parallel.zero=3") < peak(4, "parallel.zero=2") < peak(4, "parallel.zero=1")
    assert peak(4, "parallel.recompute=full") < peak(4, "parallel.recompute=selective") < peak(4)
    assert peak(4, "parallel.tp=2") < peak(4, "parallel.zero=2")
    assert peak(4, "parallel.offload=all") < peak(4, "parallel.offload=optimizer") < peak(4)


def test_longer_rows_and_larger_micro_batches_take_more():
    def peak(*overrides):
        return plan(recipe(*overrides), cluster_of("H200", 8)).memory.allocated

    assert peak("data.seq_len=4096") < peak() < peak("data.seq_len=16384")
    assert peak() < peak("train.micro_batch_size=2") < peak("train.micro_batch_size=4")


def test_recomputation_bubbles_and_slow_links_cost_speed():
    def rate(cluster, *overrides):
        return plan(recipe(*overrides), cluster).speed.tokens_per_second_per_gpu

    eight = cluster_of("H200", 8)
    assert rate(eight, "parallel.recompute=full") < rate(eight, "parallel.recompute=selective") < rate(eight)
    assert rate(eight, "parallel.pp=4") < rate(eight)
    two_nodes = cluster_of("H200", 16)
    slow = cluster_of("H200", 16, node_link=12.5)
    assert rate(slow, "parallel.zero=3") < rate(two_nodes, "parallel.zero=3") <= rate(eight, "parallel.zero=3") * 1.001


def test_kernels_follow_the_mask():
    """Documents that are kept apart and windows leave the fastest kernel, ALiBi takes another one."""

    def share_of_scores(*overrides):
        speed = plan(recipe(*overrides), cluster_of("H200", 8)).speed
        return speed.parts["scores"] / speed.tokens_per_step

    one_stream = share_of_scores("task=pretrain")
    assert one_stream < share_of_scores()  # fine-tuning packs samples that do not see each other
    assert one_stream == share_of_scores("data.document_mask=false")
    assert share_of_scores("data.packing=false") == one_stream


def test_what_is_computed_again_is_counted():
    """Full recomputation repeats the layers' forward pass; a budget that holds half of the layers' attention repeats
    the other half whole and their MLPs; adapters' frozen weights cost 4 FLOPs and not 6."""

    def speed(*words):
        words = ["data.seq_len=4096", "train.micro_batch_size=1", *words]
        return plan(recipe(*words), cluster_of("H200", 1)).speed

    none, full = speed("parallel.recompute=none"), speed("parallel.recompute=full")
    assert (none.repeated, full.repeated) == (0.0, 1.0)
    some = [
        speed("parallel.recompute=selective", f"parallel.recompute_memory={gib}").repeated for gib in (0, 2, 8, 1000)
    ]
    assert some[0] == 1.0
    assert some == sorted(some, reverse=True)
    assert some[-1] == 0.0
    assert speed("parallel.recompute=selective").repeated == 0.0
    assert speed("adapter.rank=8").flops_per_token < 0.72 * none.flops_per_token


def test_eight_bits_compute_faster_where_the_card_can():
    def rate(gpu, *overrides):
        words = ["adapter.rank=16", "data.seq_len=8192", "train.global_batch_size=8", *overrides]
        return plan(recipe(*words), cluster_of(gpu, 1)).speed.tokens_per_second_per_gpu

    assert rate("H200", "quantize=fp8") > 1.1 * rate("H200") > rate("H200", "quantize=nf4")
    assert rate("A100", "quantize=fp8") < rate("A100")


def test_a_card_without_the_type_computes_in_float32_and_the_plan_says_so():
    """A V100 has no bf16 unit: its rate is that of float32, and no MFU passes 1."""

    def made(gpu, precision):
        words = [f"train.precision={precision}", "data.seq_len=4096"]
        return plan(recipe(*words), cluster_of(gpu, 8)).speed

    assert made("V100", "bf16").mfu < 1
    assert made("V100", "fp16").tokens_per_second_per_gpu > 3 * made("V100", "bf16").tokens_per_second_per_gpu
    assert made("V100", "fp16").notes == made("A100", "bf16").notes == []
    assert made("V100", "bf16").notes == [
        "V100 has no unit for bf16: products run at its float32 peak of 15.7 TFLOP/s; set train.precision=fp16 for 125"
    ]


def test_quantized_weights_travel_packed():
    """A gather moves codes and scales, so nf4 takes about a quarter of what bf16 does."""

    def travel(*overrides):
        words = ["adapter.rank=16", "data.seq_len=512", "parallel.zero=3", *overrides]
        slow = plan(recipe(*words), cluster_of("RTX 3090", 8)).speed.parts  # so slow that little hides
        return slow["weights' travel"]

    assert travel("quantize=nf4") < 0.4 * travel()


@pytest.mark.parametrize("words", [["adapter.rank=8", "quantize=nf4"], ["adapter.rank=8"], []])
def test_no_micro_batch_is_faster_than_a_smaller_one(words):
    """Small ones wait for the host, large ones for the card; accumulation is the same."""
    small = ["data.seq_len=512", "train.global_batch_size=null", "train.gradient_accumulation_steps=16", *words]
    steps = [
        plan(recipe(*small, f"train.micro_batch_size={rows}"), cluster_of("H200", 8)).speed.step_seconds
        for rows in (1, 2, 4, 8)
    ]
    assert steps == sorted(steps)


def test_gradients_are_added_up_once_less_than_there_are_micro_batches():
    def added(accumulation, *overrides):
        words = [f"train.gradient_accumulation_steps={accumulation}", "train.global_batch_size=null", *overrides]
        parts = plan(recipe("data.seq_len=4096", *words), cluster_of("H200", 8)).speed.parts
        return parts.get("gradients added up", 0.0)

    assert added(1) == 0.0
    assert added(4) == pytest.approx(3 * added(2))
    # Whole ones, not shards, which come in bf16.
    assert added(4, "parallel.zero=1") == pytest.approx(8 * 10 / 12 * added(4), rel=0.01)


def test_frozen_weights_in_host_memory_travel_too():
    def step(*overrides):
        words = ["adapter.rank=8", "data.seq_len=512", "train.global_batch_size=1", *overrides]
        return plan(recipe(*words), cluster_of("A100", 1)).speed.step_seconds

    up_twice = 2 * 2 * 8.03e9 / 25e9  # bf16, forward and backward, 25 GB/s
    assert step("parallel.offload=optimizer") - step() == pytest.approx(up_twice, rel=0.05)


def test_parts_add_up_and_mfu_follows_from_the_rate():
    made = plan(recipe(), cluster_of("H100", 8))
    speed = made.speed
    assert sum(speed.parts.values()) == pytest.approx(speed.step_seconds)
    per_token = made.job.config.flops_per_token(8192, "palm")
    assert speed.mfu == pytest.approx(speed.tokens_per_second_per_gpu * per_token / 989.4e12)
    for stage in made.memory.stages:
        assert all(size > 0 for size in stage.peak.parts.values())


def test_known_rates_are_near():
    """Public figures of fast systems on cards that the calibration was not measured on: within a quarter."""
    fms = plan(
        load_recipe(
            {
                **BASE,
                "task": "pretrain",
                "model": {"config": "meta-llama/Llama-2-7b", "tokenizer": "byte"},
                "data": {"path": "shipped:arithmetic", "seq_len": 4096},
                "train": {"steps": 10, "micro_batch_size": 2, "gradient_accumulation_steps": 1},
                "parallel": {"dp_replicate": 16},
            }
        ),
        cluster_of("A100", 128),
    )
    assert fms.speed.tokens_per_second_per_gpu == pytest.approx(4550, rel=0.25)


# ---- sizes of clusters


def test_a_405b_on_sixteen_thousand_cards():
    huge = load_recipe(
        {
            **BASE,
            "task": "pretrain",
            "model": {"config": "meta-llama/Llama-3.1-405B", "tokenizer": "byte"},
            "train": {"tokens": 15_000_000_000_000, "global_batch_size": 2048},
            "parallel": {
                "tp": 8,
                "pp": 16,
                "zero": 1,
                "recompute": "full",
                "pp_schedule": "interleaved",
                "pp_stages": 4,
            },
        }
    )
    made = plan(huge, cluster_of("H100", 16384), price=2.0)
    assert made.job.cluster.nodes == 2048
    assert made.job.layout.data_ranks == 128
    assert len(made.memory.stages) == 16
    assert made.fits
    assert 0.2 < made.speed.mfu < 0.6  # Llama 3's own report says 0.38 to 0.43, without recomputation
    assert made.length.money == pytest.approx(2 * made.length.gpu_hours)
    assert made.length.tokens >= 15e12


def test_groups_across_nodes_share_the_nodes_links():
    cluster = Cluster(card_named("H200"), 64, 8, 400.0)
    assert cluster.link(8) == 450
    assert cluster.link(64) == 400
    assert cluster.link(8, stride=8) == 50  # one card of each node, eight such groups
    assert cluster.link(1) == float("inf")


@pytest.mark.parametrize(
    ("text", "name"),
    [("h200", "H200"), ("A100-40", "A100-40"), ("a100", "A100-80"), ("3090", "RTX 3090"), ("bi-v150", "BI-V150")],
)
def test_cards_are_found_by_what_people_write(text, name):
    assert card_named(text).name == name
    assert card_named(text, memory_gib=10).memory_gib == 10


def test_unknown_cards_and_sizes_get_one_line():
    with pytest.raises(UserError, match="H100"):
        card_named("H1OO")
    with pytest.raises(UserError, match="--memory-gib -1"):
        card_named("H100", memory_gib=-1)
    with pytest.raises(UserError, match="--gpus 0"):
        cluster_of("H100", 0)


# ---- what makes it fit


def test_advice_fits_and_says_its_cost():
    made = plan(recipe("train.micro_batch_size=4"), cluster_of("H100", 8))
    assert not made.fits
    assert made.advice
    same = [change for change in made.advice if change.same_result]
    assert same == sorted(same, key=lambda change: -change.speed)
    for change in made.advice:
        words = dict(change.overrides)
        gpus = words.pop("gpus", 8)
        again = plan(changed(made.recipe, words), cluster_of("H100", gpus))
        assert again.fits
        assert again.job.global_batch == made.job.global_batch
        assert again.memory.free / GIB == pytest.approx(change.free_gib, abs=0.01)


def test_advice_is_what_its_words_plan():
    """As they are typed, beside the command's own words. What keeps the result keeps the global batch."""
    words = ["train.global_batch_size=null", "train.micro_batch_size=2", "data.seq_len=4096"]
    made = plan(recipe(*words), cluster_of("RTX 3090", 1))
    assert not made.fits
    found = made.advice
    larger = plan(recipe(*words), cluster_of("A100-40", 8)).advice
    for change, gpu, gpus in [(change, "RTX 3090", 1) for change in found] + [
        (change, "A100-40", 8) for change in larger
    ]:
        typed = [word for word in change.what.split() if "=" in word]
        again = plan(recipe(*words, *typed), cluster_of(gpu, change.overrides.get("gpus", gpus)))
        assert again.fits
        assert again.memory.free / GIB == pytest.approx(change.free_gib, abs=0.01)
        if change.same_result:
            assert again.job.global_batch == 2 * gpus
        now, before = again.speed, plan(recipe(*words), cluster_of(gpu, gpus)).speed
        rates = now.tokens_per_second_per_gpu / before.tokens_per_second_per_gpu
        assert rates == pytest.approx(change.speed, rel=1e-6)


def test_gradients_that_wait_may_be_too_large_where_a_larger_micro_batch_is_not():
    """ZeRO 1 keeps whole gradients while micro batches accumulate: one micro batch of all rows needs less."""
    words = ["parallel.zero=1", "parallel.recompute=full", "data.seq_len=512", "train.global_batch_size=128"]
    cluster = cluster_of("H200", 8, memory_gib=45)
    made = plan(recipe(*words, "train.micro_batch_size=1"), cluster)
    assert not made.fits
    assert "train.micro_batch_size=16 train.global_batch_size=128" in [change.what for change in made.advice]
    assert largest_micro_batch(recipe(*words, "train.micro_batch_size=auto"), cluster) == 16
    ranking = search(recipe(*words), cluster, keep=100)
    same = [item for item in ranking.candidates if str(item.job.layout) == "TP1PP1DP8" and item.job.layout.zero == 1]
    assert same[0].fits


def test_auto_in_a_pipeline_leaves_every_stage_work():
    words = ["parallel.pp=4", "train.micro_batch_size=auto", "data.seq_len=512", "train.global_batch_size=64"]
    made = plan(recipe(*words), cluster_of("H200", 8))
    assert made.job.micro_batch == 8
    assert made.job.accumulation == 4
    # nine micro batches cannot be interleaved over four ranks, three can
    odd = [*words, "parallel.pp_schedule=interleaved", "train.global_batch_size=18"]
    assert plan(recipe(*odd), cluster_of("H200", 8)).job.accumulation != 9
    with pytest.raises(UserError, match="cannot order 9 micro batches"):
        plan(recipe(*odd, "train.micro_batch_size=1"), cluster_of("H200", 8))


def test_a_processor_has_no_other_memory_to_wait_in():
    made = plan(recipe(), replace(cluster_of("cpu", 2), card=replace(card_named("cpu"), memory_gib=40.0)))
    assert not made.fits
    assert made.advice
    assert not any("offload" in change.what for change in made.advice)


def test_gradients_that_do_not_stay_and_layers_that_go_to_the_host_are_advised():
    lean = ("train.optimizer=adamw8bit", "train.master_weights=false", "parallel.recompute=full")
    one_pass = ("train.global_batch_size=null", "train.gradient_accumulation_steps=1")
    found = find_changes(plan(recipe(*lean, *one_pass), cluster_of("A100-40", 1)), limit=20)
    (gradients,) = [change for change in found if "optimizer_in_backward" in change.what]
    assert gradients.what == "train.optimizer_in_backward=true train.max_grad_norm=0.0"
    assert not gradients.same_result
    full = plan(recipe(*one_pass), cluster_of("H100", 2))
    best = max(find_changes(full), key=lambda change: (change.same_result, change.speed))
    assert best.what == "parallel.offload=activations parallel.offload_share=0.5"


def test_no_advice_for_what_fits():
    assert plan(recipe(), cluster_of("H200", 8)).advice == []


def test_the_largest_micro_batch_is_the_largest_that_fits():
    cluster = cluster_of("H200", 8)
    size = largest_micro_batch(recipe("parallel.recompute=full"), cluster)
    assert plan(recipe("parallel.recompute=full", f"train.micro_batch_size={size}"), cluster).fits
    larger = (
        plan(recipe("parallel.recompute=full", f"train.micro_batch_size={2 * size}"), cluster) if size < 8 else None
    )
    assert larger is None or not larger.fits


def test_auto_is_planned():
    made = plan(recipe("train.micro_batch_size=auto"), cluster_of("H200", 8))
    assert made.fits
    assert made.job.micro_batch * made.job.accumulation * 8 == 64


def test_quantized_adapters_fit_a_small_card():
    little = ["adapter.rank=64", "quantize=nf4", "data.seq_len=512", "parallel.recompute=full"]
    made = plan(recipe(*little, "train.global_batch_size=8"), cluster_of("3090", 1, memory_gib=12))
    assert made.fits
    assert {"quantized weights", "adapters"} <= set(made.memory.fullest.peak.parts)


# ---- the search


def test_the_search_ranks_and_explains():
    ranking = search(recipe(), cluster_of("H100", 8), keep=50)
    rates = [candidate.rate for candidate in ranking.candidates]
    assert rates == sorted(rates, reverse=True)
    assert ranking.best is ranking.candidates[0]
    assert ranking.best.why == ""
    assert all(candidate.why for candidate in ranking.candidates[1:])
    losers = [candidate for candidate in ranking.candidates if not candidate.fits]
    assert all("GiB too much in" in candidate.why for candidate in losers)
    assert all(candidate.job.global_batch == 64 for candidate in ranking.candidates)


def test_the_search_finds_a_way_for_a_large_model():
    large = recipe("model.config=meta-llama/Meta-Llama-3-70B")
    assert not plan(large, cluster_of("H100", 16)).fits
    best = search(large, cluster_of("H100", 16)).best
    assert best is not None
    assert best.as_plan().fits


def test_the_search_chooses_bits_for_adapters():
    ranking = search(recipe("adapter.rank=16", "data.seq_len=2048"), cluster_of("RTX 4090", 1), keep=50)
    assert {candidate.recipe.quantize for candidate in ranking.candidates} == {None, "nf4", "int8", "fp8"}


def test_a_batch_that_nothing_divides():
    with pytest.raises(UserError, match=r"change train\.global_batch_size or --gpus"):
        search(recipe("train.global_batch_size=5"), cluster_of("H100", 7))


# ---- calibration


def test_own_measurements_come_first(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINWRIGHT_CALIBRATION", str(tmp_path))
    shipped = load_calibration(card_named("H200"))
    assert shipped.measured
    path = write_calibration(replace(shipped, source="this machine", matmul={"bf16": 0.5}))
    assert read_calibration(path).matmul == {"bf16": 0.5}
    assert load_calibration(card_named("H200")).source == "this machine"


def test_unmeasured_cards_say_whose_efficiencies_they_borrow():
    found = load_calibration(card_named("MI300X"))
    assert found.source.startswith("borrowed from H100")
    assert not found.measured


def test_a_broken_calibration_is_named(tmp_path):
    path = tmp_path / "h200.yaml"
    path.write_text("card: H200\nspeed: 3\n")
    with pytest.raises(UserError, match=r"h200.yaml: a calibration has the keys"):
        read_calibration(path)


# ---- the command line


def test_the_verb_prints_the_whole_plan(file):
    result = CliRunner().invoke(app, ["plan", file, "--gpu", "H200", "--gpus", "8", "--price", "3"])
    assert result.exit_code == 0
    for word in ("8,030,261,248 parameters", "tokens/s/GPU", "allocated", "fits", "GPU hours", "efficiencies"):
        assert word in result.stdout


def test_json_and_exit_status(file):
    result = CliRunner().invoke(app, ["plan", file, "--gpu", "3090", "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["fits"]
    assert found["memory"]["needed_gib"] > found["memory"]["capacity_gib"]
    assert sum(found["memory"]["parts_gib"].values()) == pytest.approx(found["memory"]["peak_memory_gib"])


@pytest.mark.parametrize("price", ["-1", "nan", "inf"])
def test_a_price_is_a_number(price, file):
    assert CliRunner().invoke(app, ["plan", file, "--gpu", "H200", "--price", price, "--json"]).exit_code == 2


def test_the_best_layout_is_written_as_a_recipe(file, tmp_path):
    target = tmp_path / "best.yaml"
    words = ["plan", file, "--gpu", "H100", "--gpus", "8", "--search", "--write", str(target)]
    assert CliRunner().invoke(app, words).exit_code == 0
    best = load_recipe(str(target))
    assert plan(best, cluster_of("H100", 8)).fits
    refused = CliRunner().invoke(app, words)
    assert "exists" in str(refused.exception)


HUGE = ["model.config=meta-llama/Llama-3.1-405B", "parallel.tp=8", "parallel.pp=16", "parallel.zero=1"]
HUGE += ["parallel.recompute=full", "train.micro_batch_size=1", "train.global_batch_size=2048"]
WITHOUT_TORCH = """
import json, sys, time
sys.modules["torch"] = None  # whoever imports it fails
from trainwright.cli import app
try:
    app(json.loads(sys.argv[1]), standalone_mode=False)
except SystemExit as end:
    assert not end.code, end.code
print(time.process_time(), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        (["--gpu", "H200", "--gpus", "64"], 2),
        ([*HUGE, "--gpu", "H100", "--gpus", "16384"], 2),
        ([*HUGE, "--gpu", "H100", "--gpus", "16384", "--search"], 10),
    ],
    ids=["8B on 64", "405B on 16384", "search of 16384"],
)
def test_it_answers_at_once_without_torch(words, seconds, file):
    """Processor time, since the machine may have other work."""
    command = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(["plan", file, *words, "--json"])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.get("fits") or found["candidates"][0]["fits"]
    assert float(done.stderr.strip().splitlines()[-1]) < seconds
