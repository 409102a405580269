"""Builds `tokenizers` pipelines out of raw vocabularies, exactly equal to the library that a vocabulary was made for.

Owns byte-level BPE (GPT-2 merges, tiktoken ranks) and sentencepiece. Knows no file layout: `data/tokenizer.py` reads
tokenizer folders and `model/gguf.py` reads GGUF metadata, and both build here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

# How families cut text into words before merging, as they published it.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"\p{N}"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")

# Kinds of sentencepiece pieces, numbered as sentencepiece and GGUF do.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "▁"


class Piece(NamedTuple):
    """One entry of a sentencepiece vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@cache
def byte_alphabet() -> tuple[str, ...]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2, Radford et al. 2019).

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return tuple(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


def byte_level_pipeline(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], words: Sequence[str], ignore_merges: bool = False
) -> Tokenizer:
    """Byte-level BPE.

    Args:
        vocab: tokens spelled in `byte_alphabet`, and their ids.
        words: regular expressions that cut text into words before merging, each cutting what the one before left;
            none merges over the whole text.
        ignore_merges: a word that is itself a token needs no merges (tiktoken's rule).
    """
    pipeline = Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges), ignore_merges=ignore_merges))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False) for pattern in words]
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    pipeline.decoder = decoders.ByteLevel()
    return pipeline


def ranked_pipeline(ranks: Mapping[bytes, int], words: str) -> Tokenizer:
    """Byte-level BPE from tiktoken ranks: of all neighbours whose union is a token, the lowest rank merges first."""
    alphabet = byte_alphabet()
    vocab = {"".join(alphabet[byte] for byte in token): rank for token, rank in ranks.items()}
    return byte_level_pipeline(vocab, _merges(vocab), [words], ignore_merges=True)


def frame_texts(pipeline: Tokenizer, before: Sequence[str], after: Sequence[str] = ()) -> None:
    """Makes the pipeline put special tokens around every text when asked to (`add_special_tokens`)."""
    pipeline.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=[(token, pipeline.token_to_id(token)) for token in (*before, *after)],
    )


def _merges(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of tokens whose union is a token, in the order of the union's rank; see `_ladder` for ties."""
    pairs = [
        (rank, token[:cut] != token[cut:], len(token), token[:cut], token[cut:])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return [(left, right) for *_, left, right in sorted(pairs, key=lambda pair: pair[:3])]


# ---- sentencepiece ----


def sentencepiece_pipeline(
    pieces: Sequence[Piece], *, unigram: bool, add_dummy_prefix: bool, byte_fallback: bool
) -> Tokenizer | None:
    """A pipeline equal to sentencepiece on every text, for models without text normalization.

    None where no pipeline is exactly equal, and sentencepiece itself has to encode. Control pieces become special
    tokens; each text between two of them is encoded as a text of its own, with its own prefix, as the published code
    of Llama, Baichuan and ChatGLM does.
    """
    unknown = next((at for at, piece in enumerate(pieces) if piece.kind == UNKNOWN), None)
    if unknown is None or len({piece.text for piece in pieces}) < len(pieces):
        return None
    if unigram:
        pipeline = _unigram(pieces, unknown, byte_fallback)
    else:
        pipeline = _bpe(pieces, unknown, add_dummy_prefix, byte_fallback)
    if pipeline is None:
        return None
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    pipeline.normalizer = normalizers.Sequence([*([normalizers.Prepend(SPACE)] if add_dummy_prefix else []), *spaces])
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    pipeline.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if add_dummy_prefix else [])])
    special = [piece.text for piece in pieces if piece.kind in (UNKNOWN, CONTROL)]
    pipeline.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    if not unigram:
        defined = [piece.text for piece in pieces if piece.kind == USER_DEFINED]
        pipeline.add_tokens([AddedToken(text, normalized=False) for text in defined])
    return pipeline


def _bpe(pieces: Sequence[Piece], unknown: int, add_dummy_prefix: bool, byte_fallback: bool) -> Tokenizer | None:
    """Sentencepiece BPE merges the neighbours whose union has the best score, the leftmost first."""
    normal = {piece.text: -piece.score for piece in pieces if piece.kind == NORMAL}
    ties: dict[float, list[str]] = {}
    for text, rank in normal.items():
        if len(text) > 1:
            ties.setdefault(rank, []).append(text)
    kinds = Counter(piece.kind for piece in pieces)
    if (
        kinds[UNUSED]  # sentencepiece cuts them up again
        or (kinds[USER_DEFINED] and add_dummy_prefix)  # the prefix comes once, a pipeline puts it after each
        or not all(len(tied) == 1 or _ladder(tied) for tied in ties.values())
        or not _spelled_by_pieces(normal)  # pairs are made of pieces only
    ):
        return None
    vocab = {piece.text: at for at, piece in enumerate(pieces)}
    return Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(normal),
            unk_token=pieces[unknown].text,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )


def _ladder(tied: Sequence[str]) -> bool:
    """Whether pieces of equal score are runs of one character of every length up to a power of two.

    Equal scores go to the leftmost pair in sentencepiece, while a pipeline has an order of pairs. For such runs
    (Llama's spaces, up to 16) both end the same: full runs from the left, then the rest. Here twins merge first (1+1,
    2+2, ...), which leaves the binary digits of the length, and then those join.
    """
    lengths = sorted(len(text) for text in tied)
    longest = lengths[-1]
    one_character = len(set("".join(tied))) == 1
    return one_character and lengths == list(range(2, longest + 1)) and longest & (longest - 1) == 0


def _unigram(pieces: Sequence[Piece], unknown: int, byte_fallback: bool) -> Tokenizer | None:
    """Sentencepiece Unigram takes the cut with the best sum of scores (Kudo 2018)."""
    normal = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    hidden = [piece for piece in pieces if piece.kind in (UNKNOWN, CONTROL, UNUSED, BYTE)]
    # A pipeline can match every piece. Text that spells one of the hidden ones must find a better cut, so they score
    # below anything; that holds where all their characters are pieces.
    if not _spelled_by_pieces(normal) or not all(char in normal for piece in hidden for char in piece.text):
        return None
    best = max(normal.values())

    def score(piece: Piece) -> float:
        if piece.kind == USER_DEFINED:  # sentencepiece's bonus, by which they always win
            return len(piece.text.encode()) * best - 0.1
        return piece.score if piece.kind == NORMAL else -1e6

    vocab = [(piece.text, score(piece)) for piece in pieces]
    return Tokenizer(models.Unigram(vocab, unk_id=unknown, byte_fallback=byte_fallback))


def _spelled_by_pieces(normal: Mapping[str, float]) -> bool:
    """Whether every character of every piece is a piece."""
    return all(char in normal for text in normal for char in text)
