"""A plan as a dictionary (for --json, bench rows and the board) and as text for a terminal. No torch.

Owns the words and the rounding; the numbers are `plan.py`'s and `search.py`'s.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.table import Table

from trainwright.planner.hardware import GIB
from trainwright.planner.memory import StageMemory
from trainwright.planner.plan import Change, Plan
from trainwright.planner.search import Candidate, Ranking

WIDTH = 132  # where no terminal says how wide a line may be
SHOWN_STAGES = 6


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything of a plan, in GiB and seconds."""
    job, memory, speed = plan.job, plan.memory, plan.speed
    return {
        "model": {
            "family": job.config.family,
            "parameters": job.config.num_parameters(),
            "trained_parameters": sum(item.numel for item in job.parameters if item.trained),
        },
        "cluster": {
            "gpu": job.cluster.card.name,
            "gpus": job.cluster.gpus,
            "gpus_per_node": job.cluster.gpus_per_node,
            "link_gb_per_second": job.cluster.card.link,
            "node_link_gb_per_second": job.cluster.node_link,
            "memory_gib": job.cluster.card.memory_gib,
        },
        "layout": str(job.layout),
        "micro_batch_size": job.micro_batch,
        "accumulation": job.accumulation,
        "global_batch_size": job.global_batch,
        "fits": plan.fits,
        "memory": {
            "peak_memory_gib": memory.allocated / GIB,
            "reserved_memory_gib": memory.reserved / GIB,
            "needed_gib": memory.needed / GIB,
            "free_gib": memory.free / GIB,
            "capacity_gib": memory.capacity / GIB,
            "context_gib": memory.context / GIB,
            "communicators_gib": memory.communicators / GIB,
            "peak": memory.fullest.peak.name,
            "peak_stage": memory.fullest.stage.index,
            "parts_gib": _gib(memory.fullest.peak.parts),
            "moments_gib": _moments(memory.fullest),
            "stages": [_stage(stage) for stage in memory.stages],
        },
        "speed": {
            "step_seconds": speed.step_seconds,
            "tokens_per_second_per_gpu": speed.tokens_per_second_per_gpu,
            "samples_per_second": speed.samples_per_second,
            "tflops": speed.tflops,
            "mfu": speed.mfu,
            "mfu_causal": speed.mfu_causal,
            "hfu": speed.hfu,
            "parts_seconds": speed.parts,
        },
        "run": {
            "steps": plan.length.steps,
            "tokens": plan.length.tokens,
            "hours": plan.length.hours,
            "gpu_hours": plan.length.gpu_hours,
            "money": plan.length.money,
        },
        "advice": [_change(change) for change in plan.advice],
        "notes": speed.notes,
        "calibration": {"source": job.calibration.source, "measured": job.calibration.measured},
    }


def _moments(stage: StageMemory) -> dict[str, float]:
    """The most of each kind of moment, GiB."""
    found: dict[str, float] = {}
    for moment in stage.moments:
        found[moment.name] = max(found.get(moment.name, 0.0), moment.total / GIB)
    return found


def _stage(memory: StageMemory) -> dict[str, Any]:
    """One rank of a pipeline stage."""
    stage = memory.stage
    return {
        "stage": stage.index,
        "layers": list(stage.layers),
        "in_flight": stage.in_flight,
        "peak": memory.peak.name,
        "peak_memory_gib": memory.peak.total / GIB,
        "parts_gib": _gib(memory.peak.parts),
        "moments_gib": _moments(memory),
    }


def ranking_as_dict(ranking: Ranking) -> dict[str, Any]:
    """The table of a search."""
    return {"tried": ranking.tried, "candidates": [_candidate(item) for item in ranking.candidates]}


def _gib(parts: dict[str, int]) -> dict[str, float]:
    return {name: size / GIB for name, size in sorted(parts.items(), key=lambda pair: -pair[1]) if size}


def _change(change: Change) -> dict[str, Any]:
    words = {"change": change.what, "speed": change.speed, "free_gib": change.free_gib}
    return {**words, "same_result": change.same_result}


def _candidate(item: Candidate) -> dict[str, Any]:
    return {
        **item.words,
        "layout": str(item.job.layout),
        "fits": item.fits,
        "tokens_per_second_per_gpu": item.rate or None,
        "mfu": item.speed.mfu if item.speed else None,
        "needed_gib": item.memory.needed / GIB,
        "why": item.why,
    }


# ---- for a terminal


def a_console() -> Console:
    """As wide as the terminal; where there is none, wide enough for a table."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """The whole plan: memory, speed, the run, advice."""
    console = console or a_console()
    job = plan.job
    parameters = job.config.num_parameters()
    trained = sum(item.numel for item in job.parameters if item.trained)
    some = f", {trained:,} trained" if trained != parameters else ""
    console.print(f"[bold]{plan.recipe.name}[/bold]: {parameters:,} parameters{some}, on {job.cluster}")
    console.print(
        f"{job.layout}, ZeRO {job.layout.zero}, recompute {job.recompute}; a step is {job.global_batch} rows of "
        f"{job.seq_len:,} tokens: {job.micro_batch} a micro batch x {job.accumulation} accumulated x "
        f"{job.layout.data_ranks} data ranks"
    )
    tables = Table.grid(padding=(0, 6))
    tables.add_row(_memory_table(plan), _speed_table(plan))
    console.print(tables)
    if len(plan.memory.stages) > 1:
        console.print(_stage_table(plan))
    console.print(_verdict(plan))
    console.print(_run_line(plan))
    if plan.advice:
        console.print("What makes it fit:")
        console.print(_advice_table(plan.advice))
    elif not plan.fits:
        console.print("No single change and no pair of changes makes it fit: try [bold]--search[/bold] or more GPUs.")
    for note in plan.speed.notes:
        console.print(f"[yellow]{note}[/yellow]")
    kind = "measured" if job.calibration.measured else "not measured on this card"
    console.print(f"[dim]efficiencies: {kind}; {job.calibration.source}[/dim]")


def _unit(plan: Plan) -> tuple[str, int]:
    """GiB, or MiB for what is small."""
    return ("GiB", GIB) if plan.memory.allocated >= GIB else ("MiB", 2**20)


def _memory_table(plan: Plan) -> Group:
    memory = plan.memory
    peak, (name_of_unit, unit) = memory.fullest.peak, _unit(plan)
    stage = f" of stage {memory.fullest.stage.index}" if len(memory.stages) > 1 else ""
    title = f"a GPU's memory, fullest at: {peak.name}{stage}"
    table = Table("memory", name_of_unit, box=None, header_style="bold", title=title)
    table.columns[1].justify = "right"
    for name, size in sorted(peak.parts.items(), key=lambda pair: -pair[1]):
        if size:
            table.add_row(name, f"{size / unit:.2f}")
    table.add_section()
    table.add_row("allocated", f"{memory.allocated / unit:.2f}", style="bold")
    table.add_row("reserved by the allocator", f"{memory.reserved / unit:.2f}")
    table.add_row("driver and kernels", f"{memory.context / unit:.2f}")
    if memory.communicators:
        table.add_row("NCCL", f"{memory.communicators / unit:.2f}")
    moments = ", ".join(f"{name} {size * GIB / unit:.1f}" for name, size in _moments(memory.fullest).items())
    return Group(table, f"[dim]{moments}[/dim]")


def _stage_table(plan: Plan) -> Table:
    """Every part of some stages' ranks at their own peaks: both ends, the fullest, and some between."""
    stages = plan.memory.stages
    chosen = {0, len(stages) - 1, plan.memory.fullest.stage.index}
    step = max(1, len(stages) // SHOWN_STAGES)
    for index in range(step, len(stages), step):
        if len(chosen) < SHOWN_STAGES:
            chosen.add(index)
    shown = [stages[index] for index in sorted(chosen)]
    heads = [f"stage {item.stage.index}" for item in shown]
    name_of_unit, unit = _unit(plan)
    title = (
        f"a rank of each stage, {name_of_unit}"
        if len(shown) == len(stages)
        else f"a rank of some stages, {name_of_unit}"
    )
    table = Table("", *heads, box=None, header_style="bold", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("layers", *(str(len(item.stage.layers)) for item in shown))
    table.add_row("micro batches in flight", *(f"{item.stage.in_flight:g}" for item in shown))
    table.add_row("fullest at", *(item.peak.name for item in shown))
    names = dict.fromkeys(name for item in shown for name in item.peak.parts)
    for name in sorted(names, key=lambda name: -max(item.peak.parts.get(name, 0) for item in shown)):
        sizes = [item.peak.parts.get(name, 0) for item in shown]
        table.add_row(name, *(f"{size / unit:.2f}" if size else "" for size in sizes))
    table.add_section()
    table.add_row("allocated", *(f"{item.peak.total / unit:.2f}" for item in shown), style="bold")
    return table


def _speed_table(plan: Plan) -> Table:
    speed = plan.speed
    table = Table("speed", "", box=None, header_style="bold", title="one optimizer step")
    table.columns[1].justify = "right"
    table.add_row("tokens/s/GPU", f"{speed.tokens_per_second_per_gpu:,.0f}", style="bold")
    table.add_row("step", f"{speed.step_seconds:.3g} s")
    table.add_row("samples/s", f"{speed.samples_per_second:.3g}")
    table.add_row("MFU (PaLM)", f"{speed.mfu:.1%}")
    table.add_row("MFU (causal), HFU", f"{speed.mfu_causal:.1%}, {speed.hfu:.1%}")
    table.add_section()
    for name, seconds in sorted(speed.parts.items(), key=lambda pair: -pair[1]):
        if seconds > 0.001 * speed.step_seconds:
            table.add_row(name, f"{seconds / speed.step_seconds:.1%}")
    return table


def _verdict(plan: Plan) -> str:
    memory = plan.memory
    needed, capacity = memory.needed / GIB, memory.capacity / GIB
    if plan.fits:
        return f"[green]fits[/green]: needs {needed:.1f} of {capacity:.1f} GiB, {memory.free / GIB:.1f} to spare"
    return (
        f"[red]does not fit[/red]: needs {needed:.1f} GiB, the card has {capacity:.1f}: {needed - capacity:.1f} short"
    )


def _run_line(plan: Plan) -> str:
    length = plan.length
    if length.steps is None or length.hours is None or length.tokens is None:
        return "the recipe counts epochs: say --rows to know the length of the run"
    cost = f", costs {length.money:,.2f} at {plan.price:g} a GPU hour" if length.money is not None else ""
    return (
        f"the run: {length.steps:,} steps, {length.tokens:,} tokens, {_duration(length.hours)}, "
        f"{length.gpu_hours:,.1f} GPU hours{cost}"
    )


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} seconds"
    if hours < 1:
        return f"{hours * 60:.0f} minutes"
    return f"{hours:,.1f} hours" if hours < 72 else f"{hours / 24:,.1f} days"


def _advice_table(changes: list[Change]) -> Table:
    table = Table("change", "speed", "GiB free", "", box=None, header_style="bold", padding=(0, 2))
    for change in changes:
        speed = f"{change.speed - 1:+.0%}"
        table.add_row(change.what, speed, f"{change.free_gib:.1f}", "" if change.same_result else "another result")
    return table


def print_ranking(ranking: Ranking, console: Console | None = None) -> None:
    """The table of a search, best first."""
    console = console or a_console()
    columns = ("", "layout", "micro batch", "recompute", "tokens/s/GPU", "MFU", "GiB", "why not the best")
    table = Table(*columns, box=None, header_style="bold", padding=(0, 1))
    for column in table.columns[:-1]:
        column.no_wrap = True
    for number, item in enumerate(ranking.candidates, 1):
        rate = f"{item.rate:,.0f}" if item.fits else "[red]does not fit[/red]"
        table.add_row(
            str(number),
            _spelled(item),
            f"{item.job.micro_batch} x {item.job.accumulation}",
            item.job.recompute,
            rate,
            f"{item.speed.mfu:.1%}" if item.speed else "",
            f"{item.memory.needed / GIB:.1f}",
            item.why or "[green]the best[/green]",
        )
    console.print(table)
    console.print(f"[dim]{ranking.tried:,} combinations of layout, micro batch and recompute tried[/dim]")


def _spelled(item: Candidate) -> str:
    """A layout with all that tells it from its neighbours: TP8PP16DP128 zbv, TP1PP1DP8 Z3."""
    layout, recipe = item.job.layout, item.recipe
    words = [str(layout)]
    if layout.pp > 1:
        words.append(recipe.parallel.pp_schedule)
    elif layout.data_ranks * layout.cp > 1:
        words.append(f"ZeRO-{layout.zero}")
    if layout.dp_replicate > 1:
        words.append(f"{layout.dp_replicate} copies")
    return " ".join([*words, *([recipe.quantize] if recipe.quantize else [])])
