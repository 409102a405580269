"""Adapter folders in PEFT's format, written and read: the tensors. What a folder means is `files.py`'s.

Published models keep some projections fused (GPT-2's c_attn, BLOOM's query_key_value); ours are apart, each with an A
and B of its own. Written, the fused module gets one adapter of the parts' ranks together: their A's one below the
other, their B's side by side, each in the rows of its part. That is exact. Read, each part gets a copy of the fused A
and its rows of B: exact too, and from then on each part trains an A of its own. A folder that we wrote comes back as it
was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trainwright.adapt import files
from trainwright.adapt.frozen import gathered
from trainwright.adapt.linear import LoraExperts, LoraLinear
from trainwright.adapt.lora import Lora
from trainwright.adapt.published import Group, linear_groups, shortest_targets
from trainwright.errors import UserError
from trainwright.model import store
from trainwright.model.checkpoint import clean_name
from trainwright.model.config import LinearConfig, ModelConfig, linears, map_linears
from trainwright.model.families.family import Weight
from trainwright.model.init import copy_whole

Whole = Callable[[str], Tensor]


def adapters_of(model: nn.Module) -> dict[str, LoraLinear | LoraExperts]:
    """Our module path -> its module, for every adapted layer of a model or a pipeline stage."""
    named = ((clean_name(path), module) for path, module in model.named_modules())
    return {path: module for path, module in named if isinstance(module, LoraLinear | LoraExperts)}


# ---- writing --------------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, folder: str | Path, *, base: str | None = None, write: bool = True) -> None:
    """Writes the adapters of `model`, complete or absent.

    Sharded ones are gathered one at a time, so every rank calls this, all but one with write=False; the base is never
    gathered. `base`: where the base model is, for whoever reads the folder.
    """
    modules = adapters_of(model)

    def whole(name: str) -> Tensor:
        path, _, parameter = name.rpartition(".")
        return gathered(getattr(modules[path], parameter))

    write_adapter(model.config, whole, folder, base=base, write=write)  # type: ignore[arg-type]


def write_adapter(
    config: ModelConfig, whole: Whole, folder: str | Path, *, base: str | None = None, write: bool = True
) -> None:
    """`save_adapter` for tensors that come from anywhere: `whole(name)` gives each of ours, asked for in order."""
    adapted = {path: linear for path, linear in linears(config) if isinstance(linear.adapter, Lora)}
    if not adapted:
        raise UserError("this model has no adapters to save")
    groups = linear_groups(config)
    tensors: dict[str, Tensor] = {}
    written: dict[str, Lora] = {}
    parts: dict[str, list[int]] = {}
    leaves = dict(linears(config))
    for group in groups:
        if not adapted.keys() & set(group.ours):
            continue
        fused, lora = _published(group, [leaves[path] for path in group.ours], whole)
        for theirs, entries in zip(group.theirs, fused, strict=True):
            tensors |= {f"{files.PREFIX}{theirs}.{key}": tensor.cpu().contiguous() for key, tensor in entries.items()}
            written[theirs] = lora
            if len(group.ours) > 1:
                parts[theirs] = [_lora(leaves[path]).rank if path in adapted else 0 for path in group.ours]
    if write:
        every = {theirs for group in groups for theirs in group.theirs}
        transposed = any(group.weight.transposed for group in groups)
        _write(Path(folder), tensors, _settings(written, every, base, transposed), parts)


def beside_original(config: ModelConfig, whole: Whole, began: Path) -> tuple[ModelConfig, Whole]:
    """(config, tensors) of the adapter that does beside the original base what this one does beside what it left of it.

    s (B A - B0 A0) = s [B, -B0] [A; A0]: twice the rank, the same scale s. `began`: the folder with A0 and B0.
    """

    def twice(_: str, linear: LinearConfig) -> LinearConfig:
        if not isinstance(lora := linear.adapter, Lora):
            return linear
        rank = 2 * lora.rank
        return replace(linear, adapter=replace(lora, rank=rank, alpha=lora.scale * rank, rslora=False, init="kaiming"))

    first = {f"{path}.{name}": t for path, found in read_adapter(began, config) for name, t in found.items()}

    def both(name: str) -> Tensor:
        now = whole(name)
        if name.endswith(".magnitude"):
            return now
        start = first[name].to(now)
        return torch.cat([now, -start], -1) if name.endswith(".lora_b") else torch.cat([now, start], -2)

    return map_linears(config, twice), both


def _lora(linear: LinearConfig) -> Lora:
    assert isinstance(linear.adapter, Lora)
    return linear.adapter


def _published(group: Group, leaves: list[LinearConfig], whole: Whole) -> tuple[list[dict[str, Tensor]], Lora]:
    """(the tensors of each published module of a group, the adapter that they make)."""
    present = {path: _lora(leaf) for path, leaf in zip(group.ours, leaves, strict=True) if leaf.adapter is not None}
    a = {path: whole(f"{path}.lora_a") for path in present}
    b = {path: whole(f"{path}.lora_b") for path in present}
    first = next(iter(present.values()))
    if len(group.ours) == 1:
        (path,) = group.ours
        if group.weight.layout == "stack":
            pairs = zip(a[path].unbind(), b[path].unbind(), strict=True)
            return [{"lora_A.weight": one_a, "lora_B.weight": one_b} for one_a, one_b in pairs], first
        entries = {"lora_A.weight": a[path], "lora_B.weight": b[path]}
    else:
        rank, start, rows = sum(lora.rank for lora in present.values()), 0, []
        for path, leaf in zip(group.ours, leaves, strict=True):
            part = torch.zeros(leaf.out_features, rank, device=a[next(iter(a))].device)
            if path in present:
                end = start + present[path].rank
                part[:, start:end] = b[path] * (present[path].scale / first.scale)
                start = end
            rows.append(part)
        entries = {"lora_A.weight": torch.cat(list(a.values())), "lora_B.weight": _join_rows(group.weight, rows)}
        first = replace(first, rank=rank, alpha=first.scale * rank, rslora=False)
    if first.dora:
        lengths = [whole(f"{path}.magnitude")[:, None] for path in group.ours]
        entries["lora_magnitude_vector"] = _join_rows(group.weight, lengths).flatten()
    return [entries], first


def _join_rows(weight: Weight, parts: list[Tensor]) -> Tensor:
    """Rows of our parts [out, columns] in the order of the published module's outputs."""
    joined = weight.to_theirs(parts)[0]
    return joined.t() if weight.transposed else joined


def _settings(written: dict[str, Lora], every: set[str], base: str | None, transposed: bool) -> dict[str, Any]:
    """adapter_config.json. Where ranks or scales differ, each module has its own; then alpha says the scale alone."""
    first = next(iter(written.values()))
    alike = all((lora.rank, lora.scale) == (first.rank, first.scale) for lora in written.values())
    rslora = first.rslora and alike
    alpha = {module: lora.scale * lora.rank for module, lora in written.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": _number(first.scale * math.sqrt(first.rank) if rslora else first.scale * first.rank),
        "lora_dropout": first.dropout,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "use_rslora": rslora,
        "use_dora": first.dora,
        "init_lora_weights": True,
        "target_modules": shortest_targets(set(written), every),
        "rank_pattern": _patterns({m: lora.rank for m, lora in written.items()}, first.rank),
        "alpha_pattern": {} if alike else _patterns(alpha, first.scale * first.rank),
    }


def _patterns(values: dict[str, Any], usual: Any) -> dict[str, Any]:
    """PEFT's rank_pattern and alpha_pattern: the shortest endings of the modules that have another value."""
    found: dict[str, Any] = {}
    for value in sorted({value for value in values.values() if value != usual}):
        modules = {module for module, own in values.items() if own == value}
        found |= {ending.replace(".", r"\."): _number(value) for ending in shortest_targets(modules, set(values))}
    return found


def _number(value: float) -> float | int:
    """16 rather than 16.0, as PEFT writes it."""
    return int(value) if float(value).is_integer() else value


def _write(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any], parts: dict[str, list[int]]) -> None:
    with store.beside(folder) as made:
        store.write_tensors(made / files.WEIGHTS, tensors, **{files.PARTS: json.dumps(parts)})
        store.write_json(made / files.CONFIG, settings)
        store.finish(made, folder)


# ---- reading --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Fills the adapters of a model that was built with `rewrite.adapted_config(adapter.path=folder)`; each rank of a
    sharded model, or a pipeline stage, takes its own part."""
    modules = adapters_of(model)
    for path, tensors in read_adapter(Path(folder), model.config, modules.keys()):  # type: ignore[arg-type]
        for name, tensor in tensors.items():
            copy_whole(getattr(modules[path], name), tensor.float())


def read_adapter(folder: Path, config: ModelConfig, wanted: Any = None) -> Any:
    """Yields (our module path, {"lora_a", "lora_b" and "magnitude"}) of every adapter, or of the wanted ones."""
    leaves = dict(linears(config))
    found = files.sources(folder, config)
    with safe_open(folder / files.WEIGHTS, "pt") as file:
        for path, source in found.items():
            if wanted is None or path in wanted:
                yield path, _ours(file, source, [leaves[name] for name in source.group.ours])


def _ours(file: Any, source: files.Source, leaves: list[LinearConfig]) -> dict[str, Tensor]:
    """Our tensors of one adapted module."""
    a, b = ([file.get_tensor(f"{name}.lora_{letter}.weight") for name in source.theirs] for letter in "AB")
    if source.fused:
        return _of_fused_experts(a[0], b[0], source)
    if source.group.weight.layout == "stack":
        return {"lora_a": torch.stack(a), "lora_b": torch.stack(b)}
    shapes = [(leaf.out_features, leaf.in_features) for leaf in leaves]

    def part(rows: Tensor) -> Tensor:
        theirs = rows.t() if source.group.weight.transposed else rows
        return source.group.weight.to_ours([theirs], shapes)[source.part]

    own = slice(*source.columns) if source.columns else slice(None)
    tensors = {"lora_a": a[0][own], "lora_b": part(b[0])[:, own]}
    if source.lora.dora:
        tensors["magnitude"] = part(file.get_tensor(f"{source.theirs[0]}.lora_magnitude_vector")[:, None]).flatten()
    return tensors


def _of_fused_experts(a: Tensor, b: Tensor, source: files.Source) -> dict[str, Tensor]:
    """A [E x R, in] and B [parts x out, R x E] of all experts -> [E, R, in] and this part's [E, out, R]."""
    experts = len(source.group.theirs)
    b_EOR = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    count = 2 if source.theirs[0].endswith(".base_layer") else 1
    return {"lora_a": a.unflatten(0, (experts, -1)), "lora_b": b_EOR.chunk(count, 1)[source.part]}
