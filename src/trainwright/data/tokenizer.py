"""Text to token ids and back: one `Tokenizer` over every kind of tokenizer file.

Owns finding and reading a tokenizer (`load_tokenizer`), plain and special encoding, decoding, and writing the files
that transformers' AutoTokenizer reads. Building a pipeline out of sentencepiece, tiktoken or byte vocabularies is in
`trainwright/vocabulary.py`; chat templates are in `template.py`. Nothing from the folder is executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as Pipeline

from trainwright.errors import UserError
from trainwright.vocabulary import byte_alphabet, byte_level_pipeline

SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

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

    `tokenizer_json` is the pipeline in the format of the `tokenizers` library and `config` what stands in
    tokenizer_config.json. `stop_ids` are the ids that end generation: EOS and what generation_config.json adds.
    """

    def __init__(self, tokenizer_json: str, config: dict[str, Any], stop_ids: Iterable[int] = ()) -> None:
        self.config = dict(config)
        self._json = tokenizer_json
        self._parsing = _read_pipeline(tokenizer_json)
        if _add_declared_tokens(self._parsing, self.config):
            self._json = self._parsing.to_str()
        self._prefix, self._suffix = _special_frame(self._parsing, self.config)
        # Offsets must cover leading spaces, and a working pipeline adds nothing: the frame above is added here.
        self._parsing.post_processor = None
        self._parsing.no_truncation()
        self._parsing.no_padding()
        self._plain = Pipeline.from_str(self._parsing.to_str())
        self._plain.encode_special_tokens = True

        self.special_tokens = {key: _content(self.config[key]) for key in SPECIAL_KEYS if self.config.get(key)}
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
            if last > len(lead):
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
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

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
        state = {"pipeline": self._json, "frame": [self._prefix, self._suffix], "special": self.special_tokens}
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
        installed version and not the training.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self.config.items() if key not in ("auto_map", "tokenizer_class")}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.setdefault("clean_up_tokenization_spaces", False)
        if chat_template is not None:
            config["chat_template"] = chat_template
        (folder / "tokenizer.json").write_text(self._json, encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", config)
        _write_json(folder / "special_tokens_map.json", self.special_tokens)
        # Newer readers take this file, older ones the key above.
        written = folder / "chat_template.jinja"
        template = chat_template if chat_template is not None else self.chat_template
        if template is not None:
            written.write_text(template, encoding="utf-8")
        else:
            written.unlink(missing_ok=True)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that `spec` names: a folder, a tokenizer file, or `byte`.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    if str(spec) == "byte":
        return byte_tokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        return _load_folder(path)
    if not path.exists():
        raise UserError(f"tokenizer {str(spec)!r} is neither a folder nor a file: give a path, or `byte`")
    if path.name == "tokenizer.json":
        return _load_folder(path.parent)
    raise UserError(f"{path} is no tokenizer file that is known: give tokenizer.json")


def _load_folder(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise UserError(f"{folder} holds no tokenizer.json")
    return Tokenizer(_read_text(file), _read_config(folder), _stop_ids(folder))


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


# ---- reading a folder ----


def _read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with what the neighbouring files add to it."""
    config = _read_json(folder / "tokenizer_config.json")
    for key, value in _read_json(folder / "special_tokens_map.json").items():
        config.setdefault(key, value)
    if (folder / "chat_template.jinja").exists():
        config["chat_template"] = _read_text(folder / "chat_template.jinja")
    elif isinstance(stored := _read_json(folder / "chat_template.json").get("chat_template"), str):
        config["chat_template"] = stored
    return config


def _stop_ids(folder: Path) -> list[int]:
    """The ids that generation_config.json, or else config.json, ends at."""
    for name in ("generation_config.json", "config.json"):
        found = _read_json(folder / name).get("eos_token_id")
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} where there is none."""
    if not path.exists():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is broken JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- the pipeline ----


def _read_pipeline(tokenizer_json: str) -> Pipeline:
    try:
        return Pipeline.from_str(tokenizer_json)
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(f"tokenizer.json cannot be read: {error}") from None


def _add_declared_tokens(pipeline: Pipeline, config: dict[str, Any]) -> bool:
    """Adds tokens that tokenizer_config.json names and tokenizer.json lacks, as AutoTokenizer does. True if any."""
    known = {token.content for token in pipeline.get_added_tokens_decoder().values()}
    missing: list[AddedToken] = []
    declared = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        if _content(entry) not in known:
            missing.append(_added_token(entry))
    named = [config[key] for key in SPECIAL_KEYS if config.get(key)]
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    named += extra.values() if isinstance(extra, dict) else extra
    seen = known | {token.content for token in missing}
    for entry in named:
        if _content(entry) not in seen:
            seen.add(_content(entry))
            missing.append(_added_token(entry if isinstance(entry, dict) else {"content": entry, "special": True}))
    if missing:
        pipeline.add_tokens(missing)
    return bool(missing)


def _added_token(entry: dict[str, Any]) -> AddedToken:
    flags = {key: bool(entry[key]) for key in ("single_word", "lstrip", "rstrip", "special") if key in entry}
    return AddedToken(entry["content"], normalized=bool(entry.get("normalized", False)), **flags)


def _content(token: str | dict[str, Any]) -> str:
    """A special token's text; tokenizer_config.json writes it bare or as an object."""
    return token["content"] if isinstance(token, dict) else token


def _special_frame(pipeline: Pipeline, config: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Ids put before and after a text by `add_special`."""
    if "add_bos_token" in config or "add_eos_token" in config:
        frames: list[list[int]] = []
        for kind in ("bos", "eos"):
            token = config.get(f"{kind}_token") if config.get(f"add_{kind}_token") else None
            token_id = None if token is None else pipeline.token_to_id(_content(token))
            frames.append([] if token_id is None else [token_id])
        return frames[0], frames[1]
    bare = pipeline.encode("a", add_special_tokens=False).ids
    framed = pipeline.encode("a", add_special_tokens=True).ids
    if len(framed) == len(bare):
        return [], []
    start = next(at for at in range(len(framed)) if framed[at : at + len(bare)] == bare)
    return framed[:start], framed[start + len(bare) :]


def _encode(pipeline: Pipeline, texts: Sequence[str]) -> list[Any]:
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
