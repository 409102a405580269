"""What cards can do at best, and how they are joined: makers' datasheets. No torch.

Owns the table of cards (peaks, memory, bandwidth, links) that MFU divides by and that every estimate starts from, and
`Cluster`: so many of one card, in nodes, with stated links. How much of a peak is reached is `calibration.py`'s.

Sources: the maker's datasheet of each card. A100: nvidia-a100-datasheet-us-2188504. H100/H200: the H100 and H200 tensor
core GPU datasheets. RTX 3090/4090: the GA102 and Ada whitepapers (tensor peaks with float32 accumulation). V100, T4,
A10, A30, A40, L4, L40, L40S, A6000, B200: their datasheets. MI250X, MI300X, MI325X: AMD's data sheets. BI-V100 and
BI-V150: Iluvatar's product pages and press (BI-V150: two dies a board, 64 GB HBM2e, 64 GB/s between cards, 192 TFLOPS);
bandwidth and peak are the press's.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from typing import Any

from trainwright.errors import UserError

TERA = 1e12
GIGA = 1e9
GIB = 2**30


@dataclass(frozen=True)
class Card:
    """Dense peaks in TFLOP/s (never the sparse figure), float32 accumulation; None where the card has no such unit.

    `names` are pieces of the device's own name, lower case; all must occur in it. `memory_gib`: what torch reports as
    total memory. `bandwidth`: GB/s of the card's own memory. `link`: GB/s of one card to its peers in the node, one
    direction (NVLink, Infinity Fabric, or PCIe where `switched` is false: then pairs share the host's bus).
    """

    name: str
    names: tuple[str, ...]
    bf16: float | None
    fp16: float | None
    fp8: float | None
    fp32: float
    memory_gib: float
    bandwidth: float
    link: float
    switched: bool = True
    host_link: float = 25.0
    """GB/s to host memory that a pinned copy really gets: 12 on PCIe 3, 25 on 4, 50 on 5 (x16)."""

    def peak(self, dtype: str) -> float | None:
        """Dense peak in FLOP/s for `bf16`, `fp16`, `fp8` or `fp32`; None where the card has no such unit."""
        value: float | None = getattr(self, dtype)
        return None if value is None else value * TERA

    def rate(self, dtype: str) -> float:
        """The same, and the float32 peak where the card has no such unit: libraries then compute in float32."""
        return self.peak(dtype) or self.fp32 * TERA


# The first card whose names all occur in the device's name is taken, so special forms stand before general ones.
CARDS = (
    Card("B200", ("b200",), 2250, 2250, 4500, 75, 178.4, 7700, 900, host_link=50),
    Card("H200 NVL", ("h200", "nvl"), 835.5, 835.5, 1671, 60, 139.8, 4800, 450, host_link=50),
    Card("H200", ("h200",), 989.4, 989.4, 1978.9, 67, 139.8, 4800, 450, host_link=50),
    Card("H100 NVL", ("h100", "nvl"), 835.5, 835.5, 1671, 60, 93.1, 3900, 300, host_link=50),
    Card("H100 PCIe", ("h100", "pcie"), 756, 756, 1513, 51, 79.1, 2000, 50, switched=False, host_link=50),
    Card("H100", ("h100",), 989.4, 989.4, 1978.9, 67, 79.1, 3350, 450, host_link=50),
    Card("H800", ("h800",), 989.4, 989.4, 1978.9, 67, 79.1, 3350, 200, host_link=50),
    Card("H20", ("h20",), 148, 148, 296, 44, 95.6, 4000, 450, host_link=50),
    Card("A100-40", ("a100", "40gb"), 312, 312, None, 19.5, 39.4, 1555, 300),
    Card("A100-80 PCIe", ("a100", "pcie"), 312, 312, None, 19.5, 79.2, 1935, 25, switched=False),
    Card("A100-80", ("a100",), 312, 312, None, 19.5, 79.2, 2039, 300),
    Card("A800", ("a800",), 312, 312, None, 19.5, 79.2, 2039, 200),
    Card("RTX A6000", ("rtx a6000",), 154.8, 154.8, None, 38.7, 47.5, 768, 20, switched=False),
    Card("A40", ("a40",), 149.7, 149.7, None, 37.4, 44.4, 696, 20, switched=False),
    Card("A30", ("a30",), 165, 165, None, 10.3, 23.6, 933, 20, switched=False),
    Card("A10G", ("a10g",), 70, 70, None, 35, 22.1, 600, 20, switched=False),
    Card("A10", ("a10",), 125, 125, None, 31.2, 22.1, 600, 20, switched=False),
    Card("L40S", ("l40s",), 362.05, 362.05, 733, 91.6, 44.4, 864, 20, switched=False),
    Card("L40", ("l40",), 181.05, 181.05, 362, 90.5, 44.4, 864, 20, switched=False),
    Card("L4", ("l4",), 121, 121, 242.5, 30.3, 22.0, 300, 20, switched=False),
    Card("RTX 4090", ("rtx 4090",), 165.2, 165.2, 330.3, 82.6, 23.6, 1008, 20, switched=False),
    Card("RTX 3090 Ti", ("rtx 3090 ti",), 80, 80, None, 40, 23.7, 1008, 20, switched=False),
    Card("RTX 3090", ("rtx 3090",), 71, 71, None, 35.6, 23.7, 936, 20, switched=False),
    Card("V100 PCIe", ("v100", "pcie"), None, 112, None, 14, 31.7, 900, 12, switched=False, host_link=12),
    Card("V100", ("v100",), None, 125, None, 15.7, 31.7, 900, 150, host_link=12),
    Card("T4", ("tesla t4",), None, 65, None, 8.1, 14.6, 320, 12, switched=False, host_link=12),
    Card("MI325X", ("mi325x",), 1307.4, 1307.4, 2614.9, 163.4, 255.9, 6000, 448, host_link=50),
    Card("MI300X", ("mi300x",), 1307.4, 1307.4, 2614.9, 163.4, 191.7, 5300, 448, host_link=50),
    # torch sees each of the two dies as one device
    Card("MI250X", ("mi250x",), 191.5, 191.5, None, 23.9, 63.9, 1638, 100),
    # The same here: a machine of 8 boards shows 16 devices of 32,768 MiB each (ixsmi). Half of a board's press figures.
    Card("BI-V150", ("bi-v150",), 96, 96, None, 18.5, 32.0, 800, 32, switched=False),
    Card("BI-V100", ("bi-v100",), 147, 147, None, 37, 32.0, 1200, 32, switched=False),
)

# One core's float32 matrix multiply and memory, when nothing was measured: a middling server core of these years.
CPU_CORE_TFLOPS, CPU_BANDWIDTH = 0.05, 20.0


@dataclass(frozen=True)
class Cluster:
    """`gpus` cards, `gpus_per_node` in each machine. `node_link`: GB/s out of one machine, one direction, all its
    network cards together (8 x 400 Gb/s InfiniBand = 400)."""

    card: Card
    gpus: int = 1
    gpus_per_node: int = 8
    node_link: float = 400.0

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    def link(self, ranks: int, stride: int = 1) -> float:
        """GB/s that each of `ranks` processes, `stride` apart, can send while all of them do.

        Inside a node the card's own link; across nodes, the node's network shared by those of its cards that talk.
        """
        if ranks <= 1:
            return float("inf")
        if ranks * stride <= self.gpus_per_node:
            return self.card.link
        talking_in_node = max(1, min(ranks, self.gpus_per_node // stride))
        # Every card of the node is in some such group: `stride` groups share its network.
        return min(self.card.link, self.node_link / (self.gpus_per_node / talking_in_node))

    def __str__(self) -> str:
        if self.gpus == 1:
            return f"1 x {self.card.name}"
        where = f", {self.nodes} nodes, {self.node_link:g} GB/s between them" if self.nodes > 1 else ""
        return f"{self.gpus} x {self.card.name} ({self.card.link:g} GB/s inside a node{where})"


def find_card(device_name: str) -> Card | None:
    """The table's row for a device's own name ("NVIDIA H100 80GB HBM3"), or None for an unknown one."""
    name = device_name.lower().replace("-40gb", " 40gb")
    return next((card for card in CARDS if all(_is_word(piece, name) for piece in card.names)), None)


def card_named(text: str, memory_gib: float | None = None) -> Card:
    """The card that a user means: "h200", "A100-40", "rtx3090", "NVIDIA H100 80GB HBM3", "cpu".

    `memory_gib` makes it act as a smaller (or larger) card. Raises UserError with the nearest names.
    """
    plain = _plain(text)
    card = next((card for card in CARDS if _plain(card.name) == plain), None)
    card = card or next((card for card in CARDS if _plain(card.name).endswith(plain) and plain), None)
    card = card or find_card(text) or (cpu_card() if plain == "cpu" else None)
    if card is None:
        names = [card.name for card in CARDS]
        nearest = difflib.get_close_matches(text.upper(), names, n=3, cutoff=0.3)
        raise UserError(f"--gpu {text} is no card in the table: use one of {', '.join(nearest or names)}, or cpu")
    if memory_gib is not None and not 0 < memory_gib < 1e5:
        raise UserError(f"--memory-gib {memory_gib:g} is no memory size: use a number above 0")
    return replace(card, memory_gib=memory_gib) if memory_gib else card


def cpu_card() -> Card:
    """This machine's processor as a card: every core, and the memory it has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (AttributeError, ValueError, OSError):  # Windows
        memory = 16.0
    peak = cores * CPU_CORE_TFLOPS
    return Card("CPU", ("cpu",), peak, peak, None, peak, memory, CPU_BANDWIDTH, 5.0, switched=False)


def cluster_of(
    gpu: str,
    gpus: int | None = None,
    *,
    memory_gib: float | None = None,
    gpus_per_node: int | None = None,
    link: float | None = None,
    node_link: float | None = None,
) -> Cluster:
    """A cluster from what a user says; `link` and `node_link` in GB/s, one direction. Raises UserError for what cannot
    be."""
    card = card_named(gpu, memory_gib)
    for name, speed in (("--link", link), ("--node-link", node_link)):
        if speed is not None and not 0 < speed < 1e6:
            raise UserError(f"{name} {speed:g} is no speed of a link: use GB/s above 0")
    if link:
        card = replace(card, link=link)
    count = 1 if gpus is None else gpus
    in_node = gpus_per_node or Cluster.gpus_per_node
    if not 1 <= count <= 1_000_000 or in_node < 1:
        raise UserError(f"--gpus {count} in nodes of {in_node}: use at least 1 of each, and at most a million")
    return Cluster(card, count, in_node, node_link or Cluster.node_link)


def this_machine(gpus: int | None = None, memory_gib: float | None = None, **links: Any) -> Cluster:
    """The cards that nvidia-smi lists, else the processor. `links`: the rest of what `cluster_of` takes."""
    names: list[str] = []
    if program := shutil.which("nvidia-smi"):
        command = [program, "--query-gpu=name", "--format=csv,noheader"]
        try:
            names = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.splitlines()
        except (OSError, subprocess.SubprocessError):
            names = []
    name = next((name.strip() for name in names if find_card(name)), "cpu")
    return cluster_of(name, gpus or (len(names) if name != "cpu" else 1), memory_gib=memory_gib, **links)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of a device in FLOP/s for `bf16`, `fp16`, `fp8` or `fp32`; None where it is not known."""
    card = find_card(device_name)
    return card.peak(dtype) if card else None


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]|nvidia|geforce|tesla|amd|instinct|gb$", "", text.lower())


def _is_word(piece: str, name: str) -> bool:
    """`l4` is in "nvidia l4" and not in "nvidia l40": a name ends where letters and digits end."""
    start = name.find(piece)
    while start >= 0:
        before, after = name[start - 1 : start], name[start + len(piece) : start + len(piece) + 1]
        if not before.isalnum() and not after.isalnum():
            return True
        start = name.find(piece, start + 1)
    return False
