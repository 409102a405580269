"""Runs the cells of a matrix, in order or side by side, keeps what each came to, and never runs one twice.

    FOLDER/results.json      every row; written anew after each cell          FOLDER/table.md .csv, *.png, index.html
    FOLDER/cells/KEY/        one cell: recipe.yaml, cell.json, log.txt, run/, row.json once it is finished
    FOLDER/compile-cache/    what torch.compile made, for the cells that follow

Owns the order, resuming and the folder. What a process does is `work.py`'s, a row's figures are `result.py`'s.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from threading import Condition
from typing import Any, Protocol

from trainwright import __version__
from trainwright.bench.align import align
from trainwright.bench.cell import Cell, choose, here, need_more_gpus
from trainwright.bench.find import What, find_limit
from trainwright.bench.processes import Warm
from trainwright.bench.result import Row, describe, row_of
from trainwright.errors import UserError
from trainwright.recipe.show import to_yaml
from trainwright.store import read_json, write_json, write_text
from trainwright.train.metrics import read_lines

RUN = ("ok", "oom", "crashed", "timeout")  # statuses of a cell that is not run again


class Display(Protocol):
    """Who shows what goes on (`screen.py`)."""

    def begin(self, cell: Cell) -> None: ...

    def progress(self, cell: Cell, line: dict[str, Any] | None) -> None: ...

    def done(self, row: Row, *, kept: bool) -> None: ...


class Runner:
    """Cells to rows, in `folder`. A context: leaving it ends whatever runs."""

    def __init__(self, folder: Path, display: Display, *, again: bool = False, side_by_side: bool = False) -> None:
        self.folder, self.display, self.again = folder.absolute(), display, again
        machine = here()
        self.device = machine.card.name
        self.gpus = 0 if self.device == "CPU" else machine.gpus
        self.places = Places(self.gpus or os.cpu_count() or 1) if side_by_side else None
        self.warm: dict[tuple[int, ...], Warm] = {}  # one warm process for each set of devices
        self.closed = False
        earlier = read_json(self.folder / "results.json") or {}
        self.earlier: dict[str, Row] = {row["key"]: row for row in earlier.get("rows", ()) if "key" in row}

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends whatever runs; it leaves no row."""
        self.closed = True
        for warm in list(self.warm.values()):
            warm.close()

    def measure(self, cell: Cell, devices: tuple[int, ...] = ()) -> Row:
        """The row of a cell: as it was kept, or from a run now on `devices` (all of the machine's where none)."""
        kept = None if self.again else self.kept(cell)
        if kept is not None:
            self.display.done(kept, kept=True)
            return kept
        if self.closed:
            raise KeyboardInterrupt
        self.display.begin(cell)
        row = self._run(cell, devices)
        self.display.done(row, kept=False)
        return row

    def place(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.key(self.device)

    def kept(self, cell: Cell) -> Row | None:
        """The row of a cell that ran before; its name and note are those of today.

        results.json alone is enough, so that it can be carried from machine to machine.
        """
        row = read_json(self.place(cell) / "row.json") or self.earlier.get(cell.key(self.device))
        if row is None or row["status"] not in RUN or row.get("find"):
            return None
        today = {key: describe(cell)[key] for key in ("name", "note", "set")}
        return {**{key: value for key, value in row.items() if key != "beside"}, **today}

    def _run(self, cell: Cell, devices: tuple[int, ...]) -> Row:
        missing = need_more_gpus(cell, self.gpus)
        if missing is not None:
            return {**describe(cell), "status": "refused", "line": missing, "key": cell.key(self.device)}
        folder = self.place(cell)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_text(folder / "recipe.yaml", to_yaml(cell.recipe.model_copy(update={"output": str(folder)})))
        write_json(folder / "cell.json", {"name": cell.name, "gpus": cell.gpus, "memory_gib": cell.setting.memory_gib})
        metrics = folder / "run" / "metrics.jsonl"

        def waiting() -> None:
            lines = read_lines(metrics)
            self.display.progress(cell, lines[-1] if lines else None)

        if devices not in self.warm:
            self.warm[devices] = Warm(environment(self.folder, devices if self.gpus else ()))
        ended = self.warm[devices].run(folder, cell.gpus, cell.setting.time_limit_seconds, waiting)
        if self.closed:  # nothing that the cell did: it was ended
            raise KeyboardInterrupt
        row = {**row_of(cell, folder, ended), "key": folder.name}
        write_json(folder / "row.json", row)
        return row


class Places:
    """The devices of a machine, or a processor's cores, handed to cells that run side by side."""

    def __init__(self, count: int) -> None:
        self.count, self._free, self._changed = count, set(range(count)), Condition()

    def take(self, count: int) -> tuple[int, ...]:
        """The first `count` that are free (all, if there are fewer than that), once they are."""
        count = min(count, self.count)
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) >= count)
            taken = tuple(sorted(self._free)[:count])
            self._free -= set(taken)
        return taken

    def give_back(self, taken: tuple[int, ...], _: object = None) -> None:
        with self._changed:
            self._free |= set(taken)
            self._changed.notify_all()


def environment(folder: Path, devices: tuple[int, ...] = ()) -> dict[str, str]:
    """What cells find in their environment: a shared cache of compiled layers, and no rank of anybody's.

    `devices`: the only ones that they see, by their place among those that this process sees.
    """
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if devices:
        seen = [name for name in kept.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(seen[index] if seen else str(index) for index in devices)
    kept.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "compile-cache"))
    kept.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU starts no driver
    return kept


def run_cells(
    runner: Runner,
    cells: Sequence[Cell],
    title: str,
    *,
    only: str | None = None,
    find: What | None = None,
    beside: Callable[[Cell, Row], dict[str, Any] | None] = lambda cell, row: None,
    **more: Any,
) -> dict[str, Any]:
    """All rows, as results.json holds them; the file is written anew after each cell.

    `only`: run what this pattern matches; of the others, what is kept stays. `beside`: what stands beside a row.
    """
    chosen = choose(cells, only)
    names = {cell.name for cell in chosen}
    found = {cell.name: runner.kept(cell) for cell in cells if find is None and cell.name not in names}
    results: dict[str, Any] = {}
    for name, measured in rows_of(runner, chosen, find):
        found[name] = measured
        there = [(each, row) for each in cells if (row := found.get(each.name)) is not None]
        rows = [_beside(row, beside(each, row)) for each, row in aligned(there, runner)]
        results = _results(title, rows, **more)
        write_json(runner.folder / "results.json", results)
    return results


def rows_of(runner: Runner, cells: Sequence[Cell], find: What | None) -> Iterator[tuple[str, Row]]:
    """(name, row) of each cell when it is there: one cell after another or, where the runner has places, as many at
    once as find one. They begin in their order, so that a cell of all devices is not passed by for ever.
    """

    def row(cell: Cell, devices: tuple[int, ...] = ()) -> Row:
        def measure(each: Cell) -> Row:
            return runner.measure(each, devices)

        return measure(cell) if find is None else find_limit(cell, find, measure)

    if runner.places is None:
        yield from ((cell.name, row(cell)) for cell in cells)
        return
    places, running = runner.places, dict[Future[Row], Cell]()
    with ThreadPoolExecutor(places.count) as threads:
        try:
            for cell in cells:
                while runner.place(cell) in map(runner.place, running.values()):  # the same under another name
                    yield from _done(running, timeout=None)
                devices = places.take(cell.gpus)
                future = threads.submit(row, cell, devices)
                future.add_done_callback(partial(places.give_back, devices))
                running[future] = cell
                yield from _done(running, timeout=0)
            while running:
                yield from _done(running, timeout=None)
        except BaseException:  # before the threads are waited for
            runner.close()
            raise


def _done(running: dict[Future[Row], Cell], timeout: float | None) -> Iterator[tuple[str, Row]]:
    """Those that are finished, taken out of `running`; None waits until one is."""
    for future in wait(running, timeout, FIRST_COMPLETED).done:
        yield running.pop(future).name, future.result()


def _beside(row: Row, stands: dict[str, Any] | None) -> Row:
    return row if stands is None else {**row, "beside": stands}


def _results(title: str, rows: Sequence[Row], **more: Any) -> dict[str, Any]:
    devices = sorted({str(row["device"]) for row in rows if row.get("device")})
    return {"title": title, "trainwright": __version__, "devices": devices, **more, "rows": list(rows)}


def aligned(rows: Sequence[tuple[Cell, Row]], runner: Runner) -> list[tuple[Cell, Row]]:
    """The rows, with the verdict on the losses of those that must follow others.

    From step 21 on, as seed 004 does it; of runs of 40 steps or fewer, from the first measured step on.
    """
    places = {cell.name: runner.place(cell) / "run" for cell, _ in rows}
    result = []
    for cell, row in rows:
        other = cell.setting.align_with
        reference = places.get(other or "") or Path(other or "")
        if other is not None and row["status"] == "ok" and reference.exists() and places[cell.name].exists():
            first = 21 if cell.steps > 40 else cell.setting.warmup_steps + 1
            try:
                found = align(places[cell.name], reference, from_step=first)
                row = {**row, "aligned": found.aligned, "alignment": {**found.as_dict(), "with": other}}
            except UserError as error:
                row = {**row, "aligned": None, "alignment": {"with": other, "line": str(error)}}
        result.append((cell, row))
    return result
