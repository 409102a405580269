"""The norm layers' weights. Arithmetic is in kernels/norm.py."""

import torch
from torch import Tensor, nn

from trainwright.model.config import NormConfig
from trainwright.model.kernels.norm import layer_norm, rms_norm


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with a bias, over the last dim."""

    def __init__(self, config: NormConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.ones(config.size))
        self.bias = nn.Parameter(torch.zeros(config.size)) if config.kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}, kind={'rms' if self.bias is None else 'layer'}"
