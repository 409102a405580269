"""Models from and to Hugging Face folders: config.json and safetensors, read and written shard by shard.

Owns the copying between published tensors and ours. Never holds a second copy of the model: at most the tensors of one
`Weight` (a fused projection, one layer's experts) on load, one shard on save. Names and layouts are the family's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.errors import UserError
from trainwright.model import families, folder, store
from trainwright.model.config import ModelConfig, without_adapters
from trainwright.model.families.family import Family, Weight
from trainwright.model.init import copy_whole
from trainwright.model.shapes import parameter_shapes
from trainwright.model.source import load_config, spelled_config
from trainwright.model.transformer import Transformer

__all__ = ["load_config", "load_model", "load_weights", "materialize", "save_model", "write_weights"]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.", "module.")


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    family: str | None = None,
) -> Transformer:
    """A Transformer with the weights of a folder or hub id, in evaluation mode.

    dtype None keeps the file's; device None is the CPU. Raises UserError for a folder that is not whole.
    """
    where = folder.resolve(path)
    config = load_config(where, family)
    stored = folder.stored_tensors(where)
    folder.match(families.get(config.family), config, stored)
    folder.check_tokenizer(where, config)
    dtype = dtype or stored_dtype(where)
    model = materialize(config, dtype=dtype, device=device or "cpu")
    load_weights(model, where)
    return model.eval()


def stored_dtype(path: str | Path) -> torch.dtype:
    """The type that a folder's weights are in: its largest tensor's. Small ones (buffers, norms) may be wider."""
    stored = folder.stored_tensors(folder.resolve(path))
    return _DTYPES.get(max(stored.values(), key=lambda tensor: math.prod(tensor.shape)).dtype, torch.float32)


def materialize(config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str) -> Transformer:
    """The modules with memory that holds no numbers yet."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to(dtype).to_empty(device=device)
    model.tie_weights()
    model.reset_buffers(torch.device(device))
    return model


@torch.no_grad()
def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fills a model that is already built, whole, a pipeline stage, or sharded (DTensor): each rank copies its part.

    A module that keeps its weight in another form (fewer bits) has `take_weight(whole: Tensor)` and is given it.
    """
    config: ModelConfig = model.config  # type: ignore[assignment]
    family = families.get(config.family)
    stored = folder.stored_tensors(folder.resolve(path))
    shapes = parameter_shapes(config)
    targets = _targets(model, config)
    pairs = folder.match(family, config, stored)
    pairs.sort(key=lambda pair: str(stored[pair[1][0]].file))
    with _Reader(stored) as read:
        for weight, names in pairs:
            if not any(targets.get(name) for name in weight.ours):
                continue
            theirs = [read(name) for name in names]
            for name, tensor in zip(names, theirs, strict=True):
                _check_finite(tensor, name, stored[name])
            ours = weight.to_ours(theirs, [shapes[name] for name in weight.ours])
            for name, tensor in zip(weight.ours, ours, strict=True):
                for take in targets.get(name, ()):
                    take(tensor)
        _check_tied(config, stored, pairs, read)


def _check_finite(tensor: Tensor, name: str, where: folder.Stored) -> None:
    if torch.isfinite(tensor.sum()):  # one pass without memory; finite entries may add up to infinity, so look again
        return
    wrong = int((~torch.isfinite(tensor)).sum())
    if wrong:
        raise UserError(
            f"{name} in {where.file} has {wrong} of {tensor.numel()} entries that are NaN or infinite: "
            "the weights are damaged, take an earlier checkpoint or download them again"
        )


def _check_tied(
    config: ModelConfig, stored: Mapping[str, folder.Stored], pairs: list[tuple[Weight, list[str]]], read: _Reader
) -> None:
    """A head that config.json ties and the files hold all the same must be the token table."""
    table = next(names[0] for weight, names in pairs if weight.ours == ("embed_tokens.weight",))
    head = next((name for name in stored if name.endswith("lm_head.weight")), None) if config.lm_head.tied else None
    if head and (stored[head].shape != stored[table].shape or not torch.equal(read(head), read(table))):
        raise UserError(
            f"{head} in {stored[head].file} is not {table}, to which config.json ties it: "
            "set tie_word_embeddings to false there, or remove the tensor"
        )


def _targets(model: nn.Module, config: ModelConfig) -> dict[str, list[Callable[[Tensor], None]]]:
    """Our weight name -> what takes its whole tensor. A tied head that lives alone (last stage) takes the table too."""
    found: dict[str, list[Callable[[Tensor], None]]] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if hasattr(module, "take_weight"):
            found.setdefault(clean_name(f"{path}.weight"), []).append(module.take_weight)
        for name, parameter in module.named_parameters(recurse=False):
            ours = clean_name(f"{path}.{name}")
            if id(parameter) in seen or (hasattr(module, "take_weight") and name == "weight"):
                continue
            seen.add(id(parameter))
            if ours == "lm_head.weight" and config.lm_head.tied:
                ours = "embed_tokens.weight"
            found.setdefault(ours, []).append(partial(copy_whole, parameter))
    return found


def clean_name(name: str) -> str:
    """A parameter's name without what wrappers (compile, recompute) put in it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


class _Reader:
    """Reads tensors by name, with one file open at a time."""

    def __init__(self, stored: Mapping[str, folder.Stored]) -> None:
        self._stored = stored
        self._file: Path | None = None
        self._open: Any = None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)

    def __call__(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        file = self._stored[name].file
        if file != self._file:
            self.__exit__()
            try:
                self._file, self._open = file, safe_open(str(file), "pt").__enter__()
            except SafetensorError as error:
                raise UserError(
                    f"{file} is not a whole safetensors file: {error}: download or copy it again"
                ) from error
        return self._open.get_tensor(name)


# ---- saving ----------------------------------------------------------------------------------------------------


def save_model(
    model: nn.Module, path: str | Path, *, dtype: torch.dtype | None = None, shard_gib: float = 5, write: bool = True
) -> None:
    """Writes the model as its family publishes it: config.json, safetensors, an index where there are several.

    dtype None keeps the weights'. Sharded parameters are gathered one at a time, so every rank calls this, and all but
    one with write=False. Files are complete or absent: written beside, synced, renamed.
    """
    held = {clean_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    given = {clean_name(n): m.give_weight for n, m in model.named_modules() if hasattr(m, "give_weight")}

    def whole(name: str) -> Tensor:
        module = name.rsplit(".", 1)[0]
        if name.endswith(".weight") and module in given:
            return given[module]()
        tensor = held[name].detach()
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    config: ModelConfig = model.config  # type: ignore[assignment]
    write_weights(config, whole, path, dtype=dtype, shard_gib=shard_gib, write=write)


def write_weights(
    config: ModelConfig,
    whole: Callable[[str], Tensor],
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shard_gib: float = 5,
    write: bool = True,
) -> None:
    """`save_model` for weights that come from anywhere: `whole(name)` gives each of ours, asked for once, in order."""
    config = without_adapters(config)
    family = families.get(config.family)
    if not write:
        for _ in _published(family, config, whole, dtype):
            pass
        return
    with store.beside(Path(path)) as made:
        saved = store.write_shards(_published(family, config, whole, dtype), made, int(shard_gib * 2**30))
        store.write_json(made / "config.json", {**spelled_config(config), **_dtype_key(config, saved)})
        store.finish(made, Path(path))


def _dtype_key(config: ModelConfig, saved: str) -> dict[str, str]:
    key = "dtype" if "dtype" in config.source else "torch_dtype"
    return {} if not config.source.get(key) and saved == "float32" else {key: saved}


def _published(
    family: Family, config: ModelConfig, whole: Callable[[str], Tensor], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    last = torch.float32
    for weight in family.weights(config):
        ours = [whole(name) for name in weight.ours]
        last = dtype or ours[0].dtype
        theirs = weight.to_theirs([tensor.to(device="cpu", dtype=last) for tensor in ours])
        yield from ((family.prefixes[0] + name, tensor) for name, tensor in zip(weight.theirs, theirs, strict=True))
    for name, make in family.constants(config).items():
        yield name, make().to(last)
