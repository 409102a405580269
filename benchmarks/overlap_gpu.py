"""Tensor parallelism's products beside its exchanges: milliseconds of one Llama-3-8B layer, by kind of exchange.

    torchrun --nproc-per-node 2 benchmarks/overlap_gpu.py [--tokens 16384]
    torchrun --nproc-per-node 2 benchmarks/overlap_gpu.py --small        the same program on CPU processes, tiny

Forward and backward of q, k, v, o, gate, up and down without what lies between them (attention, norms, activation):
`products` is the same work without any exchange, which is the floor.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.parallel import overlap
from trainwright.parallel.copies import Ring

LAYER = {"hidden": 4096, "queries": 4096, "keys": 1024, "inner": 14336}
SMALL = {"hidden": 64, "queries": 64, "keys": 32, "inner": 128}


class Alone(overlap.Exchange):
    """Nothing travels: a rank multiplies its own rows again in the place of the others'. Wrong sums, the same work."""

    def gather(self, x: Tensor):  # type: ignore[no-untyped-def]
        return x.repeat(self.ranks, 1), iter([slice(None)])

    def scatter(self, rows: int, width: int, like: Tensor, product: overlap.Product) -> Callable[[], Tensor]:
        whole = like.new_empty(self.ranks * rows, width)
        product(slice(None), whole)
        return lambda: whole[:rows].clone()


def one_pass(x: Tensor, inner: Tensor, mixed: Tensor, weights: dict[str, Tensor], group: str) -> None:
    """Both parts of a layer, forward and backward."""
    for first, last, between in ((("q", "k", "v"), "o", mixed), (("gate", "up"), "down", inner)):
        entered = overlap.gather_products_op(x, [weights[name] for name in first], group)
        left = overlap.product_scatter_op(between, weights[last], group)
        torch.autograd.backward([*entered, left], [one.detach() for one in (*entered, left)])
    for leaf in (x, inner, mixed, *weights.values()):
        leaf.grad = None


def milliseconds(work: Callable[[], None], times: int, wait: Callable[[], None]) -> float:
    for _ in range(3):
        work()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - began) / times * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="of all ranks")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    device = torch.device("cpu" if options.small else f"cuda:{os.environ['LOCAL_RANK']}")
    if not options.small:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if options.small else "nccl")
    group, ranks = dist.group.WORLD, dist.get_world_size()
    assert group is not None
    size, tokens = (SMALL, 64) if options.small else (LAYER, options.tokens)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) * 0.02).bfloat16().requires_grad_()

    wide, keys = size["queries"] // ranks, size["keys"] // ranks
    inner = size["inner"] // ranks
    weights = {name: random(out, size["hidden"]) for name, out in
               {"q": wide, "k": keys, "v": keys, "gate": inner, "up": inner}.items()}  # fmt: skip
    weights |= {"o": random(size["hidden"], wide), "down": random(size["hidden"], inner)}
    x, mixed, within = random(tokens // ranks, size["hidden"]), random(tokens, wide), random(tokens, inner)
    kinds = {"products": Alone(group), "collectives": overlap.Exchange(group)}
    if not options.small:
        kinds["copy engines"] = overlap.CopyExchange(Ring(group, 60_000))
    wait = (lambda: None) if options.small else torch.cuda.synchronize
    for name, kind in [*kinds.items(), *kinds.items()]:
        overlap._exchanges[group.group_name] = kind
        spent = milliseconds(
            lambda: one_pass(x, within, mixed, weights, group.group_name), 2 if options.small else 20, wait
        )
        if dist.get_rank() == 0:
            print(f"{name:<14} {spent:8.2f} ms a layer", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
