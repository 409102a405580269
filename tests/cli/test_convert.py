"""`trainwright convert`: what it writes is a whole model folder, and it writes over nothing."""

import json
import resource
import signal

import pytest
import torch
from safetensors import safe_open

from tests.train.small import small_recipe
from trainwright.cli.convert import export, merge
from trainwright.errors import UserError
from trainwright.model.checkpoint import load_model, save_model
from trainwright.train.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two steps."""
    return train(small_recipe(tmp_path_factory.mktemp("run"), "train.steps=2")).folder


def test_export_changes_the_dtype_and_nothing_else(run, tmp_path):
    export(run, tmp_path / "half", dtype="bfloat16")
    model, written = run / "model", tmp_path / "half"
    assert {file.name for file in written.iterdir()} == {file.name for file in model.iterdir()}
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert json.dumps((written / name).read_text()) == json.dumps((model / name).read_text())
    with safe_open(written / "model.safetensors", "pt") as new, safe_open(model / "model.safetensors", "pt") as old:
        assert {new.get_tensor(name).dtype for name in new.keys()} == {torch.bfloat16}  # noqa: SIM118
        for name in old.keys():  # noqa: SIM118
            assert torch.equal(new.get_tensor(name), old.get_tensor(name).bfloat16())


def test_nothing_is_written_over_and_nothing_half(run, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists: choose another name"):
        export(run, tmp_path / "there")
    save_model(load_model(run / "model"), tmp_path / "weights")  # a model without a tokenizer
    with pytest.raises(UserError):
        export(tmp_path / "weights", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_adapter_is_merged_not_exported(run, tmp_path):
    recipe = small_recipe(
        tmp_path, "train.steps=2", adapter={"rank": 2}, model={"path": str(run / "model"), "config": None}
    )
    adapted = train(recipe).folder
    with pytest.raises(UserError, match=r"holds an adapter: `trainwright convert merge"):
        export(adapted, tmp_path / "new")
    merge(adapted, tmp_path / "new")
    stops = json.loads((tmp_path / "new" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == json.loads((run / "model" / "generation_config.json").read_text())["eos_token_id"]


def test_a_full_disk_is_one_line_and_leaves_nothing(run, tmp_path):
    """A real limit of the system on file size: the write fails half way through."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(UserError, match="the weights could not be written"):
            export(run, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []
