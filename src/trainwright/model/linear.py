"""Builds a linear layer from its leaf of the tree: plain, in fewer bits, or with an adapter beside it."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from trainwright.model.config import LinearConfig
from trainwright.model.kernels.float8 import Scaling, fits, float8_linear
from trainwright.model.kernels.product import linear


class Linear(nn.Linear):
    """y = x W^T + b in x's type. Weights that are kept wider (float32 masters under bf16 compute) are cast where they
    are used, and their gradients arrive in their own type."""

    # Set from outside: in training its products run in 8 bits; what makes the product instead; what makes it with
    # other layers' (`project`).
    float8: Scaling | None = None
    product: Callable[[Tensor, Tensor], Tensor] | None = None
    together: Callable[[Tensor, Sequence[nn.Module]], Sequence[Tensor] | None] | None = None

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(input.dtype)
        bias = self.bias if self.bias is None else self.bias.to(input.dtype)
        if self.float8 is not None and self.training and fits(input, weight):
            output = float8_linear(input, weight, self.float8)
        elif self.product is not None:
            output = self.product(input, weight)
        else:
            return linear(input, weight, bias)
        return output if bias is None else output + bias


def project(x: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """What each of several layers gives for x: in one operation where the first says that it takes the others along."""
    together: Callable[..., Sequence[Tensor] | None] | None = getattr(layers[0], "together", None)
    made = together(x, layers[1:]) if together is not None else None
    return made if made is not None else [layer(x) for layer in layers]


def build_linear(config: LinearConfig) -> nn.Module:
    """The module of one leaf. What adapt/ put on the leaf builds itself; the plain case is torch's own, in x's type."""
    if config.adapter is not None:
        return config.adapter.build(config)
    if config.quantization is not None:
        return config.quantization.build(config)
    return Linear(config.in_features, config.out_features, bias=config.bias)
