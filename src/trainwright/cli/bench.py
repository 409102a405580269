"""`trainwright bench`: a grid of recipe variations, measured, each cell in processes of its own."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainwright.cli.options import Interrupted, Json, Overrides, finite, print_table
from trainwright.errors import UserError

if TYPE_CHECKING:
    from trainwright.bench.cell import Cell
    from trainwright.bench.matrix import Matrix


def bench(
    matrix: Annotated[str | None, typer.Argument(metavar="MATRIX", help="a shipped name or a file; see --list")] = None,
    overrides: Overrides = None,
    list_all: Annotated[bool, typer.Option("--list", help="the shipped matrices")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="what would run, as the planner sees it")] = False,
    gpu: Annotated[str | None, typer.Option(help="with --dry-run: on this card, such as H200")] = None,
    only: Annotated[str | None, typer.Option(help="rows whose names match this pattern with *")] = None,
    folder: Annotated[Path | None, typer.Option(help="where results go; default: benches/NAME")] = None,
    again: Annotated[bool, typer.Option("--again", help="run finished cells again")] = False,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="cells that need fewer GPUs than there are share the machine")
    ] = False,
    made: Annotated[bool, typer.Option("--made", help="random weights and made tokens instead of files")] = False,
    find: Annotated[
        str | None, typer.Option(help="search max_micro_batch or max_seq_len of every cell by running")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="what stands beside: a published document such as 002, or a results.json")
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option(callback=finite, min=0.001, help="act as a card with this much memory")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="measured steps of every cell")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="steps before them")] = None,
    time_limit: Annotated[
        float | None, typer.Option(callback=finite, min=1, help="seconds after which a cell is ended")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measures a matrix of recipe variations and writes its tables.

    A cell that runs out of memory, crashes or takes too long ends alone and is a result. Finished cells are kept, so
    the same command goes on after Ctrl-C. Exit status 1 when no cell has figures.
    """
    if list_all:
        _list(as_json)
        return
    if matrix is None:
        raise UserError("which matrix? give a file or a shipped name; `trainwright bench --list` has them")
    from trainwright.bench.cell import cells_of, choose
    from trainwright.bench.matrix import find_matrix, read_matrix

    path = find_matrix(matrix)
    asked = read_matrix(path)
    told = {"memory_gib": memory_gib, "measured_steps": steps, "warmup_steps": warmup, "time_limit_seconds": time_limit}
    change: dict[str, Any] = {key: value for key, value in told.items() if value is not None}
    change |= {"made": True} if made else {}
    cells = cells_of(asked, overrides=tuple(overrides or ()), **change)
    beside = _beside(asked, cells, compare)
    where = folder or Path("benches") / (path.stem if find is None else f"{path.stem}-{find}")
    if gpu is not None and not dry_run:
        raise UserError(f"--gpu {gpu} is for --dry-run: cells run on the cards of this machine")
    if dry_run:
        _dry_run(choose(cells, only), where, again, gpu, as_json)
        return
    results = _run(asked, cells, only, where, find, again, side_by_side, beside)
    if as_json:
        print(json.dumps(results))
    if not any(row["status"] in ("ok", "oom") for row in results["rows"]):
        raise typer.Exit(1)


def _run(
    asked: "Matrix",
    cells: "list[Cell]",
    only: str | None,
    where: Path,
    find: str | None,
    again: bool,
    side_by_side: bool,
    beside: "Callable[[Cell, dict[str, Any]], dict[str, Any] | None]",
) -> dict[str, Any]:
    """Everything runs; then the files."""
    from trainwright.bench.cell import choose
    from trainwright.bench.find import check_find
    from trainwright.bench.page import write_all
    from trainwright.bench.runner import Runner, run_cells
    from trainwright.bench.screen import Screen

    total = 0 if find else len(choose(cells, only))
    with Screen(asked.title, total) as screen, Runner(where, screen, again=again, side_by_side=side_by_side) as runner:
        what = check_find(find, cells, runner.gpus)
        signal.signal(signal.SIGTERM, _interrupt)
        counts = _counts(asked)
        try:
            results = run_cells(
                runner,
                cells,
                asked.title,
                only=only,
                find=what,
                beside=beside,
                matrix=asked.model_dump(mode="json"),
                **counts,
            )
        except KeyboardInterrupt:
            runner.close()
            chosen = choose(cells, only)
            finished = sum(runner.kept(cell) is not None for cell in chosen)
            line = f"interrupted with {finished} of {len(chosen)} cells finished; the same command goes on"
            print(f"trainwright: {line}", file=sys.stderr)
            raise Interrupted from None
    files = write_all(where, results)
    print(f"wrote {', '.join(str(file) for file in files)}", file=sys.stderr)
    return results


def _interrupt(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt


def _counts(asked: "Matrix") -> dict[str, Any]:
    """What the figures beside count."""
    if asked.published is None:
        return {}
    from trainwright.bench.compare import document

    found = document(asked.published)
    return {"counts": {"source": f"{found.title} ({found.source}), on {found.gpu}", **found.counts}}


def _beside(
    asked: "Matrix", cells: "list[Cell]", compare: str | None
) -> "Callable[[Cell, dict[str, Any]], dict[str, Any] | None]":
    """Finds what stands beside each cell; raises UserError now for what is not there."""
    from trainwright.bench.compare import against, document, of_published, published_row, read_earlier
    from trainwright.planner.build import model_config

    if compare is not None and Path(compare).exists():
        found = read_earlier(Path(compare))
        if not any(cell.name in found for cell in cells):
            there = ", ".join(list(found)[:3]) or "none"
            raise UserError(f"--compare {compare}: no row there is called like one here: it has {there}")
    else:
        name = compare or asked.published
        if name is not None:
            document(name)
        rows = {cell.name: cell.setting.published or (cell.name if compare else None) for cell in cells}
        found = {cell: of_published(published_row(name, row)) for cell, row in rows.items() if name is not None and row}

    configs = {cell.name: model_config(cell.recipe) for cell in cells if cell.name in found}

    def beside(cell: "Cell", row: dict[str, Any]) -> dict[str, Any] | None:
        theirs = found.get(cell.name)
        return None if theirs is None else against(row, theirs, configs[cell.name])

    return beside


def _list(as_json: bool) -> None:
    """The shipped matrices."""
    from rich.table import Table

    from trainwright.bench.matrix import expand, find_matrix, matrix_names, read_matrix

    rows: list[dict[str, Any]] = []
    for name in matrix_names():
        matrix = read_matrix(find_matrix(name))
        settings = expand(matrix)
        gpus = sorted({setting.gpus for setting in settings})
        rows.append({"name": name, "title": matrix.title, "cells": len(settings), "gpus": gpus})
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("matrix", "cells", "GPUs", "what", box=None, header_style="bold")
    for row in rows:
        table.add_row(row["name"], str(row["cells"]), ", ".join(map(str, row["gpus"])), row["title"])
    print_table(table)


def _dry_run(cells: "list[Cell]", where: Path, again: bool, gpu: str | None, as_json: bool) -> None:
    """What would run, with the planner's memory, speed and time."""
    from trainwright.bench.cell import expected_seconds, here, predict
    from trainwright.bench.result import describe
    from trainwright.bench.runner import Runner
    from trainwright.bench.screen import Screen, rich_table
    from trainwright.bench.table import COLUMNS, Column, gib, significant, yes
    from trainwright.planner.hardware import GIB, cluster_of

    runner, rows = Runner(where, Screen("", len(cells)), again=again), []
    for cell in cells:
        cap = cell.setting.memory_gib
        made = predict(cell, cluster_of(gpu, cell.gpus, memory_gib=cap) if gpu else here(cell.gpus, cap))
        kept = not again and runner.kept(cell) is not None
        row = {**describe(cell), "kept": kept, "expected_seconds": 0.0 if kept else expected_seconds(cell, made)}
        if made is not None:
            row |= {"predicted_memory_gib": made.memory.allocated / GIB, "fits": made.fits, "mfu": made.speed.mfu}
            row |= {"predicted_step_seconds": made.speed.step_seconds}
            row |= {"tokens_per_second_per_gpu": made.speed.tokens_per_second_per_gpu}
        rows.append(row)
    total = sum(row["expected_seconds"] or 0.0 for row in rows)
    if as_json:
        print(json.dumps({"cells": rows, "expected_seconds": total}))
        return
    more = (
        Column("fits", "fits", yes),
        Column("takes s", "expected_seconds", significant(3)),
        Column("kept", "kept", lambda value: "yes" if value else ""),
    )
    hidden = ("result", "model", "task", "precision")
    print_table(rich_table("", rows, [*(each for each in COLUMNS if each.key not in hidden), *more]))
    unknown = sum(row["expected_seconds"] is None for row in rows)
    rest = f"; of {unknown} the planner says nothing" if unknown else ""
    print(f"{len(rows)} cells, about {gib(total / 60)} minutes{rest}")
