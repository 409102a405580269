"""Rows tokenized while training, for data larger than the disk: a rolling window of shards.

Owns the order of parts and the window. The parts are those of pool.py, tokenized by the same worker processes and put
into rows by packing.py, so a streamed row is like any other; only the shuffle is narrower (parts as a whole, then rows
within a few parts). Ranks on one machine share the window: a part is tokenized once, by whoever claims it first.

The order depends on seed and data alone. How many rows a part has is known only when it is tokenized, so the state is
a cursor for each lane: a group of parts and the number of its first row.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainwright.data.arrange import Arrangement
from trainwright.data.cache import read_json, try_claim
from trainwright.data.doctor import beyond_embedding
from trainwright.data.order import Mix, Permutation
from trainwright.data.packing import Rows, Selection, StreamCutter, fit_documents, pack_rows, pad_rows
from trainwright.data.pool import WorkerProcess, cores
from trainwright.data.rows import HeldRows, PackedSource, RowArrays, RowShape
from trainwright.data.shards import Shard
from trainwright.data.worker import Part
from trainwright.errors import UserError

GROUP = 8  # parts whose rows are shuffled together
AHEAD = 2  # groups that are tokenized before they are needed
POLL_SECONDS = 0.02


@dataclass
class StreamSet(RowShape):
    """Rows of parts that are tokenized as they come. Each lane is a list of parts that is gone through again and again:
    one for each source when there are weights, one for all sources otherwise."""

    folder: Path
    lanes: list[list[Part]]
    weights: list[float] | None
    how: Arrangement
    selection: Selection
    workers: int | None
    vocab_size: int | None
    fingerprint: str

    def cursor(self, seed: int, shuffle: bool, state: dict[str, Any] | None = None) -> StreamCursor:
        return StreamCursor(self, seed, shuffle, (state or {}).get("lanes"))

    def __len__(self) -> int:
        raise UserError("data.streaming does not know how many rows there are: set train.steps or train.tokens")

    def examine(self, seed: int, shuffle: bool) -> tuple[dict[str, int], dict[str, int]]:
        """Figures of the tokens and of the rows of each lane's first part, as `tokenize` and `arrange` count them."""
        cursor = self.cursor(seed, shuffle)
        tokens: Counter[str] = Counter()
        rows: Counter[str] = Counter()
        try:
            for number, lane in enumerate(cursor.lanes):
                first = lane.parts_of(0)[:1]
                cursor.window.open(number, first, [])
                found = read_json(first[0].prefix(self.folder).with_suffix(".json"))
                tokens["max_id"] = max(tokens["max_id"], found.pop("max_id", 0))
                tokens.update({key: value for key, value in found.items() if key != "bad"})
                self.open(first[0], rows)
        finally:
            cursor.close()
        return dict(tokens), dict(rows)

    def open(self, part: Part, counts: Counter[str]) -> HeldRows:
        """The rows of a part whose shard is whole. The shard stays readable when its files are deleted."""
        shard = Shard(part.prefix(self.folder))
        figures = read_json(part.prefix(self.folder).with_suffix(".json"))
        if self.vocab_size is not None and figures.get("max_id", 0) >= self.vocab_size:
            raise UserError(beyond_embedding(figures["max_id"], self.vocab_size))
        shard.read(np.zeros(min(1, len(shard)), np.int64))  # maps its files
        how, chosen = self.how, self.selection.choose(shard, None, counts)
        if how.stream:
            cutter = StreamCutter(how.seq_len, how.document_mask)
            both = [cutter.add(0, shard.starts[chosen], shard.lengths[chosen]), cutter.finish()]
            rows = Rows(
                np.concatenate([each.segments for each in both]), np.concatenate([each.counts for each in both])
            )
            counts["documents"] += len(chosen)
            counts["trained"] += int(shard.records["trained"][chosen].sum())
        else:
            segments = fit_documents(shard, 0, chosen, how.seq_len, how.too_long, counts)
            rows = pack_rows(segments, how.seq_len) if how.packing else pad_rows(segments)
        counts["rows"] += len(rows.counts)
        counts["row_tokens"] += int(rows.segments["length"].sum())
        return HeldRows(rows, [shard])

    def delete(self, part: Part) -> None:
        """Takes a part out of the window. Its figures go first: without them it is as if never tokenized.

        A part that another rank's process is making again stays: half of it would be gone, and its figures there.
        """
        prefix = part.prefix(self.folder)
        with try_claim(prefix.with_suffix(".lock")) as mine:
            for suffix in (".json", ".bin", ".idx", ".docs", ".trained", ".stops") if mine else ():
                prefix.with_suffix(suffix).unlink(missing_ok=True)


class _Group(NamedTuple):
    """Some parts of a lane, open. `first`: its first row's number in the lane. `ends`: rows up to each part's end."""

    number: int
    first: int
    rows: list[PackedSource]
    ends: NDArray[np.int64]


class _Lane:
    """The endless order of one list of parts."""

    def __init__(self, stream: StreamSet, number: int, seed: int, shuffle: bool, window: _Window) -> None:
        self._stream, self._number, self._seed, self._shuffle = stream, number, seed, shuffle
        self._parts = stream.lanes[number]
        self._groups = -(-len(self._parts) // GROUP)  # in one pass
        self._window = window
        self._opened: list[_Group] = []  # those that the positions asked for lie in
        self.starts: list[tuple[int, int]] = [(0, 0)]  # (group, its first row) of all groups that were reached

    def parts_of(self, group: int) -> list[Part]:
        """The parts of a group. A pass has its groups, the last of them maybe smaller, in an order of its own."""
        each, at = divmod(group, self._groups)
        places = np.arange(at * GROUP, min(len(self._parts), (at + 1) * GROUP))
        if self._shuffle:
            places = Permutation(len(self._parts), self._seed, "parts", self._number, each)(places)
        return [self._parts[place] for place in places.tolist()]

    def find(self, draws: NDArray[np.int64]) -> tuple[list[PackedSource], list[int]]:
        """The rows that are the draws, which never fall behind those asked for before."""
        sources, rows = [], []
        self._opened = [group for group in self._opened if group.first + group.ends[-1] > draws.min()]
        for draw in draws.tolist():
            group = self._group_of(draw)
            place = draw - group.first
            if self._shuffle:
                order = Permutation(int(group.ends[-1]), self._seed, "rows", self._number, group.number)
                place = int(order(np.array([place]))[0])
            part = int(np.searchsorted(group.ends, place, side="right"))
            sources.append(group.rows[part])
            rows.append(place - (int(group.ends[part - 1]) if part else 0))
        return sources, rows

    def _group_of(self, draw: int) -> _Group:
        for group in self._opened:
            if group.first <= draw < group.first + group.ends[-1]:
                return group
        for _ in range(2 * self._groups):
            number, first = self.starts[-1]
            group = self._open(number, first)
            self._opened.append(group)
            self.starts.append((number + 1, first + int(group.ends[-1])))
            if draw < self.starts[-1][1]:
                return group
        raise UserError("no part of the stream gives a row: see data.filter, data.too_long, data.seq_len, data.loss_on")

    def _open(self, number: int, first: int) -> _Group:
        coming = [part for ahead in range(1, AHEAD + 1) for part in self.parts_of(number + ahead)]
        rows = self._window.open(self._number, self.parts_of(number), coming)
        return _Group(number, first, rows, np.cumsum([len(each) for each in rows]))

    def state(self, draw: int) -> tuple[int, int]:
        """The group that the next draw lies in, and its first row."""
        return max((start for start in self.starts if start[1] <= draw), key=lambda start: start[0])


class StreamCursor:
    """Reads rows at rising positions. `lanes` is where an earlier cursor stood."""

    def __init__(self, stream: StreamSet, seed: int, shuffle: bool, lanes: list[list[int]] | None) -> None:
        self._stream = stream
        self._mix = Mix(stream.weights, seed) if stream.weights else None
        self.window = _Window(stream)
        self.lanes = [_Lane(stream, number, seed, shuffle, self.window) for number in range(len(stream.lanes))]
        for lane, start in zip(self.lanes, lanes or (), strict=bool(lanes)):
            lane.starts = [(int(start[0]), int(start[1]))]

    def read(self, positions: NDArray[np.int64]) -> RowArrays:
        lanes, draws = self._mix.locate(positions) if self._mix else (np.zeros_like(positions), positions)
        sources: list[PackedSource] = [None] * len(positions)  # type: ignore[list-item]
        rows = [0] * len(positions)
        for number in np.unique(lanes):
            places = np.flatnonzero(lanes == number)
            found = self.lanes[number].find(draws[places])
            for place, source, row in zip(places.tolist(), *found, strict=True):
                sources[place], rows[place] = source, row
        return self._stream.gather(sources, rows)

    def state(self, position: int) -> dict[str, Any]:
        drawn = self._mix.drawn(position).tolist() if self._mix else [position]
        return {"lanes": [list(lane.state(draw)) for lane, draw in zip(self.lanes, drawn, strict=True)]}

    def close(self) -> None:
        self.window.close()


class _Window:
    """The shards on disk: tokenizes what is needed and what comes next, deletes what lies behind."""

    def __init__(self, stream: StreamSet) -> None:
        self._stream = stream
        self._in_use: dict[int, list[Part]] = {}
        self._coming: dict[int, list[Part]] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._failure: BaseException | None = None
        self._busy: set[int] = set()
        self._processes: list[WorkerProcess] = []
        self._threads: list[threading.Thread] = []

    def open(self, lane: int, parts: Sequence[Part], coming: Sequence[Part]) -> list[PackedSource]:
        """Rows of `parts` of a lane, waiting until they are tokenized; `coming` will be asked for next.

        Raises:
            UserError: a bad row.
        """
        with self._changed:
            behind = self._in_use.get(lane, [])
            self._in_use[lane], self._coming[lane] = list(parts), list(coming)
            self._changed.notify_all()
        self._start()
        counts: Counter[str] = Counter()
        rows: list[PackedSource] = []
        for part in parts:
            while True:
                self._wait_for(part)
                try:
                    rows.append(self._stream.open(part, counts))
                    break
                except FileNotFoundError:  # another rank was a group ahead and deleted it: it is tokenized again
                    continue
        kept = {part.number for wanted in (*self._in_use.values(), *self._coming.values()) for part in wanted}
        for part in behind:
            if part.number not in kept:
                self._stream.delete(part)
        return rows

    def _wait_for(self, part: Part) -> None:
        while not part.done(self._stream.folder):
            if self._failure is not None:
                raise self._failure
            if self._stopping:
                raise RuntimeError("the stream was closed while a part was awaited")
            time.sleep(POLL_SECONDS)

    def _start(self) -> None:
        if not self._threads and not self._stopping:
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's; together they use each core once
            cores_of_rank = cores() // ranks if self._stream.workers is None else self._stream.workers
            for _ in range(max(1, cores_of_rank)):
                process = WorkerProcess(self._stream.folder, shared=True)
                thread = threading.Thread(target=self._serve, args=(process,), name="trainwright-stream", daemon=True)
                self._processes.append(process)
                self._threads.append(thread)
                thread.start()

    def _serve(self, process: WorkerProcess) -> None:
        """Has the next missing part tokenized, again and again."""
        try:
            while (part := self._next()) is not None:
                process.tokenize(part, lambda _: None)
                with self._changed:
                    self._busy.discard(part.number)
                if not part.done(self._stream.folder):  # another rank's process is at it
                    time.sleep(POLL_SECONDS)
        except BaseException as error:
            if not self._stopping:
                self._failure = self._failure or error

    def _next(self) -> Part | None:
        """The first part that is missing and that none of our processes is at; waits for one. None at the end."""
        with self._changed:
            while not self._stopping:
                for part in self._wanted():
                    if part.number not in self._busy and not part.done(self._stream.folder):
                        self._busy.add(part.number)
                        return part
                self._changed.wait(timeout=1.0)
        return None

    def _wanted(self) -> Iterator[Part]:
        for lane in self._in_use.values():
            yield from lane
        for lane in self._coming.values():
            yield from lane

    def close(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for process in self._processes:
            process.kill()
        for thread in self._threads:
            thread.join()
