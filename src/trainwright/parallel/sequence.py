"""Context parallel: every rank holds a part of each row's tokens, and attention crosses the parts.

    Ulysses   all-to-all before and after attention: whole rows for a slice of the heads (Jacobs et al. 2023)
    ring      keys and values gathered over the ranks, queries in head-tail chunks so that all ranks work the same
              (Liu et al. 2023; gathered as in Llama 3, section 3.3.2)
    both      Ulysses inside, ring outside (Fang & Zhao 2024)

Owns cutting the batch, the attention core that replaces the model's own, and the experts' statistics over whole rows.
Masks, biases and positions are always those of the whole row, so packed documents, windows, prefixes and ALiBi need
nothing special. Which of the three is `split.choose_row_split`'s choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from trainwright.model import mask as masks
from trainwright.model.attention import Attention, AttentionCore, LayerContext
from trainwright.model.kernels import attention as kernel
from trainwright.model.mask import AttentionMask, Visibility
from trainwright.model.moe import Moe
from trainwright.model.transformer import Transformer
from trainwright.parallel.collectives import all_gather, all_reduce, all_to_all
from trainwright.parallel.split import RowSplit, kv_copies

_IGNORED = -100


Contexts = dict[str, LayerContext]


@dataclass(frozen=True)
class SplitMask(AttentionMask):
    """A mask of whole rows, and what it says of this rank's queries: one mask a chunk of them."""

    parts: tuple[AttentionMask, ...] = ()


class Rows:
    """This process's part of every row, and the neighbours that hold the others."""

    def __init__(self, mesh: DeviceMesh, split: RowSplit) -> None:
        self.split = split
        self.group = mesh.get_group()
        rank = mesh.get_local_rank()
        self.ring_index, self.ulysses_index = divmod(rank, split.ulysses)
        if 1 < split.ulysses < mesh.size():
            cut = mesh._unflatten(0, (split.ring, split.ulysses), ("ring", "ulysses"))
            self.ring_group, self.ulysses_group = cut["ring"].get_group(), cut["ulysses"].get_group()
        else:
            self.ring_group = self.ulysses_group = self.group
        self.backend: kernel.Backend = "auto"
        self._parts: dict[tuple[torch.device, int], Tensor] = {}

    def part_on(self, device: torch.device, length: int) -> Tensor:
        """`part` on a device, copied there once a length."""
        key = (device, length)
        if key not in self._parts:
            self._parts[key] = self.part(length).to(device)
        return self._parts[key]

    def part(self, length: int) -> Tensor:
        """Where this rank's tokens stand in a row of `length`, a multiple of `split.multiple`; [length / cp] int64."""
        pieces = torch.arange(length).chunk(1 if self.split.ring == 1 else 2 * self.split.ring)
        own = torch.cat([pieces[chunk] for chunk in self.split.chunks(self.ring_index)])
        return own.chunk(self.split.ulysses)[self.ulysses_index]

    def contexts(self, whole: Callable[..., Contexts], x_BSH: Tensor, *facts: Any) -> Contexts:
        """In place of the model's own: what its layers share, with the masks and slopes of this rank's queries.

        `whole` gives those of whole rows, and `facts` end with where the stream stands in them.
        """
        contexts = whole(x_BSH, *facts)
        if not isinstance(facts[-1], Tensor):
            return contexts
        own = {id(context): self._own(context, x_BSH) for context in contexts.values()}
        return {key: own[id(context)] for key, context in contexts.items()}

    def _own(self, context: LayerContext, x_BSH: Tensor) -> LayerContext:
        slopes_N, mask = context.slopes_N, context.mask
        device, dtype = x_BSH.device, x_BSH.dtype
        if slopes_N is not None and self.split.ulysses > 1:
            slopes_N = slopes_N.chunk(self.split.ulysses)[self.ulysses_index]
        parts = [mask]
        if self.split.ring > 1 or slopes_N is not None:
            chunks = self.split.chunks(self.ring_index)
            parts = [_chunk_mask(mask, chunk, 2 * self.split.ring, x_BSH.shape[0], device) for chunk in chunks]
        for index, part in enumerate(parts):
            alibi = slopes_N is not None
            chosen = kernel.choose(part, device=device, dtype=dtype, alibi=alibi, wanted=self.backend)
            parts[index] = kernel.prepare(part, chosen, device=device, dtype=dtype, slopes_N=slopes_N)
        return replace(context, mask=SplitMask(mask.seen, mask.window, parts=tuple(parts)), slopes_N=slopes_N)


def _chunk_mask(mask: AttentionMask, chunk: int, chunks: int, rows: int, device: torch.device) -> AttentionMask:
    """The mask of one chunk of a row's queries. Causal: over the keys up to its end. Prefix: over all keys, dense."""
    seen = mask.seen
    if chunks == 2:  # a ring of one: whole rows
        return replace(mask, bias_BNST=None)
    size = seen.num_keys // chunks
    begin, end = chunk * size, (chunk + 1) * size
    if seen.prefix_BT is not None:
        plain = AttentionMask(seen, mask.window, mask.allowed_BNST)
        allowed = plain.dense(device)[:, :, begin:end]
        return AttentionMask(replace(seen, num_queries=size, cu_seqlens=None), mask.window, allowed)
    ids = None if seen.document_ids_BT is None else seen.document_ids_BT[:, :end]
    window = mask.window if mask.window is not None and mask.window < end else None
    part = Visibility(size, end, ids)
    if device.type != "cpu":
        keys, queries = offsets(part, rows, device)
        part = replace(part, cu_seqlens=keys, query_cu_seqlens=queries)
    return AttentionMask(part, window)


def offsets(part: Visibility, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each document's keys and its queries begin, for queries that are the last of the keys of `rows` rows.

    A document that has ended before them has keys and no query.
    """
    if part.document_ids_BT is not None:
        keys = masks.document_offsets(part.document_ids_BT)
    else:
        keys = torch.arange(0, (rows + 1) * part.num_keys, part.num_keys, dtype=torch.int32, device=device)
    begin, end = keys[:-1] % part.num_keys, (keys[1:] - 1) % part.num_keys + 1
    count = (end - begin.clamp(min=part.num_keys - part.num_queries)).clamp(min=0)
    return keys, F.pad(count.cumsum(0), (1, 0)).int()


class SplitCore(nn.Module):
    """Attention over whole rows from every rank's part of q, k and v: [B, S / cp, heads, D] in and out.

    q, k and v of whole rows (generation, a pass without labels) go to the model's own core as they are.
    """

    def __init__(self, core: AttentionCore, rows: Rows) -> None:
        super().__init__()
        self.core = core
        self.rows = rows

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, slopes_N: Tensor | None = None) -> Tensor:
        if not isinstance(mask, SplitMask):
            return self.core(q, k, v, mask, slopes_N)
        split = self.rows.split
        if split.ulysses > 1:
            q, k, v = self._to_heads(q, k, v)
        if split.ring > 1:
            k, v = self._gather(torch.stack([k, v]))
        outs = []
        for queries, part in zip(q.chunk(len(mask.parts), 1), mask.parts, strict=True):
            keys = part.seen.num_keys
            outs.append(self.core(queries, k[:, :keys], v[:, :keys], part, slopes_N))
        out = torch.cat(outs, 1) if len(outs) > 1 else outs[0]
        return self._to_tokens(out) if split.ulysses > 1 else out

    def _to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, s, heads, D] -> [B, u s, heads / u, D], in one exchange."""
        u = self.rows.split.ulysses
        copies = kv_copies(k.shape[2], u)
        if copies > 1:
            k, v = k.repeat_interleave(copies, 2), v.repeat_interleave(copies, 2)
        heads = [q.shape[2] // u, k.shape[2] // u, v.shape[2] // u]
        parts = [x.unflatten(2, (u, -1)).movedim(2, 0) for x in (q, k, v)]
        sent = torch.cat(parts, 3)  # [u, B, s, own heads of q, k, v, D]
        got = all_to_all(sent, self.rows.ulysses_group)
        q, k, v = got.movedim(0, 1).flatten(1, 2).split(heads, 2)
        return q, k, v

    def _to_tokens(self, out: Tensor) -> Tensor:
        """[B, u s, heads / u, D] -> [B, s, heads, D]."""
        u = self.rows.split.ulysses
        sent = out.unflatten(1, (u, -1)).movedim(1, 0)
        got = all_to_all(sent, self.rows.ulysses_group)  # [u, B, s, heads / u, D]
        return got.movedim(0, 2).flatten(2, 3)

    def _gather(self, x: Tensor) -> Tensor:
        """[2, B, s, K, D] of every ring index -> [2, B, ring s, K, D] in the row's order."""
        ring = self.rows.split.ring
        got = all_gather(x[None], self.rows.ring_group)  # [ring, 2, B, s, K, D]
        halves = got.unflatten(3, (2, -1)).movedim(3, 1).flatten(0, 1)  # [2 ring, 2, B, s / 2, K, D]
        order = [chunk for index in range(ring) for chunk in self.rows.split.chunks(index)]
        in_order = torch.stack([halves[order.index(chunk)] for chunk in range(2 * ring)], 2)
        return in_order.flatten(2, 3)


def apply_sequence(model: Transformer, mesh: DeviceMesh, split: RowSplit) -> Rows:
    """Makes `model` take whole rows with labels and work on this rank's part of them, in place.

    The loss and the token count that it returns are the part's: they sum over the ranks. Give every rank the same rows.
    """
    rows = Rows(mesh, split)
    rows.backend = model.attention_backend
    for module in list(model.modules()):
        if isinstance(module, Attention):
            module.core = SplitCore(module.core, rows)  # type: ignore[assignment]
        elif isinstance(module, Moe):
            module.register_forward_hook(_Statistics(rows))
    model._contexts = partial(rows.contexts, model._contexts)  # type: ignore[method-assign]
    model.register_forward_pre_hook(_Cut(rows), with_kwargs=True)
    return rows


class _Statistics:
    """The router's statistics over all ranks' tokens, so that the load-balancing loss is that of whole rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return output[0], all_reduce(output[1], self.rows.group)


class _Cut:
    """Before a pass with labels: this rank's tokens and labels; positions, documents and prefixes of whole rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("labels") is None or kwargs.get("cache") is not None:
            return None
        assert isinstance(model, Transformer)
        tokens = args[0] if args else kwargs.pop("input_ids")
        kwargs = whole_row_facts(model, tokens, *args[1:], **kwargs)
        length = kwargs["labels"].shape[1]
        missing = -length % self.rows.split.multiple
        if missing:
            tokens, kwargs = _pad(tokens, kwargs, missing)
        part = self.rows.part_on(tokens.device, length + missing)
        if tokens.dim() == 2:  # else the stream of an earlier stage, which has this rank's part already
            tokens = tokens[:, part]
        return (tokens,), {**kwargs, "labels": kwargs["labels"][:, part], "index_S": part}


def whole_row_facts(
    model: Transformer,
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    **rest: Any,
) -> dict[str, Any]:
    """Keyword arguments for a pass of `model` over a part of the rows or over a stage that does not see the tokens:
    everything that the model would read from whole rows of tokens is made from them."""
    if attention_mask is not None and document_ids is None:
        document_ids = attention_mask.to(torch.int32) - 1
    cache = rest.get("cache")
    if tokens.dim() == 2 and not (cache is not None and cache.length):
        if position_ids is None:
            position_ids = model.positions(tokens, document_ids)
        if prefix_mask is None and model.config.prefix is not None:
            prefix_mask = masks.prompt_parts(tokens, model.config.prefix, document_ids)[0]
    facts = {"position_ids": position_ids, "document_ids": document_ids, "prefix_mask": prefix_mask}
    return {**rest, **facts}


def _pad(tokens: Tensor, kwargs: dict[str, Any], missing: int) -> tuple[Tensor, dict[str, Any]]:
    """`missing` tokens of no document at the end of each row."""
    if kwargs.get("document_ids") is None:
        kwargs["document_ids"] = torch.zeros_like(kwargs["labels"], dtype=torch.int32)
    fill = {"position_ids": 0, "document_ids": -1, "prefix_mask": 0, "labels": _IGNORED}
    padded = {
        name: F.pad(kwargs[name], (0, missing), value=value)
        for name, value in fill.items()
        if kwargs.get(name) is not None
    }
    if tokens.dim() == 2:
        tokens = F.pad(tokens, (0, missing))
    return tokens, {**kwargs, **padded, "cu_seqlens": None, "max_seqlen": None}
