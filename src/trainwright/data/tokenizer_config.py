"""tokenizer_config.json and its neighbours: what a tokenizer folder says besides the pipeline itself.

Owns reading those files, adding the tokens that only they name, and the special tokens put around a text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Pipeline

from trainwright.data.tokenizer_sentencepiece import SentencepiecePipeline
from trainwright.errors import UserError
from trainwright.vocabulary import frame_texts

SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with what the neighbouring files add to it."""
    config = read_json(folder / "tokenizer_config.json")
    for key, value in read_json(folder / "special_tokens_map.json").items():
        config.setdefault(key, value)
    if (folder / "chat_template.jinja").exists():
        config["chat_template"] = read_text(folder / "chat_template.jinja")
    elif isinstance(stored := read_json(folder / "chat_template.json").get("chat_template"), str):
        config["chat_template"] = stored
    return config


def stop_ids(folder: Path) -> list[int]:
    """The ids that generation_config.json, or else config.json, ends at."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name).get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(isinstance(each, int) for each in ids):
            raise UserError(f"{folder / name}: eos_token_id={found!r} is neither an id nor a list of ids: correct it")
        return ids
    return []


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} where there is none."""
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is broken JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def add_declared_tokens(pipeline: Pipeline | SentencepiecePipeline, config: dict[str, Any]) -> bool:
    """Adds tokens that tokenizer_config.json names and tokenizer.json lacks, as AutoTokenizer does. True if any."""
    known = {token.content for token in pipeline.get_added_tokens_decoder().values()}
    missing: list[AddedToken] = []
    declared = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        if content(entry) not in known:
            missing.append(_added_token(entry))
    named = [config[key] for key in SPECIAL_KEYS if config.get(key)]
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    named += extra.values() if isinstance(extra, dict) else extra
    seen = known | {token.content for token in missing}
    for entry in named:
        if content(entry) not in seen:
            seen.add(content(entry))
            missing.append(_added_token(entry if isinstance(entry, dict) else {"content": entry, "special": True}))
    if missing:
        pipeline.add_tokens(missing)
    for token_id, entry in declared.items():
        if pipeline.token_to_id(content(entry)) != int(token_id):
            raise UserError(
                f"tokenizer_config.json puts {content(entry)!r} at id {token_id}, the tokenizer has it at "
                f"{pipeline.token_to_id(content(entry))}: the two files are of different models"
            )
    return bool(missing)


def _added_token(entry: dict[str, Any]) -> AddedToken:
    flags = {key: bool(entry[key]) for key in ("single_word", "lstrip", "rstrip", "special") if key in entry}
    return AddedToken(entry["content"], normalized=bool(entry.get("normalized", False)), **flags)


def content(token: str | dict[str, Any]) -> str:
    """A special token's text; tokenizer_config.json writes it bare or as an object."""
    return token["content"] if isinstance(token, dict) else token


def special_frame(pipeline: Pipeline | SentencepiecePipeline, config: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Ids put before and after a text by `add_special`."""
    if isinstance(pipeline, SentencepiecePipeline):
        return _declared_frame(pipeline, config) or ([], [])
    bare = pipeline.encode("a", add_special_tokens=False).ids
    framed = pipeline.encode("a", add_special_tokens=True).ids
    start = next(at for at in range(len(framed)) if framed[at : at + len(bare)] == bare)
    return framed[:start], framed[start + len(bare) :]


def _declared_frame(
    pipeline: Pipeline | SentencepiecePipeline, config: dict[str, Any]
) -> tuple[list[int], list[int]] | None:
    """The frame that tokenizer_config.json says outright, None where it leaves it to the pipeline."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return None
    frames: list[list[int]] = []
    for kind in ("bos", "eos"):
        token = config.get(f"{kind}_token") if config.get(f"add_{kind}_token") else None
        token_id = None if token is None else pipeline.token_to_id(content(token))
        frames.append([] if token_id is None else [token_id])
    return frames[0], frames[1]


def declare_frame(pipeline: Pipeline | SentencepiecePipeline, config: dict[str, Any]) -> bool:
    """Writes the declared frame into the pipeline, for every reader of tokenizer.json. True if it changed."""
    declared = _declared_frame(pipeline, config)
    if isinstance(pipeline, SentencepiecePipeline) or declared is None:
        return False
    if declared == special_frame(pipeline, config):
        return False
    before, after = [[str(pipeline.id_to_token(token_id)) for token_id in ids] for ids in declared]
    frame_texts(pipeline, before, after)
    return True
