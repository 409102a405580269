"""Degrees, divisibility and the batch arithmetic of the published tables."""

import pytest

from trainwright.errors import UserError
from trainwright.parallel.layout import Layout


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
