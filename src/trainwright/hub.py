"""Hub ids to folders: the one place that uses the network, and only where a recipe or a command names such an id.

Owns the ids (`hf:owner/name[@revision]`, `modelscope:owner/name[@revision]`), what is fetched, and the words when it
does not come. Files stay in the hub's own cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainwright.errors import UserError

TOKENIZER = (
    "tokenizer*", "*.model", "*.tiktoken", "*.jinja", "config.json", "generation_config.json", "added_tokens.json",
    "special_tokens_map.json", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip


def is_id(text: str) -> bool:
    """Whether a path names a hub."""
    return text.startswith(("hf:", "modelscope:"))


def fetch(spec: str, patterns: Sequence[str], *, kind: str = "model") -> Path:
    """The snapshot of a hub id with the files that match `patterns`, downloaded if it is not there yet.

    Raises UserError where the hub's package is missing, or the id does not come.
    """
    hub, _, name = spec.partition(":")
    name, _, revision = name.partition("@")
    try:
        if hub == "hf":
            from huggingface_hub import snapshot_download
        else:
            from modelscope import snapshot_download  # type: ignore[import-not-found,no-redef]
    except ImportError:
        package = "huggingface_hub" if hub == "hf" else "modelscope"
        raise UserError(f"{spec} needs the package {package}: pip install {package}") from None
    more: dict[str, Any] = {"repo_type": kind} if kind != "model" else {}
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns), **more))
    except Exception as error:  # hubs' clients raise many kinds; all mean that an id that was named does not come
        raise UserError(f"{spec} could not be downloaded: {error}") from None
