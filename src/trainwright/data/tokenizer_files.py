"""Tokenizer files from before tokenizer.json: sentencepiece models and tiktoken ranks.

Owns reading them and what their models' published code adds: special tokens, their ids, what stands around a text.
Gives a pipeline for `tokenizer.py`, which owns everything after. Pipelines are built in `trainwright/vocabulary.py`.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, normalizers

from trainwright.data.tokenizer_sentencepiece import SentencepiecePipeline
from trainwright.errors import UserError
from trainwright.vocabulary import (
    BYTE,
    CONTROL,
    LLAMA3_WORDS,
    NORMAL,
    QWEN_WORDS,
    UNUSED,
    USER_DEFINED,
    Piece,
    frame_texts,
    ranked_pipeline,
    sentencepiece_pipeline,
)

# Special tokens that published code adds after the ranks or pieces, in the order of their ids.
LLAMA3_SPECIALS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{n}|>" for n in range(3, 248)),
]  # fmt: skip
QWEN_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205))]
CHATGLM2_SPECIALS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
CHATGLM_SPECIALS = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
CHATGLM_LONGEST_BLANK = 80

NAMES = ("tokenizer.model", "ice_text.model", "qwen.tiktoken", "spiece.model")


class Read(NamedTuple):
    """What a tokenizer file says: the pipeline, defaults for tokenizer_config.json, further ids that end generation."""

    pipeline: Tokenizer | SentencepiecePipeline
    config: dict[str, Any]
    stop: list[int]


def read_tokenizer_file(path: Path, config: Mapping[str, Any]) -> Read:
    """Reads a sentencepiece or tiktoken file; `config` is the tokenizer_config.json beside it.

    Raises:
        UserError: the file is neither, or of a model whose rules are not known.
    """
    data = path.read_bytes()
    ranks = _ranks(data)
    if ranks is not None:
        return _read_ranks(path, ranks, config)
    try:
        model = SentencepieceModel.parse(data)
    except (ValueError, IndexError, struct.error):
        raise UserError(f"{path} is neither a sentencepiece model nor a tiktoken file") from None
    if path.name == "ice_text.model":
        return _chatglm(path, model, config)
    if str(config.get("tokenizer_class")) == "ChatGLMTokenizer":
        return _chatglm2(path, data, model)
    return _sentencepiece(path, data, model)


# ---- tiktoken ----


def _ranks(data: bytes) -> dict[bytes, int] | None:
    """Token bytes to rank, None when the file is no tiktoken file."""
    try:
        lines = [line.split() for line in data.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error):
        return None
    return ranks or None


def _read_ranks(path: Path, ranks: dict[bytes, int], config: Mapping[str, Any]) -> Read:
    kind = str(config.get("tokenizer_class"))
    if path.suffix == ".tiktoken" or kind == "QWenTokenizer":
        pipeline = ranked_pipeline(ranks, QWEN_WORDS)
        pipeline.normalizer = normalizers.NFC()
        _add(pipeline, QWEN_SPECIALS, max(ranks.values()) + 1)
        return Read(pipeline, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, [])
    if kind.startswith("ChatGLM"):
        raise UserError(f"{path} is a tiktoken file of {kind}, which is not known: Llama 3 and Qwen 1 are")
    pipeline = ranked_pipeline(ranks, LLAMA3_WORDS)
    first = max(ranks.values()) + 1
    _add(pipeline, LLAMA3_SPECIALS, first)
    frame_texts(pipeline, before=["<|begin_of_text|>"])
    ends = [first + LLAMA3_SPECIALS.index(token) for token in ("<|eom_id|>", "<|eot_id|>")]
    return Read(pipeline, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}, ends)


def _add(pipeline: Tokenizer, specials: Sequence[str], first: int) -> None:
    pipeline.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    if pipeline.token_to_id(specials[0]) != first:
        raise UserError(f"the tokenizer file has gaps in its ids: {specials[0]} belongs at {first}")


# ---- sentencepiece ----


class SentencepieceModel(NamedTuple):
    """The parts of sentencepiece's ModelProto that decide ids."""

    pieces: list[Piece]
    model_type: int = 1
    byte_fallback: bool = False
    treat_whitespace_as_suffix: bool = False
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    @classmethod
    def parse(cls, data: bytes) -> SentencepieceModel:
        """Reads a ModelProto; field numbers and defaults are of sentencepiece_model.proto.

        Raises:
            ValueError, IndexError, struct.error: it is none.
        """
        pieces: list[Piece] = []
        settings: dict[str, Any] = {}
        for field, value in _fields(data):
            if field == 1:
                piece = dict(_fields(_bytes(value)))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                pieces.append(Piece(_bytes(piece[1]).decode(), score, piece.get(3, NORMAL)))
            elif field == 2:
                trainer = dict(_fields(_bytes(value)))
                settings["model_type"] = trainer.get(3, 1)
                settings["treat_whitespace_as_suffix"] = bool(trainer.get(24, 0))
                settings["byte_fallback"] = bool(trainer.get(35, 0))
            elif field == 3:
                normalizer = dict(_fields(_bytes(value)))
                settings["charsmap"] = _bytes(normalizer.get(2, b""))
                settings["add_dummy_prefix"] = bool(normalizer.get(3, 1))
                settings["remove_extra_whitespaces"] = bool(normalizer.get(4, 1))
                settings["escape_whitespaces"] = bool(normalizer.get(5, 1))
        if not pieces:
            raise ValueError("no pieces")
        return cls(pieces, **settings)

    def pipeline(self, pieces: Sequence[Piece] | None = None) -> Tokenizer | None:
        """A pipeline equal to sentencepiece, None where there is none."""
        if (
            self.model_type not in (1, 2)
            or self.charsmap
            or self.remove_extra_whitespaces
            or self.treat_whitespace_as_suffix
            or not self.escape_whitespaces
        ):
            return None
        return sentencepiece_pipeline(
            pieces or self.pieces,
            unigram=self.model_type == 1,
            add_dummy_prefix=self.add_dummy_prefix,
            byte_fallback=self.byte_fallback,
        )


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes belong")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message: an int, or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(data):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 2: None, 5: 4}.get(wire, -1)
        size = varint() if size is None else size
        if size < 0 or at + size > len(data):
            raise ValueError("no protobuf")
        yield key >> 3, data[at : at + size]
        at += size


def _sentencepiece(path: Path, data: bytes, model: SentencepieceModel) -> Read:
    """Llama 1 and 2, Baichuan and others that use their model as it is: BOS before every text."""
    controls = {piece.text for piece in model.pieces if piece.kind == CONTROL}
    defaults: dict[str, Any] = {"unk_token": next((p.text for p in model.pieces if p.kind == 2), None)}
    defaults |= {f"{name}_token": text for name, text in (("bos", "<s>"), ("eos", "</s>")) if text in controls}
    if "<pad>" in controls:
        defaults["pad_token"] = "<pad>"
    defaults |= {"add_bos_token": "<s>" in controls, "add_eos_token": False}
    return Read(model.pipeline() or SentencepiecePipeline(path, data, model.pieces), defaults, [])


def _chatglm2(path: Path, data: bytes, model: SentencepieceModel) -> Read:
    """ChatGLM2 and 3: five tokens after the pieces, and [gMASK] sop before every text."""
    pipeline = model.pipeline()
    if pipeline is None:
        raise UserError(f"{path} is no sentencepiece model of ChatGLM2 or 3: it normalizes text")
    _add(pipeline, CHATGLM2_SPECIALS, len(model.pieces))
    frame_texts(pipeline, before=["[gMASK]", "sop"])
    return Read(pipeline, {"eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}, [])


def _chatglm(path: Path, model: SentencepieceModel, config: Mapping[str, Any]) -> Read:
    """ChatGLM-6B: white space is written in tokens of its own, and [gMASK] <sop> stand after every text.

    The first checkpoints keep 20000 ids for images before the text's, and add special tokens in code.
    """
    blanks = {length: f"<|blank_{length}|>" for length in range(CHATGLM_LONGEST_BLANK, 1, -1)}
    pieces = list(model.pieces)
    if "<sop>" not in {piece.text for piece in pieces}:
        pieces += [Piece(token, 0.0, CONTROL) for token in CHATGLM_SPECIALS]
        pieces += [Piece(token, 0.0, USER_DEFINED) for token in ("<|tab|>", *reversed(blanks.values()))]
        pieces += [Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
        model = model._replace(byte_fallback=True)
    images = int(config.get("num_image_tokens", 20000))
    pipeline = model.pipeline([*(Piece(f"<image_{n}>", 0.0, UNUSED) for n in range(images)), *pieces])
    if pipeline is None:
        raise UserError(f"{path} is no sentencepiece model of ChatGLM-6B: it normalizes text")
    spelled = [("\n", "<n>"), ("\t", "<|tab|>"), *((" " * length, token) for length, token in blanks.items())]
    pipeline.normalizer = normalizers.Sequence(
        [*(normalizers.Replace(text, token) for text, token in spelled), pipeline.normalizer]
    )
    unspelled = [decoders.Replace(token, text) for text, token in spelled]
    pipeline.decoder = decoders.Sequence([pipeline.decoder, *unspelled])
    frame_texts(pipeline, before=[], after=["[gMASK]", "<sop>"])
    defaults = {"bos_token": "<sop>", "eos_token": "<eop>", "unk_token": "<unk>", "mask_token": "[MASK]"}
    return Read(pipeline, {**defaults, **({"pad_token": "<pad>"} if "<pad>" in {p.text for p in pieces} else {})}, [])
