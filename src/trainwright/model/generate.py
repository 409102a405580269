"""Tokens from a model, one at a time, with a key-value cache. Owns sampling and left padding; text is data/'s work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from trainwright.model.cache import KVCache
from trainwright.model.config import ModelConfig
from trainwright.model.position import inverse_frequencies
from trainwright.model.transformer import Transformer, check_learned_positions


def pad_left(rows: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of unequal length -> (input_ids [B, S], attention_mask [B, S]), the padding before the tokens."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def generate(
    model: Transformer,
    input_ids: Tensor | Sequence[int] | Sequence[Sequence[int]],
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_ids: Sequence[int] | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yields the next token of every row, int64 [B], until all rows have ended or `max_new_tokens` are made.

    input_ids: [B, S], left padded with `attention_mask` (1 = real), or lists of tokens, which are padded here.
    temperature 0 takes the likeliest token. top_k 0 and top_p 1 leave all tokens in. eos_token_ids default to the
    model's; a row that has ended gives its end token again. The same seed gives the same tokens.
    """
    ids, mask = _rows(input_ids, attention_mask)
    device = model.device
    ids, mask = ids.to(device), None if mask is None else mask.to(device)
    check_learned_positions(model.config, ids.shape[1] + max_new_tokens)
    ends = torch.tensor(list(model.config.eos_token_ids if eos_token_ids is None else eos_token_ids), device=device)
    random = torch.Generator(device).manual_seed(seed)
    cache = KVCache() if use_cache else None
    done_B = torch.zeros(ids.shape[0], dtype=torch.bool, device=device)
    last_B = torch.zeros_like(ids[:, 0])
    training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            with torch.no_grad():
                logits_BV = _next_logits(model, ids, mask, cache).float()
                token_B = sample(logits_BV, temperature, top_k, top_p, random)
            last_B = torch.where(done_B, last_B, token_B)
            done_B = done_B | torch.isin(last_B, ends)
            ids = torch.cat([ids, last_B[:, None]], 1)
            mask = mask if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            yield last_B
            if bool(done_B.all()):
                return
    finally:
        model.train(training)


def _rows(
    input_ids: Tensor | Sequence[int] | Sequence[Sequence[int]], mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if isinstance(input_ids, Tensor):
        return (input_ids[None] if input_ids.dim() == 1 else input_ids), mask
    rows = [input_ids] if input_ids and isinstance(input_ids[0], int) else input_ids
    ids, mask = pad_left(rows)  # type: ignore[arg-type]
    return ids, mask if len({len(row) for row in rows}) > 1 else None  # type: ignore[arg-type]


def _next_logits(model: Transformer, ids: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
    """[B, V]. Positions are made from the whole row, because some families read them from its tokens."""
    documents = None if mask is None else mask.to(torch.int32) - 1
    positions = model.positions(ids, documents)
    if cache is not None and cache.length and _stale(model.config, ids, positions, cache.length):
        cache.clear()
    held = cache.length if cache is not None else 0
    logits: Tensor = model(ids[:, held:], mask, position_ids=positions, cache=cache, logits_to_keep=1)
    return logits[:, -1]


def _stale(config: ModelConfig, ids: Tensor, positions: Tensor, held: int) -> bool:
    """Whether what the cache holds is no longer what a pass over the whole rows would compute.

    A row has outgrown the rotary frequencies of its keys (dynamic NTK), and every layer's input but the first's has
    attended by them; or GLM has said itself that its answer begins, which makes a prompt of all before.
    """
    if config.prefix is not None and bool((ids[:, held:] == config.prefix.start_token_id).any()):
        return True
    parts = (block.self_attn.rope for block in config.layers)
    for rope in {rope for rope in parts if rope is not None and rope.dynamic}:
        before, now = (p.amax(-1, keepdim=True) + 1 for p in (positions[..., :held], positions))
        if not torch.equal(inverse_frequencies(rope, before), inverse_frequencies(rope, now)):
            return True
    return False


def sample(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, random: torch.Generator) -> Tensor:
    """One token a row, int64 [B]. top_p keeps the smallest set of tokens whose probability reaches it (Holtzman et al.
    2019)."""
    if temperature <= 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
    if top_p < 1.0:
        ordered_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        before_BV = ordered_BV.softmax(-1).cumsum(-1) - ordered_BV.softmax(-1)
        ordered_BV = ordered_BV.masked_fill(before_BV >= top_p, float("-inf"))
        logits_BV = torch.empty_like(logits_BV).scatter_(1, order_BV, ordered_BV)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=random).squeeze(1)
