"""FSDP's reduction of gradients, with the shards in memory that activations use before and after them.

FSDP makes the sharded gradients on the stream of its reductions, and torch's allocator never gives one stream's memory
to another. They are all there when the optimizer runs; in the next forward pass, where activations need the most, their
memory would lie idle: 4 bytes for each weight of a rank. Here it is the computing stream's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter


class Reduce(DefaultReduceScatter):
    """torch.distributed.fsdp's `ReduceScatter`. FSDP asks for the input on the computing stream, then, on the stream of
    its reductions, which waits for the first, for the output, and then for the sum."""

    def __init__(self) -> None:
        self._has_input = False
        self._computing: torch.cuda.Stream | None = None

    def make_input(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(numel, dtype=dtype, device=device)

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        numel = int(size[0])
        if not self._has_input:
            self._computing = torch.cuda.current_stream(device) if device.type == "cuda" else None
            made = self.make_input(numel, dtype, device)
            self._has_input = True  # not before: there may be no memory
            return made
        self._has_input = False
        if self._computing is None:
            return torch.empty(numel, dtype=dtype, device=device)
        reducing = torch.cuda.current_stream(device)
        with torch.cuda.stream(self._computing):
            output = torch.empty(numel, dtype=dtype, device=device)
        output.record_stream(reducing)  # which may still read it when it is dropped: once added to an earlier sum
        return output
