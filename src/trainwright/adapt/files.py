"""An adapter folder in PEFT's format, as names, ranks and scales. Reads headers and JSON; no torch, no weights.

    adapter_config.json         LoraConfig of PEFT (the keys that say what the adapter computes; others are let be)
    adapter_model.safetensors   base_model.model.PATH.lora_A.weight [rank, in], .lora_B.weight [out, rank],
                                .lora_magnitude_vector [out] with DoRA

Owns what such a folder means and what in it cannot be taken. Moving the tensors is `peft.py`'s work.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainwright.adapt.lora import Lora
from trainwright.adapt.published import Group, linear_groups
from trainwright.errors import UserError
from trainwright.model.config import ModelConfig
from trainwright.model.folder import Stored, read_json, stored_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = "trainwright_parts"
"""In the file's metadata: published module -> the ranks of its parts, where we wrote several as one."""
# Keys whose other values change what an adapter computes in ways that have no place here.
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
}
_CHANGED_BASE = ("pissa", "olora", "loftq", "corda")


@dataclass(frozen=True)
class Source:
    """Where our adapted module's tensors come from.

    `group` and `part`: which published modules, and which of their parts this is. `fused`: experts whose two
    projections share one stacked parameter, as transformers 5 keeps them. `theirs`: the names of A tensors in the file,
    without `.lora_A.weight`. `columns`: of a fused adapter's rank this part has only [begin, end).
    """

    group: Group
    part: int
    theirs: tuple[str, ...]
    lora: Lora
    fused: bool = False
    columns: tuple[int, int] | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, once it is known that what it says can be done."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name an adapter folder with {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    for key, known in _ONLY.items():
        if key in config and config[key] not in known:
            raise UserError(f"{folder / CONFIG}: {key}={config[key]!r} is not read here, only {known[0]!r}")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_CHANGED_BASE):
        raise UserError(
            f"{folder / CONFIG}: init_lora_weights={init} changed the base weights, which an adapter folder does not "
            "hold: convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) first"
        )
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise UserError(
            f"{folder} has no {WEIGHTS}" + (": adapter_model.bin is a pickle and is never read" if pickled else "")
        )
    return config


def sources(folder: Path, config: ModelConfig) -> dict[str, Source]:
    """Our module path -> where its adapter is in `folder`. Raises UserError for tensors that belong nowhere."""
    keys = read_config(folder)
    stored = {name: item for name, item in stored_tensors(folder).items() if item.file.name == WEIGHTS}
    parts = _read_parts(folder / WEIGHTS)
    ranks = {name.removesuffix(".lora_A.weight"): t.shape[0] for name, t in stored.items() if "lora_A" in name}
    left = set(ranks)
    found: dict[str, Source] = {}
    for group in linear_groups(config):
        names = tuple(name for theirs in group.theirs if (name := _stored_as(theirs, ranks)))
        if not names:
            continue
        if len(names) != len(group.theirs):
            raise UserError(f"{folder / WEIGHTS} adapts {len(names)} of {len(group.theirs)} experts: all or none")
        left -= set(names)
        module = names[0].removeprefix(PREFIX)
        lora = _lora(keys, module, ranks[names[0]], stored)
        found |= _parts(group, names, lora, parts.get(module))
    for name in sorted(left):
        _add_fused_experts(name, ranks[name], keys, config, stored, found)
    _check_leftovers(folder, stored, found)
    return found


def stored_adapters(folder: Path, config: ModelConfig) -> dict[str, Lora]:
    """Our module path -> the adapter that `folder` has for it."""
    return {path: source.lora for path, source in sources(folder, config).items()}


def _parts(group: Group, names: tuple[str, ...], lora: Lora, ranks: list[int] | None) -> dict[str, Source]:
    """One source for each of our modules. `ranks` of the parts are known where we wrote the folder."""
    if ranks is None:
        return {ours: Source(group, part, names, lora) for part, ours in enumerate(group.ours)}
    found, start = {}, 0
    for part, (ours, rank) in enumerate(zip(group.ours, ranks, strict=True)):
        if rank:
            own = replace(lora, rank=rank, alpha=lora.scale * rank, rslora=False)
            found[ours] = Source(group, part, names, own, columns=(start, start + rank))
        start += rank
    return found


def _read_parts(file: Path) -> dict[str, list[int]]:
    """What `peft.py` noted about fused modules in the metadata of the safetensors header; nothing in others' files."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    parts: dict[str, list[int]] = json.loads((header.get("__metadata__") or {}).get(PARTS) or "{}")
    return parts


def _stored_as(theirs: str, ranks: dict[str, int]) -> str | None:
    """The name of a published module in the file; some tools leave the class's first word out, and transformers 5
    calls Mixtral's sparse block as other families do."""
    options = (theirs, theirs.partition(".")[2], theirs.replace("block_sparse_moe", "mlp"))
    return next((PREFIX + option for option in options if PREFIX + option in ranks), None)


def _lora(keys: dict[str, Any], module: str, rank: int, stored: dict[str, Stored]) -> Lora:
    alpha = _by_pattern(keys.get("alpha_pattern") or {}, module, keys.get("lora_alpha", 8))
    dora = f"{PREFIX}{module}.lora_magnitude_vector" in stored
    return Lora(rank, float(alpha), float(keys.get("lora_dropout") or 0), bool(keys.get("use_rslora")), dora)


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the module's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _add_fused_experts(
    name: str,
    rows: int,
    keys: dict[str, Any],
    config: ModelConfig,
    stored: dict[str, Stored],
    found: dict[str, Source],
) -> None:
    """Experts as one parameter a layer (transformers 5): `PATH.experts` adapts down_proj, and inside it
    `PATH.experts.base_layer` adapts gate_up_proj; A is [experts x rank, in], B [out, rank x experts]."""
    match = re.fullmatch(rf"{re.escape(PREFIX)}(?:.*\.)?layers\.(\d+)\..*experts(\.base_layer)?", name)
    if match is None:
        return
    parts = ("gate_proj", "up_proj") if match[2] else ("down_proj",)
    groups = {group.ours[0]: group for group in linear_groups(config)}
    for part, leaf in enumerate(parts):
        group = groups.get(f"layers.{match[1]}.mlp.experts.{leaf}")
        if group is None:
            return
        rank = rows // len(group.theirs)
        module = f"layers.{match[1]}.mlp.experts.{'gate_up_proj' if match[2] else 'down_proj'}"
        found[group.ours[0]] = Source(group, part, (name,), _lora(keys, module, rank, stored), fused=True)


def _check_leftovers(folder: Path, stored: dict[str, Stored], found: dict[str, Source]) -> None:
    taken = {name for source in found.values() for name in source.theirs}
    for name in sorted(stored):
        module = re.sub(r"\.lora_(A|B|magnitude_vector)(\.weight)?$", "", name)
        if module == name or module not in taken:
            raise UserError(f"{name} in {folder / WEIGHTS} adapts nothing that this model has: is the base another?")
    if not found:
        raise UserError(f"{folder / WEIGHTS} holds no adapter")
