"""The tokenizer that a GGUF file's metadata describes, as the files that transformers' AutoTokenizer reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers

from trainwright.errors import UserError
from trainwright.vocabulary import (
    CONTROL,
    DIGITS,
    GPT2_WORDS,
    LLAMA3_WORDS,
    NORMAL,
    QWEN_WORDS,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    byte_level_pipeline,
    frame_texts,
    sentencepiece_pipeline,
)

# tokenizer.ggml.pre -> the expressions that cut text into words.
_CUTS: dict[tuple[str, ...], tuple[str, ...]] = {
    (GPT2_WORDS,): ("gpt-2", "gpt2", "mpt", "olmo", "default"),
    (DIGITS, GPT2_WORDS): ("smollm", "starcoder", "refact", "command-r", "codeshell"),
    (LLAMA3_WORDS,): ("llama-bpe", "llama3", "llama-v3", "smaug-bpe"),
    (QWEN_WORDS,): ("qwen2", "deepseek-r1-qwen"),
}
_WORDS = {name: words for words, names in _CUTS.items() for name in names}
_TOKENS = "tokenizer.ggml.tokens"


def write_tokenizer(values: Mapping[str, Any], folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json from GGUF metadata.

    Raises:
        UserError: the metadata has no tokenizer, or one of a kind that is not known.
    """
    tokens: list[str] = values.get(_TOKENS) or []
    if not tokens:
        raise UserError("the GGUF file has no tokenizer (tokenizer.ggml.tokens)")
    kind = values.get("tokenizer.ggml.model")
    if kind == "gpt2":
        pipeline = _bpe(values, tokens)
    elif kind == "llama":
        pipeline = _sentencepiece(values, tokens)
    else:
        raise UserError(f"the GGUF file's tokenizer is a {kind!r}: gpt2 and llama can be imported")
    config = _config(values, tokens)
    if config["add_bos_token"] and "bos_token" in config:
        frame_texts(pipeline, before=[config["bos_token"]])
    (folder / "tokenizer.json").write_text(pipeline.to_str(pretty=True), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", config)
    stops = [values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    found = list(dict.fromkeys(int(stop) for stop in stops if stop is not None))
    if found:
        _write_json(folder / "generation_config.json", {"eos_token_id": found if len(found) > 1 else found[0]})


def _bpe(values: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    """Byte-level BPE: tokens are spelled in GPT-2's byte alphabet, merges come along."""
    pre = values.get("tokenizer.ggml.pre", "default")
    if pre not in _WORDS:
        raise UserError(f"tokenizer.ggml.pre={pre!r} is not known: {', '.join(_WORDS)} can be imported")
    merges = [tuple(merge.split(" ")) for merge in values.get("tokenizer.ggml.merges") or []]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise UserError("the GGUF file's tokenizer has no merges, or broken ones (tokenizer.ggml.merges)")
    kinds = _kinds(values, tokens)
    vocab = {token: at for at, token in enumerate(tokens)}
    try:
        pipeline = byte_level_pipeline(vocab, merges, _WORDS[pre], ignore_merges=_WORDS[pre] == (LLAMA3_WORDS,))
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(f"the GGUF file's tokenizer is broken: {error}") from None
    if _WORDS[pre] == (QWEN_WORDS,):
        pipeline.normalizer = normalizers.NFC()
    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, UNKNOWN)]
    pipeline.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, _ in added])
    defined = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    pipeline.add_tokens([AddedToken(token, normalized=False) for token in defined])
    return pipeline


def _sentencepiece(values: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    scores = values.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    kinds = _kinds(values, tokens)
    pipeline = sentencepiece_pipeline(
        [Piece(*entry) for entry in zip(tokens, scores, kinds, strict=True)],
        unigram=False,
        add_dummy_prefix=bool(values.get("tokenizer.ggml.add_space_prefix", True)),
        byte_fallback="<0x00>" in tokens,
    )
    if pipeline is None:
        raise UserError("the GGUF file's sentencepiece tokenizer has no exact tokenizer.json: use the model's own")
    return pipeline


def _kinds(values: Mapping[str, Any], tokens: list[str]) -> list[int]:
    return values.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)


def _config(values: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """tokenizer_config.json's keys."""
    sentencepiece = values.get("tokenizer.ggml.model") == "llama"
    llama3 = _WORDS.get(values.get("tokenizer.ggml.pre", "default")) == (LLAMA3_WORDS,)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(values.get("tokenizer.ggml.add_bos_token", sentencepiece or llama3)),
        "clean_up_tokenization_spaces": False,
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = values.get(f"tokenizer.ggml.{theirs}_token_id")
        if token_id is not None and 0 <= token_id < len(tokens):
            config[f"{ours}_token"] = tokens[token_id]
    length = values.get(f"{values.get('general.architecture')}.context_length")
    if length is not None:
        config["model_max_length"] = int(length)
    if values.get("tokenizer.chat_template"):
        config["chat_template"] = values["tokenizer.chat_template"]
    return config


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
