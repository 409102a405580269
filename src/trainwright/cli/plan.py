"""`trainwright plan`: memory, speed and cost of a run before it runs. No GPU, no torch."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trainwright.cli.options import Json, Overrides, RecipeName, check_new_recipe, finite


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option(help="a card: H200, A100-40, RTX 3090, cpu ...; default: this machine's")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="how many, all machines together")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="cards in one machine; default: 8")] = None,
    link: Annotated[
        float | None, typer.Option(help="GB/s between two cards of a machine; default: the card's own links")
    ] = None,
    node_link: Annotated[
        float | None, typer.Option(help="GB/s out of one machine, all its network cards together; default: 400")
    ] = None,
    memory_gib: Annotated[float | None, typer.Option(help="act as a card with this much memory")] = None,
    price: Annotated[float | None, typer.Option(callback=finite, min=0, max=1e9, help="money for one GPU hour")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="rows of the data, for recipes that count epochs")] = None,
    search: Annotated[bool, typer.Option("--search", help="rank all layouts, micro batches, recomputation")] = False,
    keep: Annotated[int, typer.Option(min=1, help="rows of the table that --search prints")] = 20,
    write: Annotated[Path | None, typer.Option(help="write the best layout of --search as a recipe")] = None,
    as_json: Json = False,
) -> None:
    """Does it fit, how fast is it, how long does it take, what does it cost. Exit status 1 when it does not fit."""
    from trainwright.errors import UserError
    from trainwright.planner import report
    from trainwright.planner.hardware import cluster_of, this_machine
    from trainwright.planner.plan import plan as make_plan
    from trainwright.recipe.load import load_recipe

    if write is not None and not search:
        raise UserError("--write writes what --search finds best: say both")
    if write is not None:
        check_new_recipe(write)
    asked = load_recipe(recipe, overrides or ())
    links: dict[str, Any] = {"gpus_per_node": gpus_per_node, "link": link, "node_link": node_link}
    if gpu:
        cluster = cluster_of(gpu, gpus, memory_gib=memory_gib, **links)
    else:
        cluster = this_machine(gpus, memory_gib, **links)
    if not search:
        made = make_plan(asked, cluster, price=price, rows=rows)
        if as_json:
            print(json.dumps(report.as_dict(made)))
        else:
            report.print_plan(made)
        sys.exit(0 if made.fits else 1)
    from trainwright.planner.search import search as rank

    ranking = rank(asked, cluster, keep=keep)
    best = ranking.best
    if as_json:
        print(json.dumps(report.ranking_as_dict(ranking)))
    else:
        report.print_ranking(ranking)
        if best:
            report.print_plan(best.as_plan(price, rows))
    if best is None:
        sys.exit(1)
    if write is not None:
        from trainwright.recipe.show import to_yaml
        from trainwright.store import write_text

        write_text(write, to_yaml(best.recipe))
        print(f"wrote {write}; train it with: trainwright train {write} --gpus {cluster.gpus}", file=sys.stderr)
