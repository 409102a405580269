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


def index(folder: Path, **changes: Any) -> None:
    change(folder / "model.safetensors.index.json", **changes)


def outside(folder: Path) -> None:
    """A shard of somebody else's folder, named by this one's index."""
    second_shard(folder).rename(folder.parent / "secret.safetensors")
    told = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    index(folder, weight_map={name: shard.replace("model-00002-of", "../secret-of") for name, shard in told.items()})


def twice(folder: Path) -> None:
    """One tensor in two shards, and no index that says which counts."""
    (folder / "model.safetensors.index.json").unlink()
    shards = sorted(folder.glob("*.safetensors"))
    save_file(load_file(shards[0]) | load_file(shards[1]), shards[1])


def retype(dtype: torch.dtype, name: str = "model.norm.weight") -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        shard = next(file for file in folder.glob("*.safetensors") if name in load_file(file))
        tensors = load_file(shard)
        save_file(tensors | {name: tensors[name].to(dtype)}, shard)

    return spoil


def header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        shard = second_shard(folder)
        data = shard.read_bytes()
        length = int.from_bytes(data[:8], "little")
        text = json.dumps(edit(json.loads(data[8 : 8 + length]))).encode()
        shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return spoil


def with_entry(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The header with one tensor's entry changed."""
    return lambda entries: {
        name: entry | changes if n == 1 else entry for n, (name, entry) in enumerate(sorted(entries.items()))
    }


def damage(value: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        shard = second_shard(folder)
        tensors = load_file(shard)
        next(tensor for name, tensor in sorted(tensors.items()) if "proj" in name)[3, 5] = value
        save_file(tensors, shard)

    return spoil


def untie(folder: Path) -> None:
    """config.json ties a head that the files hold, and that is another one."""
    change(folder / "config.json", tie_word_embeddings=True)


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
    "index reaches outside": (outside, ["index.json", "../secret-of", "no file of its own folder"]),
    "index with an absolute path": (
        lambda f: index(f, weight_map={"lm_head.weight": "/etc/hosts"}),
        ["'/etc/hosts'", "no file of its own folder"],
    ),
    "index of a list": (lambda f: index(f, weight_map=["model-00001.safetensors"]), ["index.json", "no weight_map"]),
    "index of numbers": (lambda f: index(f, weight_map={"lm_head.weight": 3}), ["index.json", "3, which is no file"]),
    "the same tensor twice": (twice, ["is in", "model-00001-of", "model-00002-of", "remove the file"]),
    "8-bit floats": (retype(torch.float8_e4m3fn), ["model.norm.weight", "type F8_E4M3", "F32", "unquantized"]),
    "whole numbers": (retype(torch.int8), ["model.norm.weight", "type I8", "unquantized"]),
    "unknown dtype": (header(with_entry(dtype="F99")), ["model-0000", "type F99"]),
    "dtype of another width": (header(with_entry(dtype="F16")), ["model-00002", "not a whole safetensors file"]),
    "header of a list": (header(lambda entries: list(entries)), ["model-00002", "not safetensors'"]),
    "header without offsets": (header(with_entry(data_offsets=None)), ["model-00002", "not safetensors'"]),
    "NaN": (damage(float("nan")), ["proj.weight", "model-00002", "1 of", "NaN or infinite"]),
    "infinity": (damage(float("-inf")), ["proj.weight", "model-00002", "1 of", "NaN or infinite"]),
    "tied and not": (untie, ["lm_head.weight", "model.embed_tokens.weight", "tie_word_embeddings to false"]),
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


def test_the_index_says_which_of_two_counts(folder: Path) -> None:
    """A shard left over from another save holds an old copy of a tensor."""
    right = load_model(folder).norm.weight.clone()
    shard = next(file for file in sorted(folder.glob("*.safetensors")) if "model.norm.weight" not in load_file(file))
    save_file(load_file(shard) | {"model.norm.weight": torch.zeros(64)}, shard)
    assert torch.equal(load_model(folder).norm.weight, right)


def test_the_largest_tensor_says_the_type(folder: Path) -> None:
    """Published half-precision files begin with float32 buffers; a router or norm may be wider too."""
    for file in folder.glob("*.safetensors"):
        tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        tensors |= {f"model.layers.{file.name[10]}.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        save_file(tensors, file)
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.float16}


def test_finite_weights_that_add_up_to_infinity_are_no_damage(folder: Path) -> None:
    change(folder / "config.json", tie_word_embeddings=False)
    file = next(file for file in folder.glob("*.safetensors") if "model.norm.weight" in load_file(file))
    save_file(load_file(file) | {"model.norm.weight": torch.full((64,), 3e38)}, file)
    assert load_model(folder).norm.weight.max() > 1e38


def test_a_tied_head_may_be_in_the_files_too(folder: Path) -> None:
    shards = {file: load_file(file) for file in folder.glob("*.safetensors")}
    table = next(
        tensors["model.embed_tokens.weight"] for tensors in shards.values() if "model.embed_tokens.weight" in tensors
    )
    for file, tensors in shards.items():
        if "lm_head.weight" in tensors:
            save_file(tensors | {"lm_head.weight": table.clone()}, file)
    untie(folder)
    model = load_model(folder)
    assert model.lm_head.weight is model.embed_tokens.weight


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
    elsewhere = {"model.norm.weight": str(tmp_path / "other.bin")}
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": elsewhere}))
    with pytest.raises(UserError, match="no file of its own folder"):
        import_pickles(tmp_path / "far", tmp_path / "again")
    (bins / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match="is missing"):
        import_pickles(bins, tmp_path / "again")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3}, "holds no tensors"),
        ([torch.ones(2)], "holds list, not weights by name"),
        (b"hello", "or is damaged, and was not read"),
    ],
)
def test_a_pickle_without_weights_is_told_so(tmp_path: Path, content: Any, words: str) -> None:
    (tmp_path / "bins").mkdir()
    file = tmp_path / "bins" / "pytorch_model.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    with pytest.raises(UserError, match=words):
        import_pickles(tmp_path / "bins", tmp_path / "converted")


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
    with pytest.raises(UserError, match=r"more than tensors.*(exec|Unsupported)"):
        import_pickles(bins, tmp_path / "converted")
    assert not trace.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bins", "model"], "nothing is left of what was begun"
    pickle.loads(pickle.dumps(Hostile(trace)))  # the file is hostile indeed
    assert trace.exists()
