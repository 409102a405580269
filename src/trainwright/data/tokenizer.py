"""Text to token ids and back: one `Tokenizer` over every kind of tokenizer file.

Owns finding and reading a tokenizer (`load_tokenizer`), plain and special encoding, decoding, and writing the files
that transformers' AutoTokenizer reads. Sentencepiece and tiktoken files are read in `tokenizer_files.py`, the
configuration in `tokenizer_config.py`, chat templates are in `template.py`. Nothing from the folder is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as Pipeline

from trainwright import hub
from trainwright.data.tokenizer_config import (
    SPECIAL_KEYS,
    add_declared_tokens,
    content,
    declare_frame,
    read_config,
    read_text,
    special_frame,
    stop_ids,
    write_json,
)
from trainwright.data.tokenizer_files import NAMES, read_tokenizer_file
from trainwright.data.tokenizer_sentencepiece import SentencepiecePipeline
from trainwright.errors import UserError
from trainwright.vocabulary import byte_alphabet, byte_level_pipeline

# The byte tokenizer's ids: 0..255 are the bytes, then these. One token a role keeps chats short at one token a byte;
# <|im_start|> and <|im_end|> let it follow ChatML as well.
BYTE_SPECIALS = (
    "<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>",
    "<|im_start|>", "<|im_end|>",
)  # fmt: skip


class Encoding(NamedTuple):
    """Token ids and, for each, the half-open span of characters it stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """What the project knows of a tokenizer. Made by `load_tokenizer`.

    `pipeline` is a tokenizer.json's text, or a sentencepiece model that has none; `config` is what stands in
    tokenizer_config.json. `stop_ids` are the ids that end generation: EOS and what generation_config.json adds;
    `prefix` and `suffix` what `add_special` puts around a text.
    """

    def __init__(
        self, pipeline: str | SentencepiecePipeline, config: dict[str, Any], stop_ids: Iterable[int] = ()
    ) -> None:
        self.config = dict(config)
        self._parsing = _read_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
        changed = add_declared_tokens(self._parsing, self.config)
        changed |= declare_frame(self._parsing, self.config)
        self._json = self._parsing.to_str() if changed or not isinstance(pipeline, str) else pipeline
        self.prefix, self.suffix = special_frame(self._parsing, self.config)
        if isinstance(self._parsing, SentencepiecePipeline):
            self._plain: Pipeline | SentencepiecePipeline = self._parsing.copy()
        else:
            # Offsets must cover leading spaces, and a working pipeline adds nothing: the frame above is added here.
            self._parsing.post_processor = None
            self._parsing.no_truncation()
            self._parsing.no_padding()
            self._plain = Pipeline.from_str(self._parsing.to_str())
        self._plain.encode_special_tokens = True

        self.special_tokens = {key: content(self.config[key]) for key in SPECIAL_KEYS if self.config.get(key)}
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        self.pad_id = self._named_id("pad_token")
        self.stop_ids = tuple(dict.fromkeys([*([] if self.eos_id is None else [self.eos_id]), *stop_ids]))

    def _named_id(self, key: str) -> int | None:
        token = self.special_tokens.get(key)
        return None if token is None else self.token_id(token)

    # ---- ids ----

    def encode(self, text: str, add_special: bool = False, *, parse_special: bool = False) -> list[int]:
        """Ids of `text`.

        Args:
            add_special: adds what the tokenizer itself puts around a text (BOS for Llama, nothing for Qwen).
            parse_special: special tokens written out in the text become their ids. Off by default: text is data, and
                data that spells `<|im_end|>` must not end a turn.
        """
        pipeline = self._parsing if parse_special else self._plain
        return self._framed(_encode(pipeline, [text])[0].ids, add_special)

    def encode_batch(
        self, texts: Sequence[str], add_special: bool = False, *, parse_special: bool = False
    ) -> list[list[int]]:
        """`encode` of each text, on all threads."""
        pipeline = self._parsing if parse_special else self._plain
        return [self._framed(encoding.ids, add_special) for encoding in _encode(pipeline, texts)]

    def encode_spans(self, text: str, specials: Sequence[tuple[int, int, int]] | None = None) -> Encoding:
        """Ids of `text` with the characters each stands for; leading spaces belong to their token.

        Args:
            specials: the special tokens in `text` as (first character, one past the last, id), in order; all else is
                plain text, whatever it spells. None: every special token that the text spells is one.
        """
        _refuse_half_characters(text)
        if specials is None:
            encoding = self._parsing.encode(text, add_special_tokens=False)
            return Encoding(encoding.ids, encoding.offsets)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for start, end, token_id in [*specials, (len(text), len(text), -1)]:
            for piece_id, (first, last) in self._plain_piece(text, at, start):
                ids.append(piece_id)
                offsets.append((first, last))
            if token_id >= 0:
                ids.append(token_id)
                offsets.append((start, end))
            at = end
        return Encoding(ids, offsets)

    def _plain_piece(self, text: str, start: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """Ids and places of `text[start:end]`, a piece between special tokens."""
        # Metaspace with prepend_scheme "first" puts a space before a text's first word only; a newline before every
        # later piece keeps it from being first.
        lead = "\n" if start > 0 and self._leads else ""
        encoding = self._plain.encode(lead + text[start:end], add_special_tokens=False)
        for token_id, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            if not lead or last > len(lead):
                yield token_id, (start + first - len(lead), start + last - len(lead))

    @cached_property
    def _leads(self) -> bool:
        """Whether a word's ids depend on standing first in the text."""
        return '"prepend_scheme":"first"' in self._json.replace(" ", "").replace("\n", "")

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self._parsing.decode(list(ids), skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        """Id of one token, None when the vocabulary has no such token."""
        return self._parsing.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """The token of an id as the vocabulary spells it (`Ġthe`, `▁the`), None beyond the vocabulary."""
        return self._parsing.id_to_token(token_id)

    def _framed(self, ids: list[int], add_special: bool) -> list[int]:
        return [*self.prefix, *ids, *self.suffix] if add_special else ids

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows an embedding needs."""
        return max(self._parsing.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Every token that text never spells, with its id."""
        added = self._parsing.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in sorted(added.items()) if token.special}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides ids: equal fingerprints give equal ids."""
        state = {"pipeline": self._json, "frame": [self.prefix, self.suffix], "special": self.special_tokens}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    # ---- templates and files ----

    @property
    def chat_templates(self) -> dict[str, str]:
        """The tokenizer's own chat templates by name; most have one, `default`, some a second, `tool_use`."""
        template = self.config.get("chat_template")
        if isinstance(template, str):
            return {"default": template}
        if isinstance(template, list):
            return {entry["name"]: entry["template"] for entry in template}
        return {}

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's own chat template, None for most base models."""
        return self.chat_templates.get("default")

    def save(self, folder: str | Path, chat_template: str | None = None) -> None:
        """Writes what AutoTokenizer reads into `folder`, with `chat_template` (default: the tokenizer's own).

        `tokenizer_class` becomes PreTrainedTokenizerFast, whose meaning is "tokenizer.json as it stands". The
        model-specific classes rebuild the pipeline by rules that change between releases, so ids would follow the
        installed version and not the training. A sentencepiece model that no tokenizer.json equals is written as it is.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self.config.items() if key not in ("auto_map", "tokenizer_class")}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.setdefault("clean_up_tokenization_spaces", False)
        if chat_template is not None:
            config["chat_template"] = chat_template
        if isinstance(self._parsing, SentencepiecePipeline):
            config["tokenizer_class"] = self.config.get("tokenizer_class", "LlamaTokenizer")
            (folder / self._parsing.name).write_bytes(self._parsing.model)
        else:
            (folder / "tokenizer.json").write_text(self._json, encoding="utf-8")
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", self.special_tokens)
        # Newer readers take this file, older ones the key above.
        written = folder / "chat_template.jinja"
        template = chat_template if chat_template is not None else self.chat_template
        if template is not None:
            written.write_text(template, encoding="utf-8")
        else:
            written.unlink(missing_ok=True)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that `spec` names: a folder, a tokenizer file, a hub id, or `byte`.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    if str(spec) == "byte":
        return byte_tokenizer()
    if hub.is_id(str(spec)):
        return _load_folder(hub.fetch(str(spec), hub.TOKENIZER))
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        return _load_folder(path)
    if not path.exists():
        raise UserError(f"tokenizer {str(spec)!r} is neither a folder nor a file: give a path, or `byte`")
    if path.name == "tokenizer.json":
        return _load_folder(path.parent)
    return _load_file(path)


def _load_folder(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if file.exists():
        return Tokenizer(read_text(file), read_config(folder), stop_ids(folder))
    older = [folder / name for name in NAMES if (folder / name).exists()]
    if not older:
        raise UserError(f"{folder} holds no tokenizer.json, nor any of {', '.join(NAMES)}")
    return _load_file(older[0])


def _load_file(path: Path) -> Tokenizer:
    """A sentencepiece or tiktoken file, with the configuration that stands beside it."""
    config = read_config(path.parent)
    read = read_tokenizer_file(path, config)
    pipeline = read.pipeline if isinstance(read.pipeline, SentencepiecePipeline) else read.pipeline.to_str()
    named = {key: value for key, value in config.items() if value is not None}
    return Tokenizer(pipeline, {**read.config, **named}, [*stop_ids(path.parent), *read.stop])


def byte_tokenizer() -> Tokenizer:
    """UTF-8 bytes as tokens: no training, no file, every text round-trips. Ids 0..255 are the bytes."""
    vocab = {spelled: byte for byte, spelled in enumerate(byte_alphabet())}
    pipeline = byte_level_pipeline(vocab, merges=[], words=[])
    pipeline.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in BYTE_SPECIALS])
    config = {
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "model_max_length": 1 << 20,
        "chat_template": (Path(__file__).parent / "templates" / "byte.jinja").read_text(encoding="utf-8"),
    }
    return Tokenizer(pipeline.to_str(), config)


# ---- the pipeline ----


def _read_pipeline(tokenizer_json: str) -> Pipeline:
    try:
        return Pipeline.from_str(tokenizer_json)
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(f"tokenizer.json cannot be read: {error}") from None


def _encode(pipeline: Pipeline | SentencepiecePipeline, texts: Sequence[str]) -> list[Any]:
    try:
        return pipeline.encode_batch_fast(list(texts), add_special_tokens=False)
    except TypeError:
        for text in texts:
            _refuse_half_characters(text)
        raise


def _refuse_half_characters(text: str) -> None:
    """Lone surrogates are the one kind of Python text without UTF-8; JSON escapes can make them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text holds half a surrogate pair at character {error.start}: mend its encoding") from None
