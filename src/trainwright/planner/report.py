"""A plan as a dictionary (for --json, bench rows and the board) and as text for a terminal. No torch.

Owns the words and the rounding; the numbers are `plan.py`'s and `search.py`'s.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.table import Table

from trainwright.planner.hardware import GIB
from trainwright.planner.plan import Change, Plan
from trainwright.planner.search import Candidate, Ranking


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
            "moments_gib": {moment.name: moment.total / GIB for moment in memory.fullest.moments},
            "stages_gib": [stage.peak.total / GIB for stage in memory.stages],
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
        "calibration": {"source": job.calibration.source, "measured": job.calibration.measured},
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


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """The whole plan: memory, speed, the run, advice."""
    console = console or Console(highlight=False)
    job = plan.job
    parameters = job.config.num_parameters()
    trained = sum(item.numel for item in job.parameters if item.trained)
    some = f", {trained:,} trained" if trained != parameters else ""
    console.print(
        f"[bold]{plan.recipe.name}[/bold]: {parameters:,} parameters{some}; {job.layout}, "
        f"{job.micro_batch} x {job.seq_len} tokens x {job.accumulation} accumulated = {job.global_batch} rows a step, "
        f"recompute {job.recompute}, on {job.cluster}"
    )
    tables = Table.grid(padding=(0, 6))
    tables.add_row(_memory_table(plan), _speed_table(plan))
    console.print(tables)
    console.print(_verdict(plan))
    console.print(_run_line(plan))
    if plan.advice:
        console.print("What makes it fit:")
        console.print(_advice_table(plan.advice))
    elif not plan.fits:
        console.print("No single change and no pair of changes makes it fit: try [bold]--search[/bold] or more GPUs.")
    kind = "measured" if job.calibration.measured else "not measured here"
    console.print(f"[dim]efficiencies: {kind}; {job.calibration.source}[/dim]")


def _memory_table(plan: Plan) -> Group:
    memory = plan.memory
    peak = memory.fullest.peak
    stage = f" of stage {memory.fullest.stage.index}" if len(memory.stages) > 1 else ""
    table = Table("memory", "GiB", box=None, header_style="bold", title=f"fullest at: {peak.name}{stage}")
    table.columns[1].justify = "right"
    for name, size in _gib(peak.parts).items():
        table.add_row(name, f"{size:.2f}")
    table.add_section()
    table.add_row("allocated", f"{memory.allocated / GIB:.2f}", style="bold")
    table.add_row("reserved by the allocator", f"{memory.reserved / GIB:.2f}")
    table.add_row("driver and kernels", f"{memory.context / GIB:.2f}")
    if memory.communicators:
        table.add_row("NCCL", f"{memory.communicators / GIB:.2f}")
    others = ", ".join(f"{moment.name} {moment.total / GIB:.1f}" for moment in memory.fullest.moments)
    lines: list[Any] = [table, f"[dim]moments: {others}[/dim]"]
    if len(memory.stages) > 1:
        stages = " ".join(f"{item.peak.total / GIB:.1f}" for item in memory.stages)
        lines.append(f"[dim]stages: {stages}[/dim]")
    return Group(*lines)


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
    cost = f", {length.money:,.2f} at {plan.price:g} a GPU hour" if length.money is not None else ""
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
    console = console or Console(highlight=False)
    columns = ("", "layout", "zero", "micro batch", "recompute", "tokens/s/GPU", "MFU", "GiB", "why not the best")
    table = Table(*columns, box=None, header_style="bold", padding=(0, 1))
    for number, item in enumerate(ranking.candidates, 1):
        rate = f"{item.rate:,.0f}" if item.fits else "[red]does not fit[/red]"
        mfu = f"{item.speed.mfu:.1%}" if item.speed else ""
        bits = f" {item.recipe.quantize}" if item.recipe.quantize else ""
        schedule = f" {item.recipe.parallel.pp_schedule}" if item.job.layout.pp > 1 else ""
        replicas = f" x{item.job.layout.dp_replicate}" if item.job.layout.dp_replicate > 1 else ""
        table.add_row(
            str(number),
            f"{item.job.layout}{replicas}{schedule}{bits}",
            str(item.job.layout.zero),
            f"{item.job.micro_batch} x {item.job.accumulation}",
            item.job.recompute,
            rate,
            mfu,
            f"{item.memory.needed / GIB:.1f}",
            item.why or "[green]the best[/green]",
        )
    console.print(table)
    console.print(f"[dim]{ranking.tried} tried[/dim]")
