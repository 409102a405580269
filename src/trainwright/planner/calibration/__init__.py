"""How much of a card's peaks is reached: shares of the datasheet figures, one YAML file a card. No torch.

Owns the files' meaning and which file is taken: one that `trainwright doctor --measure` wrote for this very card, else
the shipped one of its name, else the shipped one of its nearest relative, said so in `Calibration.source`.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import yaml

from trainwright.errors import UserError
from trainwright.planner.hardware import Card
from trainwright.store import write_text

SHIPPED = Path(__file__).parent

# Whose efficiencies an unmeasured card borrows: the nearest relative by generation and memory.
RELATIVES = {
    "B200": "H100", "H200 NVL": "H200", "H100 NVL": "H100", "H100 PCIe": "H100", "H800": "H100", "H20": "H100",
    "A100-40": "A100-80", "A100-80 PCIe": "A100-80", "A800": "A100-80", "A30": "A100-80", "MI300X": "H100",
    "MI325X": "H100", "MI250X": "A100-80", "BI-V150": "A100-80", "BI-V100": "A100-80",
}  # fmt: skip


@dataclass(frozen=True)
class AttentionEfficiency:
    """Share of the dense peak by direction. At length s the share is `limit` x s / (s + half_length)."""

    forward: float
    backward: float
    half_length: float = 0.0
    half_length_backward: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """Shares of a card's peaks, and fixed times.

    matmul: share of the dense peak that a large square product reaches, by dtype. half_depth: a product of depth k
    reaches k / (k + half_depth) of that (filling and draining of the pipeline). bandwidth: share of the memory's
    bandwidth that elementwise kernels reach. link, node_link: share of the links that a large collective reaches.
    overlap: share of a collective's time that computation hides where the program lets it. launch: seconds of host time
    for each kernel, which bounds small models. latency: seconds that a collective of no size takes.
    """

    card: str
    source: str
    matmul: dict[str, float]
    attention: dict[str, AttentionEfficiency]
    measured: bool = False
    half_depth: float = 120.0
    half_area: float = 1.5e6
    """A product with so many elements of output fills half of the card."""
    bandwidth: float = 0.85
    link: float = 0.75
    node_link: float = 0.80
    overlap: float = 0.85
    contention: float = 0.05
    """Computation is slower by this share while a collective runs beside it."""
    launch: float = 4e-6
    latency: float = 15e-6
    context_gib: float = 0.5
    """Memory that the driver and loaded kernels take, outside of what torch counts."""
    communicator_gib: float = 0.25
    """Memory that each group of processes takes for its channels, likewise."""

    def attention_share(self, backend: str, length: float, *, backward: bool) -> float:
        """Share of the dense peak that attention over `length` keys reaches with a backend.

        Variable lengths and flex take flash attention's share where they were not measured: they are its kernels.
        """
        known = self.attention.get(backend) or self.attention["flash"]
        half = known.half_length_backward if backward else known.half_length
        return (known.backward if backward else known.forward) * length / (length + half)


def own_folder() -> Path:
    """Where `doctor --measure` writes: $TRAINWRIGHT_CALIBRATION, else the user's configuration folder."""
    named = os.environ.get("TRAINWRIGHT_CALIBRATION")
    return Path(named) if named else Path.home() / ".config" / "trainwright" / "calibration"


def file_name(card: str) -> str:
    return card.lower().replace(" ", "_") + ".yaml"


def load_calibration(card: Card) -> Calibration:
    """The efficiencies of a card; `source` says where they come from and `measured` whether from this card."""
    for folder in (own_folder(), SHIPPED):
        path = folder / file_name(card.name)
        if path.is_file():
            return read_calibration(path)
    relative = RELATIVES.get(card.name, "RTX 3090" if not card.switched else "A100-80")
    found = read_calibration(SHIPPED / file_name(relative))
    return replace(found, card=card.name, measured=False, source=f"borrowed from {relative}: {found.source}")


def read_calibration(path: Path) -> Calibration:
    """One file. Raises UserError that names the file and the key."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a calibration: {error}") from None
    known = {item.name for item in fields(Calibration)}
    if not isinstance(values, dict) or set(values) - known or {"card", "source", "matmul", "attention"} - set(values):
        raise UserError(
            f"{path}: a calibration has the keys {', '.join(sorted(known))}: write it with doctor --measure"
        )
    attention = {name: AttentionEfficiency(**shares) for name, shares in values.pop("attention").items()}
    return Calibration(attention=attention, **values)


def write_calibration(calibration: Calibration, folder: Path | None = None) -> Path:
    """Writes what was measured where `load_calibration` finds it first; the file is whole or as it was."""
    path = (folder or own_folder()) / file_name(calibration.card)
    write_text(path, yaml.safe_dump(asdict(calibration), sort_keys=False, allow_unicode=True))
    return path
