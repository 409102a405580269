"""Streaming: every document once a pass, the same order on any number of ranks, a small window on the disk."""

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.warm import python
from trainwright.data import pool, stream
from trainwright.data.cache import try_claim
from trainwright.data.command import prepare_command
from trainwright.data.loader import Loader
from trainwright.data.prepare import prepare
from trainwright.data.stream import StreamSet
from trainwright.data.tokenizer import Tokenizer, load_tokenizer
from trainwright.errors import UserError
from trainwright.recipe.schema import Recipe

DOCUMENTS = 600


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PART_BYTES", 1000)
    monkeypatch.setattr(stream, "GROUP", 3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("byte")


def write(path: Path, letter: str = "d", documents: int = DOCUMENTS) -> str:
    lines = [json.dumps({"text": f"{letter}{number}" + "." * (number % 20)}) for number in range(documents)]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Recipe]:
    def recipe(task: str = "sft", train: dict[str, Any] | None = None, **data: Any) -> Recipe:
        data = {"seq_len": 64, "cache": str(tmp_path / "cache"), "workers": 1, "streaming": True, **data}
        model = {"config": "any", "tokenizer": "byte"}
        return Recipe.model_validate({"task": task, "model": model, "train": train or {"steps": 1}, "data": data})

    return recipe


@pytest.fixture
def closing() -> Iterator[Callable[[Loader], Loader]]:
    loaders: list[Loader] = []

    def remember(loader: Loader) -> Loader:
        loaders.append(loader)
        return loader

    yield remember
    for loader in loaders:
        loader.close()


def open_stream(recipe: Recipe, tokenizer: Tokenizer) -> StreamSet:
    rows = prepare(recipe, tokenizer, progress=False).train
    assert isinstance(rows, StreamSet)
    return rows


def documents(batch: Any, tokenizer: Tokenizer) -> list[str]:
    found = []
    for ids, of_token in zip(batch.input_ids, batch.document_ids, strict=True):
        found += [tokenizer.decode(ids[of_token == each].tolist()) for each in range(int(of_token.max()) + 1)]
    return found


def test_each_pass_has_every_document_once_in_an_order_of_its_own(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, closing: Callable[[Loader], Loader]
) -> None:
    path = write(tmp_path / "a.jsonl")
    loader = closing(Loader(open_stream(make(path=path), tokenizer), micro_batch_size=1, seed=3))
    wanted = sorted(json.loads(line)["text"] for line in Path(path).read_text().splitlines())
    passes = []
    for _ in range(2):
        found: list[str] = []
        while len(found) < DOCUMENTS:
            found += documents(next(loader), tokenizer)
        assert sorted(found) == wanted
        passes.append(found)
    assert passes[0] != passes[1]
    assert passes[0] != wanted
    window = list(tmp_path.glob("cache/stream/*/part-*.bin"))
    assert len(window) <= 4 * 3 + 2  # the groups in use and ahead, of more than ten in all
    assert len(list(tmp_path.glob("cache/stream/*/part-*.lock"))) > 14


@pytest.mark.parametrize("weighted", [False, True])
def test_any_sequence_of_world_sizes_gives_one_order(
    tmp_path: Path,
    make: Callable[..., Recipe],
    tokenizer: Tokenizer,
    closing: Callable[[Loader], Loader],
    weighted: bool,
) -> None:
    sources = [{"path": write(tmp_path / f"{letter}.jsonl", letter, 150)} for letter in "ab"]
    if weighted:
        sources = [{**source, "weight": weight} for source, weight in zip(sources, (1, 3), strict=True)]  # type: ignore[dict-item]
    rows = open_stream(make(sources=sources), tokenizer)
    alone = closing(Loader(rows, micro_batch_size=1, seed=5))
    expected = [next(alone).input_ids[0].tolist() for _ in range(150)]
    state = Loader(rows, micro_batch_size=1, seed=5).state_dict()
    found: list[list[int]] = []
    for world, micro, steps in ((1, 3, 4), (3, 1, 9), (2, 4, 5), (1, 1, 20)):
        loaders = [Loader(rows, micro_batch_size=micro, rank=rank, world_size=world) for rank in range(world)]
        for loader in loaders:
            closing(loader).load_state_dict(json.loads(json.dumps(state)))
        for _ in range(steps):
            found += [row for loader in loaders for row in next(loader).input_ids.tolist()]
        states = [loader.state_dict() for loader in loaders]
        assert all(each == states[0] for each in states)
        state = states[0]
        assert len(json.dumps(state)) < 300
        for loader in loaders:
            loader.close()
    assert found == expected[: len(found)]
    if weighted:
        shares = [tokenizer.decode(row).count("b") for row in expected[:120]]
        assert sum(map(bool, shares)) / 120 == pytest.approx(0.75, abs=0.1)


def test_resuming_tokenizes_only_what_is_needed(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, closing: Callable[[Loader], Loader]
) -> None:
    """The parts before the place of resuming are not tokenized again."""
    path = write(tmp_path / "a.jsonl")
    rows = open_stream(make(path=path), tokenizer)
    loader = closing(Loader(rows, micro_batch_size=1))
    for _ in range(70):
        next(loader)
    state, after = loader.state_dict(), [next(loader).input_ids for _ in range(5)]
    group = state["cursor"]["lanes"][0][0]
    assert group >= 2
    loader.close()
    other = open_stream(make(path=path, cache=str(tmp_path / "other")), tokenizer)
    resumed = closing(Loader(other, micro_batch_size=1))
    resumed.load_state_dict(state)
    assert all((next(resumed).input_ids == each).all() for each in after)
    resumed.close()
    made = {file.stem for file in (tmp_path / "other").glob("stream/*/part-*.lock")}
    lane = other.cursor(0, True).lanes[0]
    behind = {part.prefix(Path()).name for each in range(1, group) for part in lane.parts_of(each)}
    assert behind
    assert not made & behind


RANK = """
import json, sys
from trainwright.data import pool, stream
from trainwright.data.loader import Loader
from trainwright.data.prepare import prepare
from trainwright.data.tokenizer import load_tokenizer
from trainwright.recipe.schema import Recipe
pool.PART_BYTES, stream.GROUP = 1000, 3
rows = prepare(Recipe.model_validate(json.loads(sys.argv[1])), load_tokenizer("byte"), progress=False).train
loader = Loader(rows, micro_batch_size=2, rank=int(sys.argv[2]), world_size=2, seed=1)
print(json.dumps([next(loader).input_ids.tolist() for _ in range(80)]))
loader.close()
"""


def test_ranks_share_one_window(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, closing: Callable[[Loader], Loader]
) -> None:
    recipe = make(path=write(tmp_path / "a.jsonl"))
    ranks = [
        subprocess.Popen([python(), "-c", RANK, recipe.model_dump_json(), str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [json.loads(rank.communicate()[0]) for rank in ranks]
    alone = closing(Loader(open_stream(recipe, tokenizer), micro_batch_size=4, seed=1))
    for one, two in zip(*said, strict=True):
        assert next(alone).input_ids.tolist() == one + two


def test_a_part_that_is_being_made_is_not_deleted(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer
) -> None:
    rows = open_stream(make(path=write(tmp_path / "a.jsonl")), tokenizer)
    part = next(part for part in rows.lanes[0] if part.done(rows.folder))
    files = sorted(rows.folder.glob("part-*.*"))
    with try_claim(part.prefix(rows.folder).with_suffix(".lock")) as mine:
        assert mine
        rows.delete(part)
        assert sorted(rows.folder.glob("part-*.*")) == files
    rows.delete(part)
    assert not part.done(rows.folder)


def test_pretraining_streams_too(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, closing: Callable[[Loader], Loader]
) -> None:
    path = write(tmp_path / "a.jsonl")
    loader = closing(
        Loader(open_stream(make("pretrain", path=path, shuffle=False), tokenizer), micro_batch_size=1, shuffle=False)
    )
    text = "".join(tokenizer.decode(next(loader).input_ids[0].tolist()) for _ in range(20))
    assert text.startswith("d0d1.d2..d3...")
    assert next(loader).document_ids is None


def test_a_bad_row_ends_the_stream_with_its_place(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, closing: Callable[[Loader], Loader]
) -> None:
    path = Path(write(tmp_path / "a.jsonl"))
    lines = path.read_text().splitlines()
    lines[500] = "{broken"
    path.write_text("\n".join(lines))
    rows = open_stream(make(path=str(path), shuffle=False), tokenizer)
    loader = closing(Loader(rows, micro_batch_size=8, shuffle=False))
    with pytest.raises(UserError, match=r"a.jsonl line 501: broken JSON"):
        list(loader)


def test_closing_ends_at_once_while_a_part_is_awaited(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = open_stream(make(path=write(tmp_path / "a.jsonl")), tokenizer)
    monkeypatch.setattr(stream.WorkerProcess, "tokenize", lambda *_: time.sleep(0.05))  # nothing ever gets done
    for part in rows.lanes[0]:
        rows.delete(part)
    loader = Loader(rows, micro_batch_size=1)

    def wait() -> None:
        with contextlib.suppress(RuntimeError):
            next(loader)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    time.sleep(0.2)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("data", "train", "words"),
    [
        ({"filter": {"deduplicate": True}}, None, "must see all texts"),
        ({"validation": 0.1}, None, "give data.validation a path"),
        ({}, {"epochs": 1}, "set train.steps or train.tokens"),
        ({"filter": {"min_tokens": 60}}, None, "no part of the stream gives a row"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer,
    closing: Callable[[Loader], Loader], data: dict[str, Any], train: dict[str, Any] | None, words: str,
) -> None:  # fmt: skip
    def first_batch() -> None:
        rows = open_stream(make(path=write(tmp_path / "a.jsonl"), train=train, **data), tokenizer)
        closing(Loader(rows, micro_batch_size=1)).__next__()

    with pytest.raises(UserError, match=words):
        first_batch()


def test_the_doctor_sees_the_start_of_a_stream(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "caf\\ufffd"}\n' * 10)
    with pytest.raises(UserError, match="10 of 10 samples hold U\\+FFFD"):
        prepare(make(path=str(path)), tokenizer)
    with pytest.raises(UserError, match="the model's embedding has 100 rows"):
        prepare(make(path=write(tmp_path / "b.jsonl")), tokenizer, vocab_size=100)
    rows = open_stream(make(path=write(tmp_path / "b.jsonl")), tokenizer)
    with pytest.raises(UserError, match="does not know how many rows"):
        len(rows)


def test_bad_rows_of_a_stream_are_listed_and_stay_listed(
    tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer, closing: Callable[[Loader], Loader]
) -> None:
    path = tmp_path / "a.jsonl"
    write(path)
    lines = path.read_text().splitlines()
    lines[3] = '{"text": 7}'
    path.write_text("\n".join(lines))
    prepared = prepare(make(path=str(path), on_bad_row="skip"), tokenizer, progress=False)
    loader = closing(Loader(prepared.train, micro_batch_size=8))
    while not list(prepared.folder.glob("*.bad.txt")) or list(prepared.folder.glob("part-00000.json")):
        next(loader)  # until the part was there and was deleted
    listed = "".join(file.read_text() for file in prepared.folder.glob("part-*.bad.txt"))
    place = len("\n".join(lines[:3])) + 1
    assert listed == f"{path} byte {place}: text is a number, expected a string\n"
    assert f"listed as they come in {prepared.folder}/part-*.bad.txt" in prepared.summary[1]


def test_the_command_shows_samples_of_a_stream(
    tmp_path: Path, make: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_command(make(path=write(tmp_path / "a.jsonl"), shuffle=False), show=2)
    assert capsys.readouterr().out.count("<|eos|>") == 2


def test_packed_files_stream_whole(tmp_path: Path, make: Callable[..., Recipe], tokenizer: Tokenizer) -> None:
    import gzip

    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(Path(write(tmp_path / "a.jsonl")).read_bytes()))
    rows = open_stream(make(path=str(path)), tokenizer)
    assert len(rows.lanes[0]) == 1
    cursor = rows.cursor(0, False)
    assert tokenizer.decode(cursor.read(np.array([0])).input_ids[0].tolist())
    cursor.close()
