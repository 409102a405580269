"""Builds `tokenizers` pipelines out of raw vocabularies, exactly equal to the library that a vocabulary was made for.

Owns byte-level BPE (GPT-2 merges, tiktoken ranks) and sentencepiece. Knows no file layout: `data/tokenizer.py` reads
tokenizer folders and `model/gguf.py` reads GGUF metadata, and both build here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers


@cache
def byte_alphabet() -> tuple[str, ...]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2, Radford et al. 2019).

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return tuple(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


def byte_level_pipeline(
    ranks: Mapping[bytes, int], merges: Sequence[tuple[bytes, bytes]], pattern: str | None, ignore_merges: bool = False
) -> Tokenizer:
    """Byte-level BPE over `ranks` (token bytes to id).

    Args:
        pattern: the regular expression that cuts text into words before merging; None merges over the whole text.
        ignore_merges: a word that is itself a token needs no merges (tiktoken's rule).
    """
    alphabet = byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    spelled = [(spell(left), spell(right)) for left, right in merges]
    pipeline = Tokenizer(models.BPE(vocab=vocab, merges=spelled, ignore_merges=ignore_merges))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        pipeline.pre_tokenizer = whole
    else:
        words = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
        pipeline.pre_tokenizer = pre_tokenizers.Sequence([words, whole])
    pipeline.decoder = decoders.ByteLevel()
    return pipeline
