"""Activations by name."""

import torch.nn.functional as F
from torch import Tensor

from trainwright.model.config import Activation


def activate(name: Activation, x: Tensor) -> Tensor:
    """silu, relu, gelu by the error function, or gelu_tanh: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    if name == "silu":
        return F.silu(x)
    if name == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
