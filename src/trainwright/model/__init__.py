"""The model: one decoder for every family, built from a tree of parts. Knows nothing of recipes, data or layouts.

Shape suffixes of tensors in this package:
    B batch, S query positions, T key positions (past + S), H hidden size, D head_dim,
    N query heads, K key-value heads, V vocabulary, I width of an MLP, E experts, R rotary pairs, C position channels,
    M rows of a flattened batch (B x S).
"""
