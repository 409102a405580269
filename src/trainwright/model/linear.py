"""Builds a linear layer from its leaf of the tree: plain, in fewer bits, or with an adapter beside it."""

from torch import nn

from trainwright.model.config import LinearConfig


def build_linear(config: LinearConfig) -> nn.Module:
    """The module of one leaf. What adapt/ put on the leaf builds itself; the plain case is torch's own."""
    if config.adapter is not None:
        return config.adapter.build(config)
    if config.quantization is not None:
        return config.quantization.build(config)
    return nn.Linear(config.in_features, config.out_features, bias=config.bias)
