"""One golden folder as our API takes it: inputs, shifted labels, and gradients under our own weight names."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainwright.model import families
from trainwright.model.checkpoint import load_model
from trainwright.model.config import ModelConfig
from trainwright.model.shapes import parameter_shapes
from trainwright.model.transformer import LossOutput, Transformer


class GoldenCase:
    """A model of `family` in float32 with what the original implementation computes with it."""

    def __init__(self, folder: Path, family: str) -> None:
        self.folder = folder
        self.model: Transformer = load_model(folder, family=family, dtype=torch.float32)
        self.config: ModelConfig = self.model.config
        self.io = load_file(folder / "io.safetensors")
        self.input_ids = self.io["input_ids"]
        labels = self.io["labels"]
        self.labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)

    def inputs(self) -> dict[str, Tensor]:
        """What the reference was given beside the tokens."""
        given: dict[str, Tensor] = {}
        mask, positions = self.io.get("attention_mask"), self.io.get("position_ids")
        if mask is not None and mask.dim() == 2:
            given["attention_mask"] = mask
        if mask is not None and mask.dim() == 4:  # 1 = hidden; what the first query sees is the prompt
            given["prefix_mask"] = mask[:, 0, 0] == 0
        if positions is not None:
            given["position_ids"] = positions
        return given

    def run(self) -> tuple[Tensor, list[Tensor], LossOutput]:
        """(logits, the input of the first layer and the output of every layer, loss with gradients left in place)."""
        streams: list[Tensor] = []
        assert self.model.layers is not None
        layers = list(self.model.layers.values())
        hooks = [layers[0].register_forward_pre_hook(lambda _, args: streams.append(args[0]))]
        hooks += [layer.register_forward_hook(lambda _m, _a, out: streams.append(out[0])) for layer in layers]
        with torch.no_grad():
            logits = self.model(self.input_ids, **self.inputs())
        for hook in hooks:
            hook.remove()
        self.model.zero_grad()
        loss = self.model(self.input_ids, **self.inputs(), labels=self.labels)
        (loss.loss_sum / loss.num_tokens).backward()
        return logits, streams, loss

    def expected_gradients(self) -> dict[str, Tensor]:
        """Our weight name -> the reference's gradient."""
        shapes = parameter_shapes(self.config)
        found: dict[str, Tensor] = {}
        family = families.get(self.config.family)
        for weight in family.weights(self.config):
            theirs = [self.io[f"grad.{family.prefixes[0]}{name}"] for name in weight.theirs]
            ours = weight.to_ours(theirs, [shapes[name] for name in weight.ours])
            found.update(zip(weight.ours, ours, strict=True))
        return found


def errors(case: GoldenCase) -> dict[str, float]:
    """The largest differences: logits, streams and loss absolute; gradients relative to each tensor's largest entry,
    except differences below 1e-8, which is the noise of gradients that are zero in exact arithmetic."""
    logits, streams, loss = case.run()
    real = case.io.get("attention_mask")
    keep = torch.ones_like(case.input_ids, dtype=torch.bool) if real is None or real.dim() == 4 else real.bool()
    found = {
        "logits": (logits - case.io["logits"])[keep].abs().max().item(),
        "hidden": max((s - case.io[f"hidden.{i}"])[keep].abs().max().item() for i, s in enumerate(streams)),
        "loss": abs((loss.loss_sum / loss.num_tokens).item() - case.io["loss"].item()),
    }
    held = dict(case.model.named_parameters())
    worst = 0.0
    for name, expected in case.expected_gradients().items():
        given = held[name].grad
        assert given is not None, name
        difference = (given - expected).abs().max().item()
        worst = max(worst, difference / expected.abs().max().item() if difference > 1e-8 else 0.0)
    return found | {"gradients": worst}
