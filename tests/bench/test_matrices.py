"""The shipped matrices and recipes: every published row can be run, is what was published, and is planned to fit."""

from functools import cache

import pytest

from trainwright.bench.cell import Cell, cells_of
from trainwright.bench.matrix import MATRICES, matrix_names, read_matrix
from trainwright.bench.published import Published, load_published
from trainwright.planner.build import model_config
from trainwright.planner.hardware import Cluster, card_named
from trainwright.planner.plan import plan
from trainwright.recipe.load import library_names
from trainwright.recipe.schema import Recipe

PUBLISHED = {document.seed: document for document in load_published()}
SEEDS = [name for name in matrix_names() if name[:3] in PUBLISHED]  # others have tests of their own
SCALED = [name for name in SEEDS if "_h200_" in name]
AS_PUBLISHED = [name for name in SEEDS if name not in SCALED]


@cache
def cells(name: str) -> list[Cell]:
    return cells_of(read_matrix(MATRICES / f"{name}.yaml"))


def document_of(name: str) -> Published:
    return PUBLISHED[name[:3]]


def shape(recipe: Recipe) -> tuple[object, ...]:
    """What of a model decides memory and speed: its family, every size, the adapters' ranks and places."""
    config = model_config(recipe)
    adapter = (recipe.adapter.rank, recipe.adapter.targets) if recipe.adapter else None
    return config.family, config.num_layers, config.vocab_size, config.num_parameters(), adapter


def test_each_published_table_has_a_matrix_and_its_scaled_ones():
    assert [name[:3] for name in AS_PUBLISHED] == sorted(PUBLISHED)
    for seed in ("000", "001", "003", "004"):
        assert {name.rpartition("_")[2] for name in SCALED if name.startswith(seed)} == {"1", "2", "4"}


@pytest.mark.parametrize("name", SEEDS)
def test_every_row_is_planned_and_fits_or_says_that_it_does_not(name):
    gpu = "H200" if name in SCALED else document_of(name).gpu
    for cell in cells(name):
        card = card_named(gpu, cell.setting.memory_gib)
        made = plan(cell.recipe, Cluster(card, cell.gpus, gpus_per_node=max(8, cell.gpus)))
        assert made.speed.tokens_per_second_per_gpu > 0
        assert made.fits != ("does not fit" in cell.setting.note), f"{cell.name}: {made.memory.needed / 2**30:.1f} GiB"


@pytest.mark.parametrize("name", SEEDS)
def test_a_row_names_a_shipped_recipe_and_a_published_row(name):
    rows = {row.name: row for row in document_of(name).rows}
    for cell in cells(name):
        assert cell.setting.recipe in library_names()
        assert cell.setting.made
        if name in SCALED:
            assert cell.gpus <= int(name.rpartition("_")[2])
        if cell.setting.published is not None:
            row = rows[cell.setting.published]
            assert cell.recipe.data.seq_len == row.recipe.data.seq_len
            scaled = cell.gpus != row.gpus
            assert not scaled or cell.setting.note, (
                f"{cell.name} runs on {cell.gpus} GPUs instead of {row.gpus}: say so"
            )


@pytest.mark.parametrize("name", AS_PUBLISHED)
def test_each_published_row_is_a_row_of_the_matrix_with_what_it_ran(name):
    """Model, method, batch, length, degrees and ZeRO stage; what is computed twice is each system's own affair."""
    by_row = {cell.setting.published: cell for cell in reversed(cells(name)) if cell.setting.published is not None}
    for row in document_of(name).rows:
        cell = by_row[row.name]
        ours, theirs = cell.recipe, row.recipe
        assert cell.gpus == row.gpus
        assert shape(ours) == shape(theirs), row.name
        assert (ours.task, ours.quantize, ours.data.seq_len) == (theirs.task, theirs.quantize, theirs.data.seq_len)
        assert ours.train.precision == theirs.train.precision
        assert ours.train.micro_batch_size == theirs.train.micro_batch_size
        accumulated = ours.train.gradient_accumulation_steps or 1
        assert accumulated == theirs.train.gradient_accumulation_steps
        for degree in ("zero", "tp", "pp", "cp", "dp_replicate"):
            assert getattr(ours.parallel, degree) == getattr(theirs.parallel, degree), f"{row.name}: {degree}"


def test_every_shipped_recipe_of_a_published_model_is_in_a_matrix():
    used = {cell.setting.recipe for name in SEEDS for cell in cells(name)}
    assert set(library_names()) - used == {"quickstart", "smollm2_135m/sft", "llama2_7b/qlora_2048"}


def test_the_alignment_runs_see_the_same_rows():
    """Same weights, rows, batch and steps: losses may be compared step by step."""
    pairs = 0
    for name in SEEDS:
        by_name = {cell.name: cell for cell in cells(name)}
        for cell in cells(name):
            if cell.setting.align_with is None:
                continue
            other = by_name[cell.setting.align_with]
            pairs += 1
            ours, theirs = cell.recipe, other.recipe
            assert (ours.data, ours.model, cell.steps) == (theirs.data, theirs.model, 100)
            batches = [
                one.recipe.train.micro_batch_size * one.recipe.train.gradient_accumulation_steps * one.layout.data_ranks
                for one in (cell, other)
            ]
            assert batches[0] == batches[1]
    assert pairs == 3
