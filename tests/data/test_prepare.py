"""From files to rows: the cache, going on after an interruption, bad rows, refusals. With the byte tokenizer."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainwright.data import arrange, pool, tokenized
from trainwright.data.command import prepare_command, recipe_tokenizer
from trainwright.data.prepare import Prepared, prepare
from trainwright.data.rows import RowSet
from trainwright.data.tokenizer import Tokenizer, load_tokenizer
from trainwright.errors import UserError
from trainwright.recipe.schema import Recipe

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("byte")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe whose `data` has these keys, with a cache of its own."""

    def recipe(task: str = "sft", **data: Any) -> Recipe:
        data = {"seq_len": 64, "cache": str(tmp_path / "cache"), "workers": 0, **data}
        return Recipe.model_validate(
            {"task": task, "model": {"config": "any", "tokenizer": "byte"}, "train": {"steps": 1}, "data": data}
        )

    return recipe


def write_rows(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(rows: RowSet, tokenizer: Tokenizer) -> list[str]:
    """The documents of all rows, decoded, sorted."""
    found = []
    for number, source in enumerate(rows.sources):
        arrays = rows.read(np.full(len(source), number), np.arange(len(source)))
        documents = arrays.document_ids
        assert documents is not None
        for ids, document in zip(arrays.input_ids, documents, strict=True):
            found += [tokenizer.decode(ids[document == each].tolist()) for each in range(document.max() + 1)]
    return sorted(found)


def trained_text(rows: RowSet, tokenizer: Tokenizer) -> str:
    arrays = rows.read(np.zeros(len(rows), np.int64), np.arange(len(rows)))
    return tokenizer.decode(arrays.labels[arrays.labels >= 0].tolist(), skip_special=False)


# ---- what comes out ----


def test_only_answers_and_their_end_are_trained(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [CHAT])
    assert trained_text(prepare(make(path=path), tokenizer).train, tokenizer) == "Hello<|eos|>"
    assert trained_text(prepare(make(path=path, loss_on="all"), tokenizer).train, tokenizer).endswith("Hello<|eos|>")
    path = write_rows(tmp_path / "b.jsonl", [{"prompt": "2 + 2 =", "completion": " 4"}])
    assert trained_text(prepare(make(path=path), tokenizer).train, tokenizer) == " 4<|eos|>"
    path = write_rows(tmp_path / "c.jsonl", [{"text": "Once upon"}])
    assert trained_text(prepare(make(path=path), tokenizer).train, tokenizer) == "nce upon<|eos|>"


def test_a_default_system_message_goes_where_there_is_none(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer
) -> None:
    own = {"messages": [{"role": "system", "content": "Own"}, *CHAT["messages"]]}
    rows = prepare(make(path=write_rows(tmp_path / "a.jsonl", [CHAT, own]), system="Be kind"), tokenizer).train
    assert texts(rows, tokenizer) == sorted(["Be kindHiHello", "OwnHiHello"])


def test_pretraining_reads_one_stream(tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "x" * 100}, {"text": "y" * 50}])
    rows = prepare(make("pretrain", path=path), tokenizer).train
    arrays = rows.read(np.zeros(3, np.int64), np.arange(3))
    assert arrays.document_ids is None
    stream = tokenizer.decode(arrays.input_ids.reshape(-1).tolist(), skip_special=False).replace("<|pad|>", "")
    bos = "<|bos|>" if tokenizer.encode("", add_special=True) else ""
    assert stream == f"{bos}{'x' * 100}<|eos|>{bos}{'y' * 50}<|eos|>"
    masked = prepare(make("pretrain", path=path, document_mask=True), tokenizer).train
    assert masked.read(np.zeros(3, np.int64), np.arange(3)).document_ids is not None


def test_padding_gives_each_document_its_row(tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer) -> None:
    rows = prepare(make(path=write_rows(tmp_path / "a.jsonl", [CHAT] * 3), packing=False), tokenizer).train
    assert len(rows) == 3
    arrays = rows.read(np.zeros(3, np.int64), np.arange(3))
    assert arrays.document_ids is None  # padding on the right needs no mask under causal attention
    assert (arrays.labels[arrays.input_ids == tokenizer.pad_id] == -100).all()


def test_a_megatron_data_set_trains_as_it_is(tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"document {number}"} for number in range(9)])
    first = prepare(make("pretrain", path=path), tokenizer)
    prefix = first.train.sources[0].shards[0]
    for spec in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        again = prepare(make("pretrain", path=spec, format="indexed"), tokenizer, vocab_size=300)
        assert len(again.train) == len(first.train)
        both = [each.train.read(np.zeros(1, np.int64), np.zeros(1, np.int64)).input_ids for each in (first, again)]
        assert np.array_equal(*both)
    with pytest.raises(UserError, match=r"token id 25\d, the model's embedding has 100 rows"):
        prepare(make("pretrain", path=prefix, format="indexed"), tokenizer, vocab_size=100)


def test_several_sources_are_mixed_by_weight_and_epochs(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer
) -> None:
    paths = [write_rows(tmp_path / f"{n}.jsonl", [{"text": f"{n}" * 60}] * 4 * (n + 1)) for n in range(2)]
    sources = [{"path": path, "epochs": epochs} for path, epochs in zip(paths, (3.0, 0.5), strict=True)]
    assert len(prepare(make(sources=sources), tokenizer).train) == 3 * 4 + 4
    sources = [{"path": path, "weight": weight} for path, weight in zip(paths, (1, 3), strict=True)]
    rows = prepare(make(sources=sources), tokenizer).train
    ids = rows.cursor(0, True).read(np.arange(1024)).input_ids
    assert (ids == ord("1")).any(axis=1).mean() == pytest.approx(0.75, abs=0.01)


def test_held_out_samples_are_not_trained(tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer) -> None:
    rows = [{"text": f"text {number}"} for number in range(300)]
    prepared = prepare(make(path=write_rows(tmp_path / "a.jsonl", rows), validation=0.1), tokenizer)
    assert prepared.validation is not None
    held_out, trained = texts(prepared.validation, tokenizer), texts(prepared.train, tokenizer)
    assert sorted(held_out + trained) == sorted(row["text"] for row in rows)
    assert 10 < len(held_out) < 60
    other = write_rows(tmp_path / "b.jsonl", [{"text": "other"}])
    prepared = prepare(make(path=str(tmp_path / "a.jsonl"), validation=other), tokenizer)
    assert prepared.validation is not None
    assert texts(prepared.validation, tokenizer) == ["other"]


def test_filters(tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer) -> None:
    """Seed 002 keeps what is longer than a limit: the limit itself is out."""
    path = write_rows(tmp_path / "a.jsonl", [{"text": "x" * length} for length in (3, 4, 5, 6, 5)])
    data = {"min_characters": 4, "max_characters": 5, "deduplicate": True}
    prepared = prepare(make(path=path, filter=data), tokenizer)
    assert texts(prepared.train, tokenizer) == ["xxxxx"]
    assert "1 of too many characters" in prepared.summary[1]
    assert "2 of too few characters" in prepared.summary[1]
    assert "1 whose text came before" in prepared.summary[1]
    extra = len(tokenizer.encode("", add_special=True)) + 1
    prepared = prepare(make(path=path, filter={"min_tokens": 4 + extra, "max_tokens": 5 + extra}), tokenizer)
    assert texts(prepared.train, tokenizer) == ["xxxx", "xxxxx", "xxxxx"]


def test_the_share_of_trained_tokens_is_that_of_the_rows(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer
) -> None:
    """Of samples that are cut, dropped or split, only what is left counts; counted here from the rows themselves."""
    rows = [CHAT] * 3 + [{"messages": [*CHAT["messages"], {"role": "user", "content": "q" * 90}, *CHAT["messages"]]}]
    for packing in (True, False):
        for too_long in ("truncate", "drop", "split"):
            recipe = make(
                path=write_rows(tmp_path / "a.jsonl", rows), too_long=too_long, packing=packing, max_truncated=1
            )
            train = prepare(recipe, tokenizer).train
            arrays = train.read(np.zeros(len(train), np.int64), np.arange(len(train)))
            assert train.figures["trained"] == (arrays.labels >= 0).sum()
            assert (arrays.labels >= 0).any(axis=1).all()


def test_held_out_data_are_read_as_the_first_source_is(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer
) -> None:
    """Where the format is said, it is said of both."""
    path = write_rows(tmp_path / "a.jsonl", [{"text": "plain", **CHAT}])
    validation = prepare(make(path=path, format="text", validation=path), tokenizer).validation
    assert validation is not None
    assert texts(validation, tokenizer) == ["plain"]
    mapped = {"path": write_rows(tmp_path / "b.jsonl", [{"q": "Hi", "a": "x"}]), "format": "alpaca",
              "columns": {"instruction": "q", "output": "a"}}  # fmt: skip
    shipped = prepare(make(sources=[mapped], validation="shipped:arithmetic?rows=3"), tokenizer).validation
    assert shipped is not None
    assert shipped.figures["documents"] == 3


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([{"weight": float("inf")}], "finite number"),
        ([{"weight": 1e-9}, {"weight": 1}], "more than 100,000 times apart"),
        ([{"weight": 1, "epochs": 2}], "epochs say nothing beside it"),
        ([{"epochs": 2e6}], "less than or equal to 1000000"),
    ],
)
def test_shares_that_cannot_be_are_refused(make: Callable[..., Recipe], sources: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(sources=[{"path": "a.jsonl", **source} for source in sources])


# ---- the cache ----


def test_a_second_run_costs_nothing_and_other_rows_cost_no_tokens(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [CHAT] * 5)
    first = prepare(make(path=path), tokenizer)

    def never(*_: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(tokenized, "tokenize_parts", never)
    assert prepare(make(path=path, seq_len=32), tokenizer).train.fingerprint != first.train.fingerprint
    assert prepare(make(path=path, too_long="drop", packing=False), tokenizer).folder == first.folder
    monkeypatch.setattr(arrange, "_write", never)
    assert prepare(make(path=path), tokenizer).train.fingerprint == first.train.fingerprint
    moved = tmp_path / "elsewhere" / "b.jsonl"  # the same content under another name is the same data
    moved.parent.mkdir()
    moved.write_bytes(Path(path).read_bytes())
    assert prepare(make(path=str(moved)), tokenizer).folder == first.folder


@pytest.mark.parametrize(
    "change",
    [
        {"loss_on": "all"},
        {"system": "Be kind"},
        {"template": "chatml", "accept": ["template"]},
        {"filter": {"min_characters": 1}},
        {"content": [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hullo"}]}]},
    ],
)
def test_whatever_decides_tokens_makes_new_ones(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, change: dict[str, Any]
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [CHAT])
    first = prepare(make(path=path), tokenizer)
    write_rows(tmp_path / "a.jsonl", change.pop("content", [CHAT]))
    assert prepare(make(path=path, **change), tokenizer).folder != first.folder


def many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file that is cut into about twenty parts, too many to be done in one process without need."""
    monkeypatch.setattr(pool, "PART_BYTES", 2000)
    monkeypatch.setattr(pool, "ALONE_BYTES", 0)
    return write_rows(tmp_path / "a.jsonl", [{"text": f"text {number} " + "z" * 20} for number in range(800)])


def shards(prepared: Prepared) -> bytes:
    return b"".join(
        Path(f"{prefix}{suffix}").read_bytes()
        for prefix in prepared.train.sources[0].shards
        for suffix in (".bin", ".idx", ".docs")
    )


def test_processes_write_what_one_writes(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = many_parts(tmp_path, monkeypatch)
    alone = prepare(make(path=path), tokenizer)
    together = prepare(make(path=path, workers=2, cache=str(tmp_path / "other")), tokenizer)
    assert len(alone.train.sources[0].shards) > 15
    assert shards(together) == shards(alone)
    assert together.train.fingerprint == alone.train.fingerprint


def test_processes_know_what_ends_an_answer(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids that only generation_config.json names reach the processes; masks depend on them."""
    stop = tokenizer.token_id("<|im_end|>")
    assert stop is not None
    ending = Tokenizer(tokenizer._json, tokenizer.config, [stop])
    write_rows(tmp_path / "a.jsonl", [CHAT] * 400)
    monkeypatch.setattr(pool, "PART_BYTES", 2000)
    monkeypatch.setattr(pool, "ALONE_BYTES", 0)
    data = {"path": str(tmp_path / "a.jsonl"), "template": "chatml", "accept": ["template"]}
    alone = prepare(make(**data), ending)
    together = prepare(make(**data, workers=2, cache=str(tmp_path / "other")), ending)
    assert shards(alone) == shards(together)
    assert alone.train.fingerprint == together.train.fingerprint
    assert prepare(make(**data), tokenizer).train.fingerprint != alone.train.fingerprint
    assert load_tokenizer(together.folder / "tokenizer").stop_ids == ending.stop_ids


def test_an_interrupted_preparation_goes_on(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = many_parts(tmp_path, monkeypatch)
    whole = prepare(make(path=path), tokenizer)
    done: list[int] = []
    real = pool.PartTokenizer.run

    def dying(self: pool.PartTokenizer, part: pool.Part, folder: Path, progress: Callable[[float], None]) -> None:
        if len(done) == 7:
            (part.prefix(folder).with_suffix(".bin")).write_bytes(b"half")  # as a kill in the middle leaves it
            raise KeyboardInterrupt
        real(self, part, folder, progress)
        done.append(part.number)

    monkeypatch.setattr(pool.PartTokenizer, "run", dying)
    other = make(path=path, cache=str(tmp_path / "other"))
    with pytest.raises(KeyboardInterrupt):
        prepare(other, tokenizer)
    done.clear()
    monkeypatch.setattr(
        pool.PartTokenizer, "run", lambda self, part, *more: (done.append(part.number), real(self, part, *more))
    )
    again = prepare(other, tokenizer)
    assert done == list(range(7, len(whole.train.sources[0].shards)))
    assert shards(again) == shards(whole)


PREPARE = """
import sys, json
from trainwright.data import pool
from trainwright.data.prepare import prepare
from trainwright.data.tokenizer import load_tokenizer
from trainwright.recipe.schema import Recipe
pool.PART_BYTES, pool.ALONE_BYTES = 2000, 0
prepared = prepare(Recipe.model_validate(json.loads(sys.argv[1])), load_tokenizer("byte"), progress=False)
print(prepared.fingerprint)
"""


def test_killed_and_called_several_times_at_once(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks call `prepare` together; one is killed at work. The others go on, and all read the same."""
    recipe = make(path=many_parts(tmp_path, monkeypatch), workers=2)
    command = [sys.executable, "-c", PREPARE, recipe.model_dump_json()]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cache/tokens/*/part-*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(ranks[0].pid, signal.SIGKILL)  # it may be the one at work, or one that waits
    said = [rank.communicate()[0].strip() for rank in ranks]
    assert [rank.returncode for rank in ranks[1:]] == [0, 0]
    expected = prepare(make(path=str(tmp_path / "a.jsonl"), cache=str(tmp_path / "other")), tokenizer)
    assert said[1:] == [expected.fingerprint] * 2
    assert shards(prepare(recipe, tokenizer)) == shards(expected)


def test_a_bad_row_in_a_process_reaches_the_user(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = many_parts(tmp_path, monkeypatch)
    lines = Path(path).read_text().splitlines()
    lines[611] = '{"text": 7}'
    Path(path).write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"a.jsonl line 612: text is a number, expected a string"):
        prepare(make(path=path, workers=2), tokenizer)


# ---- bad rows ----


def test_bad_rows_stop_or_are_counted_and_listed(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer
) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(CHAT).encode()
    half = json.dumps({"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "x"}]})
    silent = json.dumps({"messages": CHAT["messages"][:1]})
    path.write_bytes(b"\n".join([good, b"{broken", good, b'{"text": "mixed"}', half.encode(), silent.encode(), b""]))
    with pytest.raises(UserError, match=r"a.jsonl line 2: broken JSON.*data.on_bad_row=skip"):
        prepare(make(path=str(path)), tokenizer)
    prepared = prepare(make(path=str(path), on_bad_row="skip"), tokenizer)
    assert texts(prepared.train, tokenizer) == ["HiHello"] * 2
    assert "skipped: 4 bad rows" in "\n".join(prepared.summary)
    listed = (prepared.folder / "bad_rows.txt").read_text().splitlines()
    assert [line.split(": ", 1)[0].rpartition("/")[2] for line in listed] == [f"a.jsonl line {n}" for n in (2, 4, 5, 6)]
    for line, words in zip(
        listed, ["broken JSON", "looks like text among messages", "surrogate", "no assistant"], strict=True
    ):
        assert words in line


@pytest.mark.parametrize(
    ("files", "data", "words"),
    [
        ({}, {"path": "gone.jsonl"}, "gone.jsonl does not exist"),
        ({"a.jsonl": ""}, {"path": "a.jsonl"}, "a.jsonl is empty"),
        ({"a.jsonl": "\n\n"}, {"path": "a.jsonl"}, "a.jsonl holds no row"),
        ({"d/notes.md": "x"}, {"path": "d"}, "is a folder without data files"),
        ({"d/a.jsonl/x": "x"}, {"path": "d/*.jsonl"}, "matches only folders"),
        ({}, {"path": "*.jsonl"}, "matches no file"),
        ({"a.md": "x"}, {"path": "a.md"}, "no data file that is known"),
        ({"d/a.jsonl": '{"text": "x"}', "d/b.txt": "x"}, {"path": "d"}, "mixes JSON and text files"),
        ({"a.jsonl": '{"words": "x"}'}, {"path": "a.jsonl"}, "a.jsonl line 1: keys words fit no format"),
        ({"a.jsonl": "[1]\n3"}, {"path": "a.jsonl"}, "no object with keys|row 1|line"),
        ({"a.jsonl": '{"text": "x"}'}, {"path": "a.jsonl", "format": "alpaca"}, "not alpaca, which needs instruction"),
        ({"a.jsonl": '{"text": "x"}\n{"prompt": "x", "completion": "y"}'}, {"path": "a.jsonl"},
         "line 2: looks like prompt_completion among text: one format a source"),
        ({"a.jsonl": '{"text": "' + "x" * 2000 + '"}'}, {"path": "a.jsonl", "max_line_bytes": 1024},
         "longer than 1024 bytes"),
        ({}, {"path": "shipped:geometry"}, "is not shipped: use shipped:arithmetic"),
        ({}, {"path": "shipped:arithmetic?colour=red"}, "no setting 'colour'"),
        ({}, {"path": "hf:../../etc/passwd"}, "is no hub id"),
        ({"a.jsonl": '{"text": "x"}'}, {"path": "a.jsonl", "validation": 0.9999999}, "data.validation=0.9999999"),
        ({}, {"path": "ftp:data"}, "ftp: is unknown"),
        ({}, {"path": "~nobody-here/a.jsonl"}, "does not exist"),
        ({"a.jsonl": '{"instruction": "q", "output": "a"}'},
         {"sources": [{"path": "a.jsonl", "columns": {"input": "ctx"}}]}, "none of the first 100 rows .* key 'ctx'"),
        ({"a.jsonl": '[{"role": "user", "content": "q"}]\n[{"role": "user", "content": "r"}]'}, {"path": "a.jsonl"},
         "keys content, role fit no format|goes on after the array"),
        ({"a.bin": "x"}, {"path": "a.bin"}, "a.idx does not exist"),
        ({"a.bin": "x", "a.idx": "x"}, {"path": "a", "format": "indexed"}, "does not start with MMIDIDX"),
        ({"d/state.json": '{"_data_files": [{"filename": "../../x.arrow"}]}'}, {"path": "d"}, "outside of it: refused"),
        ({"d/dataset_dict.json": '{"splits": ["../x"]}'}, {"path": "d"}, "has the splits"),
        ({"d/state.json": "{}"}, {"path": "d"}, "no file of a `datasets` folder"),
    ],
)  # fmt: skip
def test_what_is_not_there_or_not_data_is_one_line(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str], data: dict[str, Any], words: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        prepare(make(**data), tokenizer)
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_one_line(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [CHAT])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"prepared data go to .*file, data.cache chooses another place"):
        prepare(make(path=path, cache=str(tmp_path / "file")), tokenizer)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrange.RowWriter, "add", full)
    with pytest.raises(UserError, match="No space left on device; prepared data go to"):
        prepare(make(path=path), tokenizer)
    monkeypatch.undo()
    assert texts(prepare(make(path=path), tokenizer).train, tokenizer) == ["HiHello"]  # nothing half is believed


# ---- the doctor ----


def complaint(recipe: Recipe, tokenizer: Tokenizer, vocab_size: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        prepare(recipe, tokenizer, vocab_size=vocab_size)
    return str(caught.value)


def test_the_doctor_refuses_what_trains_nothing(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer
) -> None:
    long = {"instruction": "q" * 100, "output": "a"}
    path = write_rows(tmp_path / "a.jsonl", [long])
    assert "has no trained token" in complaint(make(path=path), tokenizer)
    assert "empty after filtering: of 1 samples none is left" in complaint(make(path=path, too_long="drop"), tokenizer)
    assert "empty after filtering" in complaint(make(path=path, filter={"max_characters": 5}), tokenizer)
    path = write_rows(tmp_path / "b.jsonl", [CHAT] * 3)
    assert "of 3 samples holds out none" in complaint(make(path=path, validation=1e-6), tokenizer)
    Path(path).write_text(json.dumps(CHAT) + "\n{bad")
    assert "no good row: 1 were skipped" in complaint(
        make(path=write_rows(tmp_path / "c.jsonl", [{"messages": CHAT["messages"][:1]}]), on_bad_row="skip"), tokenizer
    )


def test_the_doctor_refuses_cut_answers_and_ids_without_embedding(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer
) -> None:
    rows = [{"instruction": "q", "output": "a" * 100}, *[{"instruction": "q", "output": "a"}] * 3]
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert "1 of 4 samples have their answer cut at data.seq_len=64" in complaint(make(path=path), tokenizer)
    prepare(make(path=path, max_truncated=0.25), tokenizer)
    prepare(make(path=path, accept=["truncated_answers"]), tokenizer)
    assert "the model's embedding has 256 rows" in complaint(make(path=path, max_truncated=1), tokenizer, 256)
    prepare(make(path=path, max_truncated=1), tokenizer, vocab_size=tokenizer.vocab_size)


def test_the_doctor_refuses_bad_encodings_and_missing_ends(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer
) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"prompt": "caf\ufffd", "completion": "x"}])
    assert "1 of 1 samples hold U+FFFD" in complaint(make(path=path), tokenizer)
    path = write_rows(tmp_path / "a.jsonl", [{"text": "caf\ufffd"}, {"text": "café"}])
    assert "1 of 2 samples hold U+FFFD" in complaint(make(path=path), tokenizer)
    prepared = prepare(make(path=path, accept=["replaced_characters"]), tokenizer)
    assert any("replaced characters (U+FFFD): 1" in line for line in prepared.summary)
    endless = Tokenizer(tokenizer._json, {key: value for key, value in tokenizer.config.items() if key != "eos_token"})
    path = write_rows(tmp_path / "b.jsonl", [{"text": "x y z"}])
    assert "1 of 1 samples do not end in a trained EOS" in complaint(make(path=path), endless)


def test_the_doctor_refuses_double_bos_in_indexed_data(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer
) -> None:
    from trainwright.data.indexed import IndexedWriter

    assert tokenizer.bos_id is not None
    assert tokenizer.eos_id is not None
    document = [tokenizer.bos_id, tokenizer.bos_id, 65, 66, tokenizer.eos_id]
    with IndexedWriter(tmp_path / "a", np.dtype("<u2")) as writer:
        writer.add(np.array(document * 2), np.array([5, 5]))
    recipe = make("pretrain", path=str(tmp_path / "a.bin"))
    assert "2 of 2 samples start with BOS twice" in complaint(recipe, tokenizer)


def test_the_doctor_refuses_another_template_than_the_tokenizers(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [CHAT])
    words = complaint(make(path=path, template="chatml"), tokenizer)
    assert "data.template=chatml is not the tokenizer's own template" in words
    assert "data.accept=[template]" in words
    prepare(make(path=path, template="chatml", accept=["template"]), tokenizer)
    prepare(make(path=path, template=tokenizer.chat_template), tokenizer)


# ---- sources ----


def test_folders_globs_packed_and_several_files(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer
) -> None:
    folder = tmp_path / "data"
    for number in range(3):
        write_rows(folder / f"train-{number}.jsonl", [{"text": f"train {number}"}])
    (folder / "test.jsonl.gz").write_bytes(gzip.compress(b'{"text": "test"}\n'))
    (folder / "README.md").write_text("about")
    (folder / "empty.jsonl").write_text("")
    everything = prepare(make(path=str(folder)), tokenizer)
    assert texts(everything.train, tokenizer) == ["test", "train 0", "train 1", "train 2"]
    assert "  empty files: 1" in everything.summary
    split = prepare(make(sources=[{"path": str(folder), "split": "train"}]), tokenizer)
    assert texts(split.train, tokenizer) == ["train 0", "train 1", "train 2"]
    assert texts(prepare(make(path=f"{folder}/train-[01]*"), tokenizer).train, tokenizer) == ["train 0", "train 1"]
    with pytest.raises(UserError, match="no file for split 'dev'"):
        prepare(make(sources=[{"path": str(folder), "split": "dev"}]), tokenizer)


def test_a_datasets_folder(tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"instruction": f"q{number}", "input": "", "output": "a"} for number in range(5)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert texts(prepare(make(path=str(tmp_path / "one")), tokenizer).train, tokenizer) == [f"q{n}a" for n in range(5)]
    both = datasets.DatasetDict({"train": data.select(range(3)), "test": data.select(range(3, 5))})
    both.save_to_disk(str(tmp_path / "two"))
    assert texts(prepare(make(path=str(tmp_path / "two")), tokenizer).train, tokenizer) == ["q0a", "q1a", "q2a"]
    test = prepare(make(sources=[{"path": str(tmp_path / "two"), "split": "test"}]), tokenizer)
    assert texts(test.train, tokenizer) == ["q3a", "q4a"]


def test_a_hub_id_is_downloaded_and_nothing_else_is(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    (tmp_path / "snapshot" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        write_rows(tmp_path / "snapshot" / "data" / f"{split}-00000-of-00001.jsonl", [{"text": split}])
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["allow_patterns"]))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert texts(prepare(make(path="hf:owner/name"), tokenizer).train, tokenizer) == ["train"]
    test = make(sources=[{"path": "hf:owner/name@v1:data/*.jsonl", "split": "test"}])
    assert texts(prepare(test, tokenizer).train, tokenizer) == ["test"]
    assert [each[:2] for each in asked] == [("owner/name", None), ("owner/name", "v1")]
    assert asked[1][2] == ["data/*.jsonl"]


def test_plain_text_files(tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    path = str(tmp_path / "a.txt")
    assert texts(prepare(make(path=path), tokenizer).train, tokenizer) == ["one", "three", "two"]
    for document, wanted in (("paragraph", ["one\ntwo", "three"]), ("file", ["one\ntwo\n\nthree"])):
        source = {"path": path, "document": document}
        assert texts(prepare(make(sources=[source]), tokenizer).train, tokenizer) == wanted


# ---- the command ----


def test_the_tokenizer_of_random_weights_is_that_of_their_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "shape")
    values = {"model": {"config": str(tmp_path / "shape")}, "data": {"path": "a"}, "train": {"steps": 1}}
    assert recipe_tokenizer(Recipe.model_validate(values)).fingerprint == tokenizer.fingerprint
    values["model"] = {"config": "llama-7b"}
    with pytest.raises(UserError, match=r"set model\.tokenizer"):
        recipe_tokenizer(Recipe.model_validate(values))


def test_the_command_shows_samples_with_what_is_trained(
    tmp_path: Path, make: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_command(make(path=write_rows(tmp_path / "a.jsonl", [CHAT] * 2)), show=2, doctor=True)
    shown = capsys.readouterr()
    assert shown.out.count("Hi<|assistant|>Hello<|eos|>") == 2
    assert "sample 2: 11 tokens, 6 trained" in shown.out
    assert "doctor: nothing wrong; the model is not here" in shown.out
    assert "train: 2 documents" in shown.err
    prepare_command(make(path=str(tmp_path / "a.jsonl")), show=5, doctor=True, vocab_size=300)
    shown = capsys.readouterr()
    assert shown.out.count("Hi<|assistant|>") == 2  # no sample twice
    assert "doctor: nothing wrong\n" in shown.out
