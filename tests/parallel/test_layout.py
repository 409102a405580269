"""Degrees, divisibility and the batch arithmetic of the published tables."""

import pytest

from trainwright.adapt.quantize import add_quantization
from trainwright.errors import UserError
from trainwright.model.checkpoint import load_config
from trainwright.parallel.layout import Layout, check_model, kv_heads_of_rank


def test_seed_004s_batch():
    """TP4PP1DP2, accumulation 512, global batch 1024 on 8 GPUs."""
    layout = Layout(world_size=8, tp=4)
    assert str(layout) == "TP4PP1DP2"
    assert layout.accumulation(1, 1024, None) == 512


def test_data_parallel_is_what_is_left():
    layout = Layout(world_size=16, tp=2, pp=2, dp_replicate=2)
    assert (layout.dp_shard, layout.data_ranks) == (2, 4)


def test_a_product_that_does_not_divide_is_refused_with_numbers():
    with pytest.raises(UserError, match=r"tp=3 = 3 processes do not divide the 8"):
        Layout(world_size=8, tp=3)


def test_a_global_batch_that_does_not_divide_names_the_nearest():
    with pytest.raises(UserError, match=r"global_batch_size=10 is not a multiple .* = 8: use 8"):
        Layout(world_size=4).accumulation(2, 10, None)


def test_experts_divide_the_ranks_that_share_a_batch():
    Layout(world_size=8, tp=2, ep=4)
    with pytest.raises(UserError, match=r"parallel.ep=3"):
        Layout(world_size=8, ep=3)


LLAMA_3_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
QWEN2_7B = {**LLAMA_3_8B, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584,
            "intermediate_size": 18944}  # fmt: skip


def check(keys, layout, seq_len=8192, **options):
    check_model(layout, load_config(keys), seq_len, **options)


def test_a_model_that_fits_is_not_refused():
    check(LLAMA_3_8B, Layout(world_size=8, tp=8))
    check({**LLAMA_3_8B, "num_key_value_heads": 2}, Layout(world_size=8, tp=8))  # KV heads are copied
    check({**LLAMA_3_8B, "vocab_size": 128257}, Layout(world_size=8, tp=8))  # the last rank has fewer rows


@pytest.mark.parametrize(
    ("keys", "layout", "options", "says"),
    [
        (QWEN2_7B, Layout(world_size=8, tp=8), {}, r"tp=8 does not divide 28 attention heads: use parallel.tp=4"),
        (
            {**LLAMA_3_8B, "intermediate_size": 11009},
            Layout(world_size=8, tp=2),
            {},
            r"tp=2 does not divide 11009 columns of the MLP \(intermediate_size\): use parallel.tp=1",
        ),
        (
            LLAMA_3_8B,
            Layout(world_size=16, tp=16),
            {"kv_replication": False},
            r"tp=16 does not divide 8 KV heads .* refuses to copy them: use parallel.tp=8, or set it to true",
        ),
        (
            LLAMA_3_8B,
            Layout(world_size=8, tp=4, cp=2),
            {"seq_len": 1001},
            r"=1001 .* cp x tp = 2 x 4 = 8: use 1000",
        ),
        ({**LLAMA_3_8B, "vocab_size": 9}, Layout(world_size=8, tp=8), {}, r"tp=8 is too much for a vocabulary of 9"),
        (LLAMA_3_8B, Layout(world_size=8, ep=2), {}, r"ep=2: this model has no experts"),
    ],
)
def test_refusals_name_the_numbers_and_the_nearest_that_works(keys, layout, options, says):
    with pytest.raises(UserError, match=says):
        check(keys, layout, **options)


def test_blocks_of_four_bits_are_not_cut():
    check_model(Layout(world_size=8, tp=8), add_quantization(load_config(LLAMA_3_8B), "nf4"), 8192)
    llama2 = load_config(LLAMA_3_8B | {"intermediate_size": 11008})
    with pytest.raises(UserError, match=r"tp=8 cuts the 11008 columns of .*down_proj inside blocks of 64.*tp=4"):
        check_model(Layout(world_size=8, tp=8), add_quantization(llama2, "nf4"), 8192)
    check_model(Layout(world_size=8, tp=8), add_quantization(llama2, "int8"), 8192)


@pytest.mark.parametrize(
    ("heads", "kv", "tp", "expected"),
    [
        (32, 2, 4, [[0], [0], [1], [1]]),
        (8, 1, 4, [[0]] * 4),
        (6, 3, 2, [[0, 0, 1], [1, 2, 2]]),
        (12, 4, 6, [[0], [0, 1], [1], [2], [2, 3], [3]]),
    ],
)
def test_kv_heads_follow_their_query_heads(heads, kv, tp, expected):
    assert [kv_heads_of_rank(heads, kv, tp, rank) for rank in range(tp)] == expected
