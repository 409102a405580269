"""What a wrong model folder is told, in one line that names file, value and fix; and what pickles may not do."""

from __future__ import annotations

import json
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden import golden_dir
from trainwright.errors import UserError
from trainwright.model.checkpoint import load_model, save_model
from trainwright.model.pickles import import_pickles


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded Llama."""
    save_model(load_model(golden_dir("llama")), tmp_path / "model", shard_gib=100_000 / 2**30)
    return tmp_path / "model"


def change(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def second_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def cut(folder: Path) -> None:
    shard = second_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    second_shard(folder).write_bytes(b"\x00")


def add_tokenizer(folder: Path) -> None:
    tokenizer = {"model": {"vocab": {"a": 0, "b": 159}}, "added_tokens": [{"id": 160, "content": "<x>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def leave_one_out(folder: Path) -> None:
    shard = second_shard(folder)
    tensors = load_file(shard)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, shard)


def add_one(folder: Path) -> None:
    shard = second_shard(folder)
    save_file(load_file(shard) | {"model.layers.0.surprise.weight": torch.zeros(1)}, shard)


def only_pickles(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK")


WRONG: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing shard": (lambda f: second_shard(f).unlink(), ["model-00002-of", "index.json", "download or copy"]),
    "truncated": (cut, ["model-00002-of", "cut off", "bytes of"]),
    "no header": (cut_header, ["model-00002-of", "not a whole safetensors file"]),
    "shape": (
        lambda f: change(f / "config.json", intermediate_size=180),
        ["mlp.gate_proj.weight", "model-0000", "[176, 64]", "[180, 64]"],
    ),
    "model_type": (
        lambda f: change(f / "config.json", model_type="lama"),
        ["'lama'", "nearest is llama", "model.family"],
    ),
    "no model_type": (lambda f: change(f / "config.json", model_type=None), ["no model_type", "model.family"]),
    "tokenizer": (add_tokenizer, ["tokenizer.json", "160", "vocab_size is 160"]),
    "missing tensor": (leave_one_out, ["is in no safetensors file of", "a shard is missing"]),
    "surplus tensor": (add_one, ["model.layers.0.surprise.weight", "no place in the family llama"]),
    "pickles": (only_pickles, ["pytorch_model.bin", "pickle", "trainwright convert import"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "is not there"]),
    "bad config": (lambda f: (f / "config.json").write_text("{"), ["config.json", "is not JSON"]),
    "no weights": (lambda f: [x.unlink() for x in f.glob("*.safetensors*")], ["holds no safetensors"]),
    "missing key": (lambda f: change(f / "config.json", hidden_size=None), ["hidden_size", "llama"]),
    "wrong type": (lambda f: change(f / "config.json", hidden_size="64"), ["cannot be read", "llama"]),
    "activation": (lambda f: change(f / "config.json", hidden_act="mish"), ["'mish'", "silu"]),
    "scaling": (lambda f: change(f / "config.json", rope_scaling={"type": "su"}), ["'su'", "yarn"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_folder_gets_one_line(folder: Path, name: str) -> None:
    spoil, words = WRONG[name]
    spoil(folder)
    with pytest.raises(UserError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_model(tmp_path / "nowhere")


def test_an_unknown_family_names_the_nearest(folder: Path) -> None:
    with pytest.raises(UserError, match="did you mean llama"):
        load_model(folder, family="lama")


def test_the_wrong_family_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"W_pack\.weight is in no safetensors file"):
        load_model(folder, family="baichuan_7b")


def test_a_save_over_a_save_leaves_no_old_shard(folder: Path) -> None:
    model = load_model(folder)
    save_model(model, folder)
    assert [file.name for file in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert not list(folder.parent.glob(".*partial"))
    load_model(folder)


def test_a_save_in_bf16_says_so(folder: Path, tmp_path: Path) -> None:
    save_model(load_model(folder), tmp_path / "half", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_model(tmp_path / "half").lm_head.weight.dtype == torch.bfloat16


def test_transformers_loads_what_is_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = load_model(golden_dir("qwen2"))
    save_model(model, tmp_path / "saved", shard_gib=100_000 / 2**30)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4


class Hostile:
    """Unpickled by an ordinary reader, this writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (exec, (f"open({str(self.file)!r}, 'w').write('run')",))


def pickles(folder: Path, target: Path) -> Path:
    """The same model as two torch pickles and their index."""
    target.mkdir()
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:10], names[10:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(OrderedDict((name, tensors[name]) for name in part), target / file)
        weight_map |= dict.fromkeys(part, file)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(folder / "config.json", target)
    return target


def test_pickles_are_converted(folder: Path, tmp_path: Path) -> None:
    bins = pickles(folder, tmp_path / "bins")
    converted = import_pickles(bins, tmp_path / "converted")
    one, two = load_model(folder), load_model(converted)
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(UserError, match="exists"):
        import_pickles(bins, converted)
    (bins / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match="is missing"):
        import_pickles(bins, tmp_path / "again")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("way", ["torch file", "bare pickle"])
def test_a_hostile_pickle_runs_nothing(folder: Path, tmp_path: Path, way: str) -> None:
    trace = tmp_path / "trace"
    bins = pickles(folder, tmp_path / "bins")
    content = {"model.norm.weight": torch.ones(3), "evil": Hostile(trace)}
    for file in bins.glob("*.bin"):
        if way == "torch file":
            torch.save(content, file)
        else:
            file.write_bytes(pickle.dumps(Hostile(trace)))
    with pytest.raises(UserError, match="more than tensors"):
        import_pickles(bins, tmp_path / "converted")
    assert not trace.exists()
    assert not (tmp_path / "converted").exists()
    pickle.loads(pickle.dumps(Hostile(trace)))  # the file is hostile indeed
    assert trace.exists()
