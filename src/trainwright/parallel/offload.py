"""Activations in host memory between forward and backward, copied while the device computes.

Owns which tensors travel, the two copy streams and the order of their return: when a layer's backward pass begins, the
tensors of the layer before it are already on their way. With full recompute what travels is each layer's input, which
is how rows of a million tokens fit. Weights stay where they are; optimizer states in host memory are `shard.py`'s.

All device memory is the computing stream's, so that torch's allocator can lend it again at once: what was sent is let
go when that stream waits for its copy, one travelling layer later, and what returns is written by the copy stream into
memory that the computing stream took. Memory that two streams share (`record_stream`) would stay taken until the host
happens to look.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from trainwright.parallel.local import own_part
from trainwright.parallel.split import away_layers

MIN_BYTES = 2**16
"""Smaller tensors stay: their copies cost more than their room."""


def apply_offload(layers: Iterable[nn.Module], device: torch.device, share: float = 1.0) -> Host:
    """Makes this share of the layers, evenly spread, keep what their backward pass needs in host memory, in place.

    The last layer's backward pass comes at once, so it never does. Call it after recompute was applied, so that it sees
    what is kept.
    """
    host = Host(device)
    layers = list(layers)
    away = [layers[number] for number in away_layers(len(layers), share)]
    for number, layer in enumerate(away):
        layer.forward = _Away(layer, layer.forward, host, first=number == 0)
    if away:
        layers[-1].forward = _Last(layers[-1].forward, host)
    return host


class _Away:
    """A layer's forward whose saved tensors travel."""

    def __init__(self, layer: nn.Module, inner: Any, host: Host, *, first: bool) -> None:
        self.layer, self.inner, self.host, self.first = layer, inner, host, first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        trip = self.host.begin(self.layer, self.first)
        with torch.autograd.graph.saved_tensors_hooks(trip.pack, trip.unpack):
            return self.inner(*args, **kwargs)


class _Last:
    """The last layer's forward: when its backward pass begins, what the layers before it sent is let go, and the last
    of it called back."""

    def __init__(self, inner: Any, host: Host) -> None:
        self.inner, self.host = inner, host

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.inner(*args, **kwargs)
        stream, latest = result[0], self.host.latest
        if stream.requires_grad and latest is not None:
            stream.register_hook(lambda _: self._turn(latest))
        return result

    def _turn(self, latest: weakref.ref[Trip]) -> None:
        self.host.let_go()
        if (trip := latest()) is not None:
            trip.fetch()


class Host:
    """The two copy streams of a device. On a CPU copies are made where they are, which shows that nothing is lost."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        streams = device.type != "cpu"
        self.out = torch.Stream(device=device) if streams else None
        self.back = torch.Stream(device=device) if streams else None
        self.bytes = 0  # that have travelled
        self.latest: weakref.ref[Trip] | None = None
        self._leaving: deque[Trip] = deque()
        self._regathers: dict[nn.Module, bool] = {}

    def regathers(self, layer: nn.Module) -> bool:
        """Whether a part inside `layer` has its weights gathered on its own."""
        if layer not in self._regathers:
            self._regathers[layer] = any(isinstance(m, FSDPModule) for m in layer.modules() if m is not layer)
        return self._regathers[layer]

    def begin(self, layer: nn.Module, first: bool) -> Trip:
        """The saved tensors of one layer in one forward pass, linked to those of the layer before."""
        self.let_go(all_but=1)
        before = self.latest() if self.latest is not None and not first else None
        trip = Trip(self, layer, before)
        self.latest = weakref.ref(trip)
        self._leaving.append(trip)
        return trip

    def let_go(self, all_but: int = 0) -> None:
        """Lets go what was sent, but for that of the latest layers; the computing stream waits for the copies."""
        while len(self._leaving) > all_but:
            self._leaving.popleft().let_go()


@dataclass
class _Held:
    """One tensor: on the way out, in host memory, on the way back."""

    host: Tensor
    gone: Any = None
    back: Tensor | None = None
    arrived: Any = None

    def wait(self) -> None:
        """The computing stream waits for the copy back. Also where nobody asked for it: its memory is taken again."""
        if self.arrived is not None and self.back is not None:
            torch.accelerator.current_stream(self.back.device).wait_event(self.arrived)
            self.arrived = None

    __del__ = wait


class Trip:
    """What one layer saved in one forward pass."""

    def __init__(self, host: Host, layer: nn.Module, before: Trip | None) -> None:
        self.host, self.layer, self.before = host, layer, before
        self.held: dict[tuple[Any, ...], _Held] = {}
        self.weights: set[int] = set()
        # What was sent stays while it is copied, and while the layer runs: its memory could come again, with another
        # tensor of the same key.
        self.sources: list[Tensor] = []
        self.gone: Any = None  # the last copy out, of one stream that makes them in their order
        self.fetched = False

    def pack(self, tensor: Tensor) -> Any:
        """Sends a tensor away; one that several operations save travels once."""
        if tensor.device.type != self.host.device.type or tensor.nbytes < MIN_BYTES or 0 in tensor.stride():
            return tensor
        if type(tensor) is not Tensor or self._is_weight(tensor):
            return tensor
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor._version)
        key = (*place, tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key not in self.held:
            self.held[key] = self._send(tensor)
            self.sources.append(tensor)
        return self.held[key]

    def _is_weight(self, tensor: Tensor) -> bool:
        """Whether it is a view of a weight, gathered or not. Experts are gathered while the layer runs already."""
        if not self.weights or self.host.regathers(self.layer):
            self.weights = {own_part(p).untyped_storage().data_ptr() for p in self.layer.parameters()}
        return tensor.untyped_storage().data_ptr() in self.weights

    def unpack(self, packed: Any) -> Tensor:
        """Brings it back. The first question calls all of the layer, and all of the layer before it."""
        if not isinstance(packed, _Held):
            return packed
        self.fetch()
        if self.before is not None:
            self.before.fetch()
            self.before = None
        assert packed.back is not None
        packed.wait()
        return packed.back

    def _send(self, tensor: Tensor) -> _Held:
        self.host.bytes += tensor.nbytes
        if self.host.out is None:
            return _Held(tensor.clone())
        there = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self.host.out.wait_stream(torch.accelerator.current_stream(self.host.device))
        with self.host.out:
            there.copy_(tensor, non_blocking=True)
            self.gone = self.host.out.record_event()
        return _Held(there, self.gone)

    def let_go(self) -> None:
        """Frees what was sent, in the computing stream's order."""
        if self.gone is not None:
            torch.accelerator.current_stream(self.host.device).wait_event(self.gone)
        self.sources.clear()

    def fetch(self) -> None:
        """Starts all copies back, once."""
        if self.fetched:
            return
        self.fetched = True
        if self.host.back is None:
            for held in self.held.values():
                held.back = held.host
        else:
            for held in self.held.values():
                held.back = torch.empty_like(held.host, device=self.host.device)
            # Now that memory is taken: what the computing stream had there before is still to be computed.
            self.host.back.wait_stream(torch.accelerator.current_stream(self.host.device))
            for held in self.held.values():
                self._bring(held, self.host.back)
        self.held.clear()

    def _bring(self, held: _Held, stream: torch.Stream) -> None:
        assert held.back is not None
        stream.wait_event(held.gone)
        with stream:
            held.back.copy_(held.host, non_blocking=True)
            held.arrived = stream.record_event()
