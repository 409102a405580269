"""Adapters added into the base they were trained beside: the full-precision one, whatever the training kept it in.

An adapted linear layer gives its merged weight when it is saved (`LoraLinear.give_weight`), so a merge is a load and a
save. Owns finding the base, and the proof that adapted, merged and reloaded models say the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from trainwright.adapt.files import read_config
from trainwright.adapt.linear import LoraLinear
from trainwright.adapt.peft import adapters_of, load_adapter
from trainwright.adapt.rewrite import adapted_config
from trainwright.errors import UserError
from trainwright.model.checkpoint import load_config, load_model, load_weights, materialize, save_model, stored_dtype
from trainwright.model.folder import read_json, resolve
from trainwright.model.transformer import Transformer
from trainwright.recipe.model import AdapterRecipe, Quantization

# How far two logits may lie apart, as a share of the largest: what rounding the merged weights once does.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Verification:
    """Largest differences of logits, as a share of the largest logit, and the limit of the first."""

    live_to_merged: float
    merged_to_reloaded: float
    limit: float

    @property
    def holds(self) -> bool:
        """A merge may round each weight once; a reload must be exact."""
        return self.live_to_merged <= self.limit and self.merged_to_reloaded == 0.0

    def __str__(self) -> str:
        return (
            f"logits of the adapted and the merged model differ by {self.live_to_merged:.1e} of the largest (limit "
            f"{self.limit:.0e}), those of the merged and the reloaded model by {self.merged_to_reloaded:.1e} (limit 0)"
        )


def find_base(adapter: Path, base: str | None = None) -> Path:
    """The folder of the base that was named, or else of the one that the adapter names. It must be whole."""
    named = base or read_config(adapter).get("base_model_name_or_path")
    if not named:
        raise UserError(f"{adapter} does not say which model it adapts: name it with --base")
    folder = resolve(named)
    if "quantization_config" in read_json(folder / "config.json"):
        raise UserError(
            f"{folder} is in fewer bits, and adapters are merged into the full-precision base only: name the model it "
            "was made from with --base"
        )
    return folder


def load_adapted(
    adapter: str | Path,
    *,
    base: str | None = None,
    quantize: Quantization | None = None,
    tables: Quantization | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    family: str | None = None,
) -> Transformer:
    """The base with live adapters, in evaluation mode. dtype None keeps the base's; adapters are float32."""
    folder = find_base(Path(adapter), base)
    config = adapted_config(load_config(folder, family), AdapterRecipe(path=str(adapter)), quantize, tables)
    model = materialize(config, dtype=dtype or stored_dtype(folder), device=device)
    load_weights(model, folder)
    load_adapter(model, adapter)
    return model.eval()


@torch.no_grad()
def merge_adapter(
    adapter: str | Path,
    target: str | Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    family: str | None = None,
    verify: bool = False,
) -> Verification | None:
    """Writes base + adapters as a Hugging Face folder in `dtype` (None: the base's). Sums are made in float32.

    verify: compares logits of the adapted, the merged and the reloaded model on random tokens. One model is in memory,
    two while verifying.
    """
    model = load_adapted(adapter, base=base, dtype=dtype, device=device, family=family)
    ids = torch.randint(0, model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0)).to(device)
    live = model(ids).float() if verify else None
    for module in adapters_of(model).values():
        module.weight.copy_(module.give_weight())
        module.lora_b.zero_()
        if isinstance(module, LoraLinear):
            module.start_magnitude()
    save_model(model, target)
    if live is None:
        return None
    merged = model(ids).float()
    reloaded = load_model(target, device=device, family=family)(ids).float()
    largest = live.abs().max()
    return Verification(
        ((live - merged).abs().max() / largest).item(),
        ((merged - reloaded).abs().max() / largest).item(),
        TOLERANCE[stored_dtype(target)],
    )
