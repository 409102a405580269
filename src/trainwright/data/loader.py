"""Batches for one rank, prefetched, with a state of one number.

Owns which positions of the endless order a rank takes, the thread that reads ahead, and the state that a checkpoint
keeps. Micro batch m takes the positions from m * micro_batch_size * world_size on; rank r has the r-th slice of them.
So the rows of a step, and of a whole run, are the same for any number of ranks, and going on with another number
loses nothing and repeats nothing. The order itself is in order.py.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainwright.data.rows import RowArrays
from trainwright.errors import UserError


class Batch(NamedTuple):
    """A micro batch of one rank: tensors [B, S].

    `labels` (int64) are shifted already: labels[b, t] is what position t must predict, -100 where nothing.
    `position_ids` (int64) start again at each document that is kept apart. `document_ids` (int32) are equal where
    tokens may attend to each other and -1 on padding; None when plain causal attention is what is wanted.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document_ids: Tensor | None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pinned(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        inputs, labels, positions, documents = self
        documents = documents if documents is None else change(documents)
        return Batch(change(inputs), change(labels), change(positions), documents)


class Cursor(Protocol):
    """Reads rows at rising positions of an endless order. `state` is what it needs besides the position to go on."""

    def read(self, positions: NDArray[np.int64]) -> RowArrays: ...

    def state(self, position: int) -> dict[str, Any]: ...

    def close(self) -> None: ...


class RowSource(Protocol):
    """What a loader reads: `rows.RowSet`, or `stream.StreamSet`."""

    fingerprint: str

    def cursor(self, seed: int, shuffle: bool, state: dict[str, Any] | None = None) -> Cursor: ...

    def empty(self, count: int) -> RowArrays: ...

    def __len__(self) -> int: ...


class Loader:
    """An iterator over the micro batches of one rank.

    Args:
        rows: what `prepare` made.
        micro_batch_size: rows in one micro batch of one rank.
        rank, world_size: among the ranks that have different data.
        seed, shuffle: of the order; the same on every rank.
        accumulation: micro batches in one optimizer step.
        epochs: None goes on without end. A number ends after so many passes, in whole steps: the last ones are filled
            with rows of padding, so that all ranks have as many. Each `iter` then starts again.
        prefetch: micro batches that are ready ahead.
        pin_memory: for copies to a device that overlap with its work.
    """

    def __init__(
        self,
        rows: RowSource,
        *,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        accumulation: int = 1,
        epochs: float | None = None,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        self.rows = rows
        self.micro_batch_size, self.rank, self.world_size = micro_batch_size, rank, world_size
        self.seed, self.shuffle, self.accumulation = seed, shuffle, accumulation
        self.rows_per_step = micro_batch_size * world_size * accumulation
        self.consumed_rows = 0
        self.wait_seconds = 0.0
        self._end = None if epochs is None else round(epochs * len(rows))
        self._prefetch, self._pin_memory = prefetch, pin_memory
        self._cursor: Cursor | None = None
        self._cursor_state: dict[str, Any] = {}
        self._thread: _ReadAhead | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that one pass takes, the last maybe with rows of the next pass."""
        return -(-len(self.rows) // self.rows_per_step)

    def __iter__(self) -> Iterator[Batch]:
        if self._end is not None:
            self._restart(0)
        return self

    def __next__(self) -> Batch:
        if self._end is not None and self.consumed_rows >= -(-self._end // self.rows_per_step) * self.rows_per_step:
            raise StopIteration
        if self._thread is None:
            self._cursor = self.rows.cursor(self.seed, self.shuffle, self._cursor_state)
            self._thread = _ReadAhead(self._batches(self._cursor, self.consumed_rows), self._prefetch)
        started = time.perf_counter()
        batch = self._thread.next()
        self.wait_seconds += time.perf_counter() - started
        self.consumed_rows += self.micro_batch_size * self.world_size
        return batch

    def take_wait_seconds(self) -> float:
        """Seconds waited for data since the last call."""
        waited, self.wait_seconds = self.wait_seconds, 0.0
        return waited

    def state_dict(self) -> dict[str, Any]:
        """Where the data stand after the micro batches handed out: rows consumed by all ranks together."""
        if self._cursor is not None:
            self._cursor_state = self._cursor.state(self.consumed_rows)
        state = {"consumed_rows": self.consumed_rows, "seed": self.seed, "fingerprint": self.rows.fingerprint}
        return {**state, "cursor": self._cursor_state} if self._cursor_state else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, at once, on any number of ranks.

        Raises:
            UserError: the data are not those of the state.
        """
        if state["fingerprint"] != self.rows.fingerprint:
            raise UserError(
                f"the data changed since the checkpoint ({state['fingerprint'][:12]} is now "
                f"{self.rows.fingerprint[:12]}): restore the data and the recipe's data keys, or start a new run"
            )
        self.seed = int(state["seed"])
        self._restart(int(state["consumed_rows"]))
        self._cursor_state = dict(state.get("cursor", {}))

    def close(self) -> None:
        """Ends what runs in the background."""
        if self._thread is None or self._cursor is None:
            return
        self._thread.stop()
        self._cursor_state = self._cursor.state(self.consumed_rows)
        self._cursor.close()  # the thread may be waiting for it
        self._thread.join()
        self._thread = self._cursor = None

    def _restart(self, consumed_rows: int) -> None:
        self.close()
        self.consumed_rows = consumed_rows
        self._cursor_state = {}

    def _batches(self, cursor: Cursor, position: int) -> Iterator[Batch]:
        """Micro batches of this rank from `position` of the order on."""
        while True:
            first = position + self.rank * self.micro_batch_size
            yield self._tensors(self._read(cursor, np.arange(first, first + self.micro_batch_size)))
            position += self.micro_batch_size * self.world_size

    def _read(self, cursor: Cursor, positions: NDArray[np.int64]) -> RowArrays:
        if self._end is None or positions[-1] < self._end:
            return cursor.read(positions)
        padding = self.rows.empty(int((positions >= self._end).sum()))
        real = positions[positions < self._end]
        if not len(real):
            return padding
        read = cursor.read(real)
        documents = None
        if read.document_ids is not None and padding.document_ids is not None:
            documents = np.concatenate([read.document_ids, padding.document_ids])
        inputs, labels, places = (np.concatenate(pair) for pair in zip(read[:3], padding[:3], strict=True))
        return RowArrays(inputs, labels, places, documents)

    def _tensors(self, arrays: RowArrays) -> Batch:
        inputs, labels, positions = map(torch.from_numpy, arrays[:3])
        documents = None if arrays.document_ids is None else torch.from_numpy(arrays.document_ids)
        batch = Batch(inputs, labels, positions, documents)
        return batch.pinned() if self._pin_memory else batch


class _ReadAhead:
    """Runs an endless iterator in a thread, a few items ahead."""

    def __init__(self, items: Iterator[Batch], ahead: int) -> None:
        self._items = items
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(max(1, ahead))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trainwright-loader", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def next(self) -> Batch:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        """Has the thread end after the item it works on."""
        self._stop.set()

    def join(self) -> None:
        with contextlib.suppress(queue.Empty):  # a full queue would keep the thread waiting
            while True:
                self._ready.get_nowait()
        self._thread.join()
