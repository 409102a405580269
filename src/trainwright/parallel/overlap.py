"""Tensor parallelism's products and exchanges at the same time: while one piece is multiplied, the next one travels.

A part of a layer (attention, MLP) begins with products of gathered tokens and ends with a product whose ranks' sum is
scattered. Both are operations of their own here, and each is the other's backward pass:

    gather_products   y_i = gather(x) W_i^T           backward: x's gradient is scattered, its weights' need gather(x)
    product_scatter   y = scatter(sum of a W^T)       backward: y's gradient is gathered

Where ranks read each other's memory (GPUs of one machine) the copy engines pull the pieces over NVLink, and no
multiprocessor waits or copies: one meeting of the ranks an exchange. Elsewhere the same operations use plain
collectives, one after the other. The whole of x is not kept: it is gathered again beside the products of the backward
pass. The idea is Wang et al. 2022 (ASPLOS, "Overlap communication with dependent computation via decomposition"),
torch has it for pairs of one product and one collective (`_micro_pipeline_tp`); here the sum of several products
(q, k, v; gate, up) travels as one.
"""

# No `from __future__ import annotations`: torch reads the operations' schemas from these annotations.
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import custom_op

from trainwright.model.attention import Attention
from trainwright.model.ffn import Mlp
from trainwright.model.linear import Linear
from trainwright.parallel.collectives import sum_partial
from trainwright.parallel.copies import Ring, can_copy, unshared
from trainwright.parallel.local import View
from trainwright.parallel.mesh import World

Product = Callable[[slice, Tensor], None]
"""Writes the product of these rows, [rows, O]."""

_functional = torch.ops._c10d_functional


class Exchange:
    """Gathers and sums of rows over a group, by its collectives: one piece, all rows."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks = group, group.size()

    def gather(self, x: Tensor) -> tuple[Tensor, Iterator[slice]]:
        """The ranks' x [M, H], [ranks M, H], and its rows piece by piece, as they come; complete after the last."""
        whole = _functional.all_gather_into_tensor(x.contiguous(), self.ranks, self.group.group_name)
        return _functional.wait_tensor(whole), iter([slice(None)])

    def scatter(self, rows: int, width: int, like: Tensor, product: Product) -> Callable[[], Tensor]:
        """Makes this rank's [ranks x rows, width] by `product`; -> what waits for the ranks' sum of its own rows."""
        whole = like.new_empty(self.ranks * rows, width)
        product(slice(None), whole)
        own = _functional.reduce_scatter_tensor(whole, "sum", self.ranks, self.group.group_name)
        return lambda: _functional.wait_tensor(own)


class CopyExchange(Exchange):
    """The same by copy engines: own rows first in a gather and last in a sum, the peers' in between.

    Two buffers take turns. At a meeting every rank has pulled what it wanted before, so the buffer of the last exchange
    but one is free.
    """

    def __init__(self, ring: Ring) -> None:
        super().__init__(ring.group)
        self.ring, self.rank = ring, ring.group.rank()
        self.copies = torch.cuda.Stream()
        self._last: Tensor | None = None

    def _take(self, rows: int, width: int, like: Tensor) -> Tensor:
        """[ranks x rows x width] that is not the last exchange's."""
        self._last = self.ring.take(self.ranks * rows * width, like.dtype, like.device)
        return self._last

    def _meet(self, buffer: Tensor) -> None:
        torch.cuda.current_stream().wait_stream(self.copies)
        self.ring.meet(buffer, 0)
        self.copies.wait_stream(torch.cuda.current_stream())

    def _rows(self, rank: int, rows: int) -> slice:
        return slice(rank * rows, (rank + 1) * rows)

    def gather(self, x: Tensor) -> tuple[Tensor, Iterator[slice]]:
        (rows, width), arrived = x.shape, []
        buffer = self._take(rows, width, x)
        whole = buffer.view(-1, width)
        whole[self._rows(self.rank, rows)].copy_(x)
        self._meet(buffer)
        with torch.cuda.stream(self.copies):
            for peer in self.ring.peers():
                part = self._rows(peer, rows)
                self.ring.pull(buffer, peer, peer * rows * width, whole[part])
                arrived.append((part, self.copies.record_event()))
        return whole, self._in_turn(self._rows(self.rank, rows), arrived)

    def _in_turn(self, own: slice, arrived: list[tuple[slice, torch.cuda.Event]]) -> Iterator[slice]:
        yield own
        for part, event in arrived:
            torch.cuda.current_stream().wait_event(event)
            yield part

    def scatter(self, rows: int, width: int, like: Tensor, product: Product) -> Callable[[], Tensor]:
        buffer = self._take(rows, width, like)
        whole, parts = buffer.view(-1, width), like.new_empty(self.ranks, rows, width)
        for peer in self.ring.peers():
            product(self._rows(peer, rows), whole[self._rows(peer, rows)])
        self._meet(buffer)
        with torch.cuda.stream(self.copies):
            for place, peer in enumerate(self.ring.peers()):
                self.ring.pull(buffer, peer, self.rank * rows * width, parts[place])
        product(self._rows(self.rank, rows), parts[-1])

        def summed() -> Tensor:
            torch.cuda.current_stream().wait_stream(self.copies)
            return parts[0] + parts[1] if self.ranks == 2 else parts.sum(0)

        return summed


_exchanges: dict[str, Exchange] = {}


def use_exchange(group: dist.ProcessGroup, world: World, timeout_minutes: float) -> str:
    """Chooses what the operations of this group take, and says so: the copy engines where ranks share memory."""
    ring = Ring(group, int(timeout_minutes * 60_000))
    why = unshared([ring], world) if can_copy(group, world.device) else "ranks do not read each other's memory"
    _exchanges[group.group_name] = Exchange(group) if why else CopyExchange(ring)
    return f"async_tp: collectives, one after the other: {why}" if why else "async_tp: copy engines beside products"


# ---- operations ----


@custom_op("trainwright::gather_products", mutates_args=())
def gather_products_op(x: Tensor, weights: list[Tensor], group: str) -> list[Tensor]:
    """x [M, H] of every rank, weights [O, H] of this one -> [ranks M, O] each."""
    whole, pieces = _exchanges[group].gather(x)
    made = [x.new_empty(whole.shape[0], weight.shape[0]) for weight in weights]
    for rows in pieces:
        for y, weight in zip(made, weights, strict=True):
            torch.mm(whole[rows], weight.t(), out=y[rows])
    return made


@gather_products_op.register_fake
def _(x: Tensor, weights: list[Tensor], group: str) -> list[Tensor]:
    return [x.new_empty(x.shape[0] * _exchanges[group].ranks, weight.shape[0]) for weight in weights]


@custom_op("trainwright::gather_products_backward", mutates_args=())
def gather_products_backward_op(
    grads: list[Tensor], x: Tensor, weights: list[Tensor], group: str, trained: list[bool]
) -> list[Tensor]:
    """Gradients of x and of the weights; of those that are not trained, nothing."""
    exchange = _exchanges[group]
    whole, pieces = exchange.gather(x) if any(trained) else (x, iter(()))

    def product(rows: slice, out: Tensor) -> None:
        torch.mm(grads[0][rows], weights[0], out=out)
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            out.addmm_(grad[rows], weight)

    grad_x = exchange.scatter(x.shape[0], x.shape[1], x, product)
    for _ in pieces:
        pass
    made = [grad.t() @ whole if wanted else x.new_empty(0) for grad, wanted in zip(grads, trained, strict=True)]
    return [grad_x(), *made]


@gather_products_backward_op.register_fake
def _(grads: list[Tensor], x: Tensor, weights: list[Tensor], group: str, trained: list[bool]) -> list[Tensor]:
    wanted = [torch.empty_like(w) if needed else x.new_empty(0) for w, needed in zip(weights, trained, strict=True)]
    return [x.new_empty(x.shape), *wanted]


@custom_op("trainwright::product_scatter", mutates_args=())
def product_scatter_op(a: Tensor, weight: Tensor, group: str) -> Tensor:
    """a [ranks M, I] and weight [O, I] of every rank -> this rank's [M, O] of the sum."""
    exchange, out = _exchanges[group], weight.shape[0]

    def product(rows: slice, y: Tensor) -> None:
        torch.mm(a[rows], weight.t(), out=y)

    return exchange.scatter(a.shape[0] // exchange.ranks, out, a, product)()


@product_scatter_op.register_fake
def _(a: Tensor, weight: Tensor, group: str) -> Tensor:
    return a.new_empty(a.shape[0] // _exchanges[group].ranks, weight.shape[0])


@custom_op("trainwright::product_scatter_backward", mutates_args=())
def product_scatter_backward_op(grad: Tensor, a: Tensor, weight: Tensor, group: str, trained: bool) -> list[Tensor]:
    """Gradients of a and of the weight; nothing for one that is not trained."""
    whole, pieces = _exchanges[group].gather(grad)
    grad_a = torch.empty_like(a)
    for rows in pieces:
        torch.mm(whole[rows], weight, out=grad_a[rows])
    return [grad_a, whole.t() @ a if trained else a.new_empty(0)]


@product_scatter_backward_op.register_fake
def _(grad: Tensor, a: Tensor, weight: Tensor, group: str, trained: bool) -> list[Tensor]:
    return [torch.empty_like(a), torch.empty_like(weight) if trained else a.new_empty(0)]


def _keep_gathering(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, ctx.group = inputs
    ctx.save_for_backward(x, *weights)


def _gathering_gradients(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    trained = list(ctx.needs_input_grad[1])
    grad_x, *made = gather_products_backward_op(grads, x, weights, ctx.group, trained)
    return grad_x, [grad if wanted else None for grad, wanted in zip(made, trained, strict=True)], None


def _keep_scattering(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, weight, ctx.group = inputs
    ctx.save_for_backward(a, weight)


def _scattering_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    a, weight = ctx.saved_tensors
    trained = ctx.needs_input_grad[1]
    grad_a, grad_weight = product_scatter_backward_op(grad, a, weight, ctx.group, trained)
    return grad_a, grad_weight if trained else None, None


gather_products_op.register_autograd(_gathering_gradients, setup_context=_keep_gathering)
product_scatter_op.register_autograd(_scattering_gradients, setup_context=_keep_scattering)

KEPT = frozenset({torch.ops.trainwright.gather_products.default, torch.ops.trainwright.product_scatter.default})
"""What selective recomputation keeps of these."""


def kept_cost(args: tuple[Any, ...]) -> tuple[int, float]:
    """(bytes of the results, FLOPs to make them again) of one of `KEPT`."""
    x, weights, ranks = args[0], args[1], _exchanges[args[2]].ranks
    if isinstance(weights, list):
        elements = x.shape[0] * ranks * sum(weight.shape[0] for weight in weights)
        return elements * x.element_size(), 2.0 * elements * x.shape[1]
    elements = x.shape[0] // ranks * weights.shape[0]
    return elements * x.element_size(), 2.0 * elements * ranks * x.shape[1]


# ---- parts of layers ----


class Stream(Protocol):
    """What tensor parallelism knows of the tokens of the pass (`tensor.py`)."""

    group: dist.ProcessGroup
    is_split: bool

    def in_rows(self, x: Tensor) -> Tensor: ...


def overlap_part(part: nn.Module, stream: Stream) -> bool:
    """Lets the first and last products of a part take gather and scatter along; whether this part can.

    Plain layers only: adapters, frozen weights and 8-bit products are operations of their own.
    """
    if isinstance(part, Attention):
        layers, last = [part.q_proj, part.k_proj, part.v_proj], part.o_proj
    elif isinstance(part, Mlp):
        layers, last = [part.gate_proj, part.up_proj] if part.gate_proj else [part.up_proj], part.down_proj
    else:
        return False
    if not all(isinstance(layer, Linear) and layer.float8 is None for layer in (*layers, last)):
        return False
    first, end = cast(list[Any], layers), cast(Any, last)
    first[0].together = _Entrance(tuple(first), stream, isinstance(part, Attention))
    end.product = _Exit(stream)
    if end.bias is not None:  # after the sum now, by every rank on its own tokens
        end._views["bias"] = View(partial=True)
    return True


@dataclass(frozen=True, eq=False)
class _Entrance:
    """What the first of several layers of one input does with the others: own tokens of the stream in, all out."""

    layers: tuple[Linear, ...]
    stream: Stream
    in_rows: bool

    def __call__(self, x: Tensor, others: Sequence[nn.Module]) -> list[Tensor] | None:
        if not self.stream.is_split:
            return None
        weights = [_local(layer, "weight").to(x.dtype) for layer in self.layers]
        made = gather_products_op(x, weights, self.stream.group.group_name)
        biases = [None if layer.bias is None else _local(layer, "bias").to(x.dtype) for layer in self.layers]
        made = [y if bias is None else y + bias for y, bias in zip(made, biases, strict=True)]
        return [self.stream.in_rows(y) for y in made] if self.in_rows else made


@dataclass(frozen=True, eq=False)
class _Exit:
    """The last product of a part: all tokens in, the stream's own of the ranks' sum out."""

    stream: Stream

    def __call__(self, a: Tensor, weight: Tensor) -> Tensor:
        if not self.stream.is_split:
            return sum_partial(F.linear(a, weight), self.stream.group)
        return product_scatter_op(a.flatten(0, -2), weight, self.stream.group.group_name)


def _local(layer: Linear, name: str) -> Tensor:
    """The plain tensor that the layer's own forward would see (`LocalWeights`)."""
    views: Any = layer
    return views._views[name](layer._parameters[name])
