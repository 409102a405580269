"""The one decoder. Every family is a tree of parts (config.py) that this builds; no family has a class of its own.

Owns the order of parts, the facts that layers share in a pass (positions, visibility), initialisation and tying.
Has no collective and no rank: parallel/ shards it from outside. Parts that are None pass through, so a pipeline stage
is this class with parts removed (`keep`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainwright.errors import UserError
from trainwright.model import mask as masks
from trainwright.model.attention import Attention, AttentionCore, LayerContext, logn_factors
from trainwright.model.cache import KVCache, LayerCache
from trainwright.model.config import BlockConfig, ModelConfig, MoeConfig, QwenNtkScaling, RopeConfig
from trainwright.model.embed import Table, build_embedding, build_head
from trainwright.model.ffn import Mlp
from trainwright.model.init import init_weights
from trainwright.model.kernels import attention as kernel
from trainwright.model.linear import build_linear
from trainwright.model.mask import AttentionMask, Visibility
from trainwright.model.moe import Moe, load_balancing_loss
from trainwright.model.norm import Norm
from trainwright.model.position import Rotary, alibi_slopes, rotary_tables


class LossOutput(NamedTuple):
    """The sum of token losses, how many tokens it sums, and the weighted load-balancing loss (0 without experts)."""

    loss_sum: Tensor
    num_tokens: Tensor
    aux_loss: Tensor


class Block(nn.Module):
    """One layer: attention, then the MLP or the experts, each joined to the stream as `residual` says."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.residual = config.residual
        self.input_layernorm = Norm(config.input_layernorm)
        self.self_attn = Attention(config.self_attn)
        self.post_attention_layernorm = Norm(config.post_attention_layernorm)
        self.mlp = Moe(config.mlp) if isinstance(config.mlp, MoeConfig) else Mlp(config.mlp)

    def forward(
        self,
        x_BSH: Tensor,
        context: LayerContext,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """-> (stream [B, S, H], router statistics [2, E] or None)."""
        inner, stream = self._enter(x_BSH, self.input_layernorm)
        out = self.self_attn(inner, context, cache)
        x_BSH = self._leave(stream, out, self.input_layernorm)
        inner, stream = self._enter(x_BSH, self.post_attention_layernorm)
        statistics = None
        if isinstance(self.mlp, Moe):
            out, statistics = self.mlp(inner, context.real_BS)
        else:
            out = self.mlp(inner)
        return self._leave(stream, out, self.post_attention_layernorm), statistics

    def _enter(self, x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """(the part's input, the stream that its output joins)."""
        if self.residual.kind == "post":
            return x, x
        normed = norm(x)
        return normed, (normed if self.residual.kind == "scaled" else x)

    def _leave(self, stream: Tensor, out: Tensor, norm: nn.Module) -> Tensor:
        if self.residual.alpha != 1.0:
            joined = torch.add(out, stream, alpha=self.residual.alpha)
        else:
            joined = stream + out
        return norm(joined) if self.residual.kind == "post" else joined


class Transformer(nn.Module):
    """Built with `Transformer(config)` on the current default device, meta included; then `init_weights` or a load."""

    alibi_slopes: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tied = config.lm_head.tied
        self.attention_backend: kernel.Backend = "auto"
        self.compute_dtype: torch.dtype | None = None  # the type of the stream, which every part computes in
        self.embed_tokens: nn.Module | None = build_embedding(config.embed_tokens)
        positions = config.embed_positions
        self.embed_positions = Table(positions.num_embeddings, positions.embedding_dim) if positions else None
        self.embed_norm = Norm(config.embed_norm) if config.embed_norm else None
        self.project_in = build_linear(config.project_in) if config.project_in else None
        self.layers: nn.ModuleDict | None = nn.ModuleDict(
            {str(index): Block(block) for index, block in enumerate(config.layers)}
        )
        self.norm: nn.Module | None = Norm(config.norm) if config.norm else None
        self.project_out = build_linear(config.project_out) if config.project_out else None
        self.lm_head: nn.Module | None = build_head(config.lm_head)
        self.register_buffer("alibi_slopes", None, persistent=False)
        self.tie_weights()
        self.reset_buffers()

    # ---- building -------------------------------------------------------------------------------------------------

    def tie_weights(self) -> None:
        """Makes the head hold the token table where the config says so; again after `to_empty`, which copies."""
        if self.tied and self.embed_tokens is not None and self.lm_head is not None:
            self.lm_head.weight = self.embed_tokens.weight

    def reset_buffers(self, device: torch.device | None = None) -> None:
        """Computes what is not a weight: the ALiBi slopes of all heads."""
        heads = {block.self_attn.num_heads for block in self.config.layers if block.self_attn.alibi}
        if heads:
            device = device or next(self.parameters()).device
            self.alibi_slopes = alibi_slopes(max(heads)).to(device)

    def keep(self, layers: Iterable[int], *, embedding: bool, head: bool) -> Transformer:
        """Removes every other part: what is left is a pipeline stage. Names stay.

        A tied head needs the token table, so the last stage keeps it under its own name and looks nothing up.
        """
        wanted = {str(index) for index in layers}
        assert self.layers is not None
        for key in list(self.layers):
            if key not in wanted:
                del self.layers[key]
        if not embedding:
            self.embed_positions = self.embed_norm = self.project_in = None
            if not (head and self.tied):
                self.embed_tokens = None
        if not head:
            self.norm = self.project_out = self.lm_head = None
        return self

    def init_weights(self, seed: int = 0) -> Transformer:
        """Random weights, the same numbers in any layout (init.py)."""
        init_weights(self, self.config.initializer_range, self.config.num_layers, seed, self.config.lm_head.tied)
        self.reset_buffers()
        return self

    # ---- one pass -------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        logits_to_keep: int = 0,
        index_S: Tensor | None = None,
        router_statistics: Tensor | None = None,
    ) -> Tensor | LossOutput | tuple[Tensor, Tensor]:
        """Logits [B, S, V], or a LossOutput when `labels` [B, S] (already shifted, -100 = not trained) are given.

        input_ids: [B, S] int64, or the stream [B, S, H] where the embedding is another stage's.
        attention_mask: [B, T] 1 = real, T = what the cache holds + S. document_ids: [B, T] int, equal ids see each
        other, -1 = padding; with it `cu_seqlens` (see `mask.document_offsets`) spares a wait for the device.
        position_ids: [B, S] ([B, 2, S] for ChatGLM-6B), else made from documents or mask, with the same rule.
        prefix_mask: [B, T] bool, true in a prompt that all see (GLM), else found from the tokens.
        logits_to_keep: only the last so many positions' logits.
        index_S: where `input_ids` and `labels` stand in their rows, when they are a part of them (sequence parallel);
        then position_ids (needed), document_ids and prefix_mask are those of whole rows.
        router_statistics: [2, E], those of earlier pipeline stages; a stage without head returns (stream, statistics).
        """
        ids = document_ids if document_ids is not None else _padding_as_documents(attention_mask)
        held = cache.held(self.layers or ()) if cache is not None else 0
        S = input_ids.shape[1]
        length = S if index_S is None or position_ids is None else position_ids.shape[-1]
        seen = self._visibility(input_ids, length, ids, prefix_mask, held, cu_seqlens, max_seqlen)
        if position_ids is None:
            if ids is None:
                check_learned_positions(self.config, held + S)
            position_ids = self.positions(input_ids, ids, held)
        at = index_S if index_S is not None else slice(-S, None)
        x_BSH = self._embed(input_ids, position_ids[..., at])
        contexts = self._contexts(x_BSH, seen, position_ids, at)
        statistics = [] if router_statistics is None else [router_statistics]
        for key, layer in (self.layers or {}).items():
            x_BSH, of_router = layer(x_BSH, contexts[key], cache.layer(key) if cache is not None else None)
            if of_router is not None:
                statistics.append(of_router)
        if self.lm_head is None:
            return (x_BSH, torch.stack(statistics).sum(0)) if router_statistics is not None else x_BSH
        x_BSH = x_BSH[:, -logits_to_keep:] if logits_to_keep else x_BSH
        x_BSH = self.norm(x_BSH) if self.norm is not None else x_BSH
        x_BSH = self.project_out(x_BSH) if self.project_out is not None else x_BSH
        if labels is None:
            return self.lm_head(x_BSH)
        loss_sum = self.lm_head(x_BSH, labels)
        return LossOutput(loss_sum, (labels != -100).sum(), self._aux_loss(statistics, loss_sum))

    def positions(self, input_ids: Tensor, document_ids: Tensor | None = None, held: int = 0) -> Tensor:
        """Position ids of whole rows (held + S of them): a running count, inside its document; GLM's rule if it has
        one, which needs the whole row's tokens."""
        S = input_ids.shape[1]
        prefix = self.config.prefix
        if prefix is not None and input_ids.dim() == 2 and held == 0:
            return masks.prompt_parts(input_ids, prefix, document_ids)[1]
        if document_ids is not None:
            return masks.document_positions(document_ids)
        return torch.arange(held + S, device=input_ids.device)[None]

    def _visibility(
        self,
        input_ids: Tensor,
        length: int,
        ids: Tensor | None,
        prefix_mask: Tensor | None,
        held: int,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
    ) -> Visibility:
        keys = ids.shape[1] if ids is not None else held + length
        prefix = self.config.prefix
        if prefix_mask is None and prefix is not None and input_ids.dim() == 2 and held == 0:
            prefix_mask = masks.prompt_parts(input_ids, prefix, ids)[0]
        return Visibility(keys - held, keys, ids, prefix_mask, cu_seqlens, max_seqlen)

    def _embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        if self.embed_tokens is None or input_ids.is_floating_point():
            return input_ids
        x_BSH = self.embed_tokens(input_ids)
        x_BSH = x_BSH.to(self.compute_dtype or x_BSH.dtype)
        if self.config.embed_tokens.scale != 1.0:
            x_BSH = x_BSH * self.config.embed_tokens.scale
        if self.project_in is not None:
            x_BSH = self.project_in(x_BSH)
        if self.embed_positions is not None and self.config.embed_positions is not None:
            rows = (position_ids + self.config.embed_positions.offset).clamp(min=0)
            x_BSH = x_BSH + self.embed_positions(rows).to(x_BSH.dtype)
        return self.embed_norm(x_BSH) if self.embed_norm is not None else x_BSH

    def _contexts(
        self, x_BSH: Tensor, seen: Visibility, position_ids: Tensor, at: Tensor | slice
    ) -> dict[str, LayerContext]:
        """Every layer's context; layers of one kind share it. `at`: which positions the stream holds."""
        device = x_BSH.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else x_BSH.dtype
        whole = seen.document_ids_BT is not None and seen.document_ids_BT.shape[1] == seen.num_keys
        real_BS = seen.document_ids_BT[:, at] >= 0 if whole and seen.document_ids_BT is not None else None
        made: dict[tuple[object, ...], LayerContext] = {}
        contexts = {}
        for key in self.layers or ():
            part = self.config.layers[int(key)].self_attn
            kind = (part.mask, part.rope, part.alibi, part.logn_length)
            if kind not in made:
                mask = AttentionMask.of(seen, part.mask)
                slopes_N = self.alibi_slopes if part.alibi else None
                wanted = self.attention_backend
                backend = kernel.choose(mask, device=device, dtype=dtype, alibi=part.alibi, wanted=wanted)
                mask = kernel.prepare(mask, backend, device=device, dtype=dtype, slopes_N=slopes_N)
                logn_BS = None
                if part.logn_length and not self.training:  # in evaluation only, as published
                    logn_BS = logn_factors(position_ids[..., at], part.logn_length)
                rotary = self._rotary(part.rope, position_ids, at) if part.rope else None
                made[kind] = LayerContext(mask, rotary, slopes_N, logn_BS, real_BS)
            contexts[key] = made[kind]
        return contexts

    def _rotary(self, rope: RopeConfig, position_ids: Tensor, at: Tensor | slice) -> Rotary:
        if not rope.dynamic:
            return rotary_tables(rope, position_ids[..., at])
        in_training_too = not isinstance(rope.scaling, QwenNtkScaling)
        active = in_training_too or not self.training
        lengths_B1 = position_ids.amax(-1, keepdim=True) + 1 if active else None
        return rotary_tables(rope, position_ids[..., at], lengths_B1)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def set_attention_backend(self, backend: kernel.Backend) -> None:
        """Fixes the attention backend of all layers; `auto` lets mask, dtype and device decide."""
        self.attention_backend = backend
        for module in self.modules():
            if isinstance(module, AttentionCore):
                module.backend = backend

    def _aux_loss(self, statistics: list[Tensor], loss_sum: Tensor) -> Tensor:
        coefficient = self.config.aux_loss_coef
        if not statistics or not coefficient:
            return loss_sum.new_zeros(())
        top_k = next(b.mlp.top_k for b in self.config.layers if isinstance(b.mlp, MoeConfig))
        return coefficient * load_balancing_loss(statistics, top_k)


def _padding_as_documents(attention_mask: Tensor | None) -> Tensor | None:
    """1, 0 -> 0, -1; other values tell documents apart, as Baichuan-13B reads them."""
    return None if attention_mask is None else attention_mask.to(torch.int32) - 1


def check_learned_positions(config: ModelConfig, length: int) -> None:
    """Learned positions end somewhere: says so before an index error does."""
    table = config.embed_positions
    if table is not None and length > table.num_embeddings - table.offset:
        raise UserError(
            f"{length} positions are more than the {table.num_embeddings - table.offset} that this model has learned: "
            "use a shorter data.seq_len or max_new_tokens"
        )
