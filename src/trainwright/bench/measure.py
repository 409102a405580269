"""What this machine's device really reaches: matrix products, attention, copies, kernel starts, collectives.

Owns the measurements behind `trainwright doctor --measure` and turns them into a `Calibration`, which every later plan
of this card takes. In one process it measures the device; under torchrun also the links between the processes.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainwright.device import default_device, device_name, synchronize
from trainwright.model.kernels import flash4
from trainwright.model.kernels.flash import activate as activate_flash
from trainwright.model.kernels.product import matmul
from trainwright.planner.calibration import AttentionEfficiency, Calibration, load_calibration
from trainwright.planner.hardware import GIGA, Card, Cluster, cpu_card, find_card

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def measure(say: Callable[[str], None] = lambda line: None) -> Calibration:
    """Measures this process's device, and with several processes their links. A minute on a GPU."""
    device = default_device(int(os.environ.get("LOCAL_RANK", 0)))
    card = cpu_card() if device.type == "cpu" else find_card(device_name(device))
    if card is None:  # shares need a peak: without one in the table, shares of 100 TFLOP/s and 1 TB/s
        name = device_name(device)
        card = Card(name, (name.lower(),), 100, 100, None, 20, 16, 1000, 25, switched=False)
    known = load_calibration(card)
    bench = _Bench(device, card)
    say("matrix products")
    matmul = {name: share for name in (*DTYPES, "fp8") if (share := bench.matmul_share(name))}
    found = replace(
        known,
        card=card.name,
        source=f"measured by doctor --measure on {device_name(device)}, torch {torch.__version__}",
        measured=True,
        matmul={**known.matmul, **matmul},
        half_depth=bench.half_depth(),
        half_area=bench.half_area(),
    )
    say("attention")
    found = replace(found, attention={**known.attention, **bench.attention()})
    say("copies and kernel starts")
    found = replace(found, bandwidth=bench.bandwidth_share(), launch=bench.launch_seconds())
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        say("links")
        found = _with_links(found, device, card)
    return found


class _Bench:
    """Median times of single operations on one device."""

    def __init__(self, device: torch.device, card: Card) -> None:
        self.device, self.card = device, card
        small = device.type == "cpu"
        self.side = 1024 if small else 8192
        self.lengths = (256, 1024) if small else (2048, 8192)
        self.heads, self.head_dim = (4, 64) if small else (32, 128)
        self.main = "fp32" if small or card.bf16 is None else "bf16"
        self.settle = 0.0 if small else 2.0

    def seconds(self, action: Callable[[], Any], repeats: int = 7, *, settle: float = 0.0) -> float:
        """Median of some runs after two that warm up.

        settle: seconds of the same work before that, after which a card's power ends its clock, as in a run of hours
        (an H200's products: 0.77 of the peak in a burst, 0.66 in a step).
        """
        times = []
        until = time.perf_counter() + settle
        while time.perf_counter() < until:
            action()
            synchronize(self.device)
        for number in range(repeats + 2):
            synchronize(self.device)
            start = time.perf_counter()
            action()
            synchronize(self.device)
            if number >= 2:
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _product(self, rows: int, depth: int, columns: int, dtype: str) -> float:
        """FLOP/s of one shape."""
        if dtype == "fp8":
            return self._fp8_product(rows, depth, columns)
        a = torch.randn(rows, depth, device=self.device).to(DTYPES[dtype])
        b = torch.randn(depth, columns, device=self.device).to(DTYPES[dtype])
        return 2.0 * rows * depth * columns / self.seconds(lambda: matmul(a, b), settle=self.settle)

    def _fp8_product(self, rows: int, depth: int, columns: int) -> float:
        """The same with a scale a row, as frozen weights in fp8 are multiplied (`model/kernels/quantized.py`)."""
        a = torch.randn(rows, depth, device=self.device).to(torch.float8_e4m3fn)
        b = torch.randn(columns, depth, device=self.device).to(torch.float8_e4m3fn).t()
        one = partial(torch.ones, device=self.device)
        scales: dict[str, Any] = {"scale_a": one(rows, 1), "scale_b": one(1, columns), "out_dtype": torch.bfloat16}
        seconds = self.seconds(lambda: torch._scaled_mm(a, b, **scales), settle=self.settle)
        return 2.0 * rows * depth * columns / seconds

    def matmul_share(self, dtype: str) -> float | None:
        """Share of the peak that a large square product reaches; None where the card, or this torch, has no such
        unit."""
        peak = self.card.peak(dtype)
        slow = self.device.type == "cpu" and dtype != "fp32"
        if peak is None or slow:
            return None
        try:
            return self._product(self.side, self.side, self.side, dtype) / peak
        except RuntimeError:  # torch knows no such product for this device
            if dtype != "fp8":
                raise
            return None

    def half_depth(self) -> float:
        """Depth d at which a product reaches half: share(k) = k / (k + d), from one shallow and one deep product."""
        side = self.side
        shallow = self._product(side, side // 32, side, self.main) / self._product(side, side, side, self.main)
        return _half(side // 32, shallow)

    def half_area(self) -> float:
        """The same for the number of elements of the result."""
        side = self.side
        rows = side // 16
        small = self._product(rows, side, rows, self.main) / self._product(side, side, side, self.main)
        return _half(rows * rows, small)

    def attention(self) -> dict[str, AttentionEfficiency]:
        """Causal attention of each backend at two lengths, forward and backward."""
        found = {}
        activate_flash(self.device)  # as training does
        for name, kernel in self._backends():
            try:
                short, long = (self._attention(length, name, kernel) for length in self.lengths)
            except RuntimeError:  # this device or this torch has no such kernel
                continue
            forward, half = _limit(self.lengths, (short[0], long[0]))
            backward, half_backward = _limit(self.lengths, (short[1], long[1]))
            found[name] = AttentionEfficiency(forward, backward, half, half_backward)
        return found

    def _backends(self) -> Iterator[tuple[str, Callable[[], AbstractContextManager[Any]]]]:
        """(row of the calibration, what makes a context in which torch takes that kernel): one serves once."""
        if self.device.type != "cuda":
            yield "flash", nullcontext
            return
        from torch.nn.attention import SDPBackend, sdpa_kernel

        yield "cudnn", partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)
        yield "flash", partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)

    def _attention(
        self, length: int, name: str, kernel: Callable[[], AbstractContextManager[Any]]
    ) -> tuple[float, float]:
        """Shares of the peak, forward and backward, by the causal count: 2 heads D s^2 and twice that."""
        peak = self.card.peak(self.main) or 1.0
        shape = (1, self.heads, length, self.head_dim)
        q, k, v = (torch.randn(shape, device=self.device).to(DTYPES[self.main]).requires_grad_() for _ in range(3))
        flops = 2.0 * self.heads * self.head_dim * length * length
        newest = name == "flash" and flash4.takes(q)
        with kernel():

            def forward() -> Tensor:
                if newest:
                    q_BSND, k_BSND, v_BSND = (x.transpose(1, 2) for x in (q, k, v))
                    return flash4.rows(q_BSND, k_BSND, v_BSND, self.head_dim**-0.5).transpose(1, 2)
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

            out = forward()
            grad = torch.randn_like(out)
            forward_seconds = self.seconds(forward, settle=self.settle)
            backward = self.seconds(
                lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), settle=self.settle
            )
        return flops / forward_seconds / peak, 2 * flops / backward / peak

    def bandwidth_share(self) -> float:
        """Bytes read and written by a copy, over the datasheet's bandwidth."""
        size = 2**26 if self.device.type == "cpu" else 2**31
        x, y = (torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        return 2 * size / self.seconds(lambda: y.copy_(x)) / (self.card.bandwidth * GIGA)

    def launch_seconds(self, count: int = 500) -> float:
        """Host time of one small kernel."""
        x = torch.zeros(8, device=self.device)

        def many() -> None:
            for _ in range(count):
                x.add_(1)

        return self.seconds(many) / count


def _half(size: float, share: float) -> float:
    """d from share = size / (size + d)."""
    share = min(0.999, max(0.01, share))
    return size * (1 - share) / share


def _limit(lengths: tuple[int, int], shares: tuple[float, float]) -> tuple[float, float]:
    """(limit, half length) of share(s) = limit s / (s + half) through two points."""
    (short, long), (low, high) = lengths, shares
    if high <= low:  # longer rows are no better: no slope to speak of
        return max(low, high), 0.0
    half = short * long * (high - low) / max(low * long - high * short, 1e-9)
    half = min(max(half, 0.0), 1.0 * long)
    return high * (long + half) / long, half


def _with_links(found: Calibration, device: torch.device, card: Card) -> Calibration:
    """With the share of the link that a large all-gather over all processes reaches, and seconds of one of no size."""
    with _group(device):
        world = dist.get_world_size()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        size = (2**22 if device.type == "cpu" else 2**28) // world
        mine = torch.zeros(size, dtype=torch.uint8, device=device)
        whole = torch.empty(size * world, dtype=torch.uint8, device=device)
        bench = _Bench(device, card)
        large = bench.seconds(lambda: dist.all_gather_into_tensor(whole, mine))
        tiny = bench.seconds(lambda: dist.all_gather_into_tensor(whole[: 8 * world], mine[:8]))
        share = size * (world - 1) / max(large - tiny, 1e-9) / (Cluster(card, world, local).link(world) * GIGA)
        if world <= local:
            return replace(found, link=share, latency=tiny)
        return replace(found, node_link=share, latency=tiny)


@contextmanager
def _group(device: torch.device) -> Iterator[None]:
    """A process group of all ranks, for as long as it is needed."""
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo" if device.type == "cpu" else None)
    try:
        yield
    finally:
        if mine:
            dist.destroy_process_group()
