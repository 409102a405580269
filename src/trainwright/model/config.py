"""The tree of parts that a model is built from: frozen, hashable, no torch.

Owns what a model is: its parts, their sizes, exact parameter counts and FLOP counts. A path in this tree is the path
of the module built from it (`layers.3.self_attn.q_proj`), so adapters and quantization are rewrites of leaves
(`map_linears`) before the build. Turning a tree into modules is `transformer.py`'s work, reading config.json is
`families/`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from trainwright.model.config_rope import (
    DynamicNtkScaling as DynamicNtkScaling,
)
from trainwright.model.config_rope import (
    LinearScaling as LinearScaling,
)
from trainwright.model.config_rope import (
    Llama3Scaling as Llama3Scaling,
)
from trainwright.model.config_rope import (
    QwenNtkScaling as QwenNtkScaling,
)
from trainwright.model.config_rope import (
    RopeConfig as RopeConfig,
)
from trainwright.model.config_rope import (
    RopeScaling as RopeScaling,
)
from trainwright.model.config_rope import (
    YarnScaling as YarnScaling,
)

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


class Adapter(Protocol):
    """A small trained part beside a linear layer (adapt/lora.py)."""

    def num_parameters(self, linear: LinearConfig) -> int: ...

    def build(self, linear: LinearConfig, num_experts: int | None = None) -> Any:
        """The module that stands for the adapted linear, or for that of every expert; its frozen part is `weight`."""


class Quantization(Protocol):
    """A frozen weight in fewer bits (adapt/quantize.py)."""

    @property
    def kind(self) -> Any: ...

    @property
    def block(self) -> int: ...

    def num_bytes(self, *shape: int, levels: int = 2) -> int: ...

    def build(self, linear: LinearConfig, num_experts: int | None = None) -> Any: ...

    def build_embedding(self, table: EmbeddingConfig) -> Any: ...

    def build_head(self, head: HeadConfig) -> Any: ...


@dataclass(frozen=True)
class LinearConfig:
    """y = x W^T + b, W [out_features, in_features]."""

    in_features: int
    out_features: int
    bias: bool = False
    adapter: Adapter | None = None
    quantization: Quantization | None = None

    def num_parameters(self) -> int:
        own = self.out_features * (self.in_features + self.bias)
        return own + (self.adapter.num_parameters(self) if self.adapter else 0)


@dataclass(frozen=True)
class NormConfig:
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016), statistics in float32."""

    size: int
    eps: float
    kind: Literal["rms", "layer"] = "rms"

    def num_parameters(self) -> int:
        return self.size * (2 if self.kind == "layer" else 1)


@dataclass(frozen=True)
class EmbeddingConfig:
    """The token table. The row `padding_idx` gets no gradient from the lookup; `scale` multiplies the output."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None = None
    scale: float = 1.0
    quantization: Quantization | None = None

    def num_parameters(self) -> int:
        return self.num_embeddings * self.embedding_dim


@dataclass(frozen=True)
class PositionTableConfig:
    """Learned absolute positions; position p reads row p + offset (OPT: 2, its pads have position -1)."""

    num_embeddings: int
    embedding_dim: int
    offset: int = 0

    def num_parameters(self) -> int:
        return self.num_embeddings * self.embedding_dim


@dataclass(frozen=True)
class MaskConfig:
    """What a query may see. `window` keys at most, itself included (sliding window, GPT-3's banded layers).

    prefix: everything before the answer is visible to every query, the rest is causal (GLM).
    """

    kind: Literal["causal", "prefix"] = "causal"
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} keys: a token sees itself, so 1 is the least")


def even_head_dim(hidden_size: int, num_heads: int) -> int:
    """hidden_size / num_heads; a ValueError where that is not whole."""
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} is no multiple of {num_heads} attention heads")
    return hidden_size // num_heads


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention (Ainslie et al. 2023); query head h reads KV head h // (num_heads / num_kv_heads)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_proj: LinearConfig
    k_proj: LinearConfig
    v_proj: LinearConfig
    o_proj: LinearConfig
    q_norm: NormConfig | None = None
    k_norm: NormConfig | None = None
    rope: RopeConfig | None = None
    alibi: bool = False
    mask: MaskConfig = MaskConfig()
    logn_length: int | None = None
    """Qwen 1 in evaluation: queries at p >= logn_length are multiplied by log(p + 1) / log(logn_length)."""

    def __post_init__(self) -> None:
        if self.logn_length is not None and self.logn_length < 2:
            raise ValueError(f"log-n from a length of {self.logn_length}: 2 is the least")
        if self.rope is not None and self.rope.channels * self.rope.rotary_dim > self.head_dim:
            raise ValueError(
                f"{self.rope.channels * self.rope.rotary_dim} rotated dimensions in heads of {self.head_dim}"
            )

    @classmethod
    def of(
        cls,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        **parts: Any,
    ) -> AttentionConfig:
        """The four projections from the usual sizes; `parts` are the other fields."""
        kv = num_kv_heads or num_heads
        if num_heads % kv:
            raise ValueError(f"{num_heads} attention heads are no multiple of {kv} key-value heads")
        dim = head_dim or even_head_dim(hidden_size, num_heads)
        q, k = (LinearConfig(hidden_size, n * dim, qkv_bias) for n in (num_heads, kv))
        return cls(num_heads, kv, dim, q, k, k, LinearConfig(num_heads * dim, hidden_size, o_bias), **parts)

    def num_parameters(self) -> int:
        parts = (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.q_norm, self.k_norm)
        return sum(part.num_parameters() for part in parts if part)

    def flops_per_token(self, seq_len: int, *, causal: bool) -> float:
        """Forward and backward of scores and their product with V: 12 x width x keys a query sees."""
        keys: float = seq_len
        if causal:
            window = min(self.mask.window or seq_len, seq_len)
            keys = window - window * window / (2 * seq_len)
        return 12 * self.num_heads * self.head_dim * keys


@dataclass(frozen=True)
class MlpConfig:
    """down(act(gate x) * up x) when gated, down(act(up x)) when not."""

    gate_proj: LinearConfig | None
    up_proj: LinearConfig
    down_proj: LinearConfig
    activation: Activation = "silu"

    @classmethod
    def of(
        cls,
        hidden_size: int,
        intermediate_size: int,
        *,
        gated: bool = True,
        bias: bool = False,
        activation: Activation = "silu",
    ) -> MlpConfig:
        up = LinearConfig(hidden_size, intermediate_size, bias)
        down = LinearConfig(intermediate_size, hidden_size, bias)
        return cls(up if gated else None, up, down, activation)

    @property
    def intermediate_size(self) -> int:
        return self.up_proj.out_features

    def num_parameters(self) -> int:
        return sum(part.num_parameters() for part in (self.gate_proj, self.up_proj, self.down_proj) if part)

    num_active_parameters = num_parameters


@dataclass(frozen=True)
class ExpertsConfig(MlpConfig):
    """`num_experts` MLPs whose weights are stacked [num_experts, out, in]; the linears are those of one expert."""

    num_experts: int = 0

    def num_parameters(self) -> int:
        return self.num_experts * super().num_parameters()


@dataclass(frozen=True)
class MoeConfig:
    """Mixture of experts: softmax over all experts in float32, the top k chosen, none dropped.

    `aux_loss_coef` weighs the load-balancing loss (Fedus et al. 2021, section 2.2, over all sparse layers at once).
    """

    gate: LinearConfig
    experts: ExpertsConfig
    top_k: int
    norm_topk: bool = True
    aux_loss_coef: float = 0.0

    @classmethod
    def of(
        cls, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, activation: Activation, **rest: Any
    ) -> MoeConfig:
        if not 0 < top_k <= num_experts:
            raise ValueError(f"{top_k} experts a token of {num_experts}")
        up, down = LinearConfig(hidden_size, intermediate_size), LinearConfig(intermediate_size, hidden_size)
        experts = ExpertsConfig(up, up, down, activation, num_experts)
        return cls(LinearConfig(hidden_size, num_experts), experts, top_k, **rest)

    def num_parameters(self) -> int:
        return self.gate.num_parameters() + self.experts.num_parameters()

    def num_active_parameters(self) -> int:
        one_expert = self.experts.num_parameters() // self.experts.num_experts
        return self.gate.num_parameters() + self.top_k * one_expert


@dataclass(frozen=True)
class ResidualConfig:
    """How a block joins a part f to the stream x, with n its norm.

    pre: x + f(n(x)). post: n(alpha x + f(x)), with alpha > 1 DeepNorm (Wang et al. 2022).
    scaled: alpha n(x) + f(n(x)): DeepNorm as GLM writes it, the norm at the next part's start.
    """

    kind: Literal["pre", "post", "scaled"] = "pre"
    alpha: float = 1.0


@dataclass(frozen=True)
class BlockConfig:
    """One layer. `input_layernorm` belongs to the attention, `post_attention_layernorm` to the MLP."""

    self_attn: AttentionConfig
    mlp: MlpConfig | MoeConfig
    input_layernorm: NormConfig
    post_attention_layernorm: NormConfig
    residual: ResidualConfig = ResidualConfig()

    def num_parameters(self) -> int:
        norms = self.input_layernorm.num_parameters() + self.post_attention_layernorm.num_parameters()
        return self.self_attn.num_parameters() + self.mlp.num_parameters() + norms

    def num_active_parameters(self) -> int:
        return self.num_parameters() - self.mlp.num_parameters() + self.mlp.num_active_parameters()


@dataclass(frozen=True)
class HeadConfig:
    """Logits = x W^T + b. tied: W is the token table. normalized: rows of W divided by their L2 norm (Baichuan 2)."""

    in_features: int
    out_features: int
    bias: bool = False
    tied: bool = False
    normalized: bool = False
    quantization: Quantization | None = None

    def num_parameters(self) -> int:
        return self.out_features * ((0 if self.tied else self.in_features) + self.bias)


@dataclass(frozen=True)
class PrefixConfig:
    """How GLM finds the prompt in a row of tokens: it ends before the first `start_token_id` (sop).

    `two_dimensional`: positions have a second channel that counts inside the answer (ChatGLM-6B). With the mask token,
    and in two dimensions with gMASK too, the first channel stands still at the mask from sop on.
    """

    start_token_id: int
    gmask_token_id: int
    mask_token_id: int | None = None
    two_dimensional: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """A whole decoder. `source` is the config.json it came from, kept so that a save loses nothing."""

    family: str
    embed_tokens: EmbeddingConfig
    layers: tuple[BlockConfig, ...]
    norm: NormConfig | None
    lm_head: HeadConfig
    max_position_embeddings: int
    embed_positions: PositionTableConfig | None = None
    embed_norm: NormConfig | None = None
    project_in: LinearConfig | None = None
    project_out: LinearConfig | None = None
    prefix: PrefixConfig | None = None
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def vocab_size(self) -> int:
        return self.embed_tokens.num_embeddings

    @property
    def hidden_size(self) -> int:
        return self.layers[0].input_layernorm.size if self.layers else self.embed_tokens.embedding_dim

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def aux_loss_coef(self) -> float:
        return max((b.mlp.aux_loss_coef for b in self.layers if isinstance(b.mlp, MoeConfig)), default=0.0)

    def _outer_parameters(self) -> int:
        parts = (self.embed_tokens, self.embed_positions, self.embed_norm, self.project_in)
        parts_after = (self.norm, self.project_out, self.lm_head)
        return sum(part.num_parameters() for part in (*parts, *parts_after) if part)

    def num_parameters(self) -> int:
        """Exact count; a tied table counts once."""
        return self._outer_parameters() + sum(block.num_parameters() for block in self.layers)

    def num_active_parameters(self) -> int:
        """Those that one token passes: of the experts, the chosen ones."""
        return self._outer_parameters() + sum(block.num_active_parameters() for block in self.layers)

    def flops_per_token(
        self, seq_len: int, convention: Literal["palm", "causal"] = "palm", trained_parameters: int | None = None
    ) -> float:
        """FLOPs of forward and backward of one token (DESIGN section 5), recompute left out.

        palm: 6 N + 12 L h s (Chowdhery et al. 2022, appendix B). causal: N without the tables that are only looked up,
        and the half of the scores that a causal mask leaves (less with a window). `trained_parameters`: how many of N
        are trained; the others need no weight gradient, so they cost 4 and not 6.
        """
        count = self.num_active_parameters()
        if convention == "causal":
            looked_up = 0 if self.lm_head.tied else self.embed_tokens.num_parameters()
            looked_up += self.embed_positions.num_parameters() if self.embed_positions else 0
            count -= looked_up
        trained = count if trained_parameters is None else min(trained_parameters, count)
        attention = sum(b.self_attn.flops_per_token(seq_len, causal=convention == "causal") for b in self.layers)
        return 4 * count + 2 * trained + attention


def linears(node: Any, path: str = "") -> Iterator[tuple[str, LinearConfig]]:
    """Every linear layer below `node` with its module path."""
    if isinstance(node, LinearConfig):
        yield path, node
    elif isinstance(node, tuple):
        for index, child in enumerate(node):
            yield from linears(child, f"{path}.{index}" if path else str(index))
    elif dataclasses.is_dataclass(node):
        for item in dataclasses.fields(node):
            yield from linears(getattr(node, item.name), f"{path}.{item.name}" if path else item.name)


def map_linears(node: Any, change: Callable[[str, LinearConfig], LinearConfig], path: str = "") -> Any:
    """The same tree with `change(path, linear)` in place of every linear layer."""
    if isinstance(node, LinearConfig):
        return change(path, node)
    if isinstance(node, tuple):
        return tuple(map_linears(child, change, f"{path}.{i}" if path else str(i)) for i, child in enumerate(node))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = [item.name for item in dataclasses.fields(node)]
        new = {n: map_linears(getattr(node, n), change, f"{path}.{n}" if path else n) for n in names}
        return dataclasses.replace(node, **{n: v for n, v in new.items() if v is not getattr(node, n)})
    return node


def without_adapters(config: ModelConfig) -> ModelConfig:
    """The base model's tree: nothing beside its weights and nothing in fewer bits."""
    plain = map_linears(config, lambda _, linear: dataclasses.replace(linear, adapter=None, quantization=None))
    embed = dataclasses.replace(plain.embed_tokens, quantization=None)
    return dataclasses.replace(plain, embed_tokens=embed, lm_head=dataclasses.replace(plain.lm_head, quantization=None))
