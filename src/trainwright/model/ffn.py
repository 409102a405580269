"""The dense MLP, gated or plain."""

from torch import Tensor, nn

from trainwright.model.config import MlpConfig
from trainwright.model.kernels.activation import activate
from trainwright.model.kernels.gated import gated
from trainwright.model.linear import build_linear, project


class Mlp(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) without a gate. [..., H] -> [..., H]."""

    computed_again = False  # set from outside: in a compiled layer that recomputes

    def __init__(self, config: MlpConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_proj = build_linear(config.gate_proj) if config.gate_proj else None
        self.up_proj = build_linear(config.up_proj)
        self.down_proj = build_linear(config.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            (up,) = project(x, self.up_proj)
            return self.down_proj(activate(self.activation, up))
        gate, up = project(x, self.gate_proj, self.up_proj)
        # Rounded to 8 bits on its way into the product, it is better left to the compiler.
        again = self.computed_again and getattr(self.down_proj, "float8", None) is None
        return self.down_proj(gated(self.activation, gate, up, again=again))
