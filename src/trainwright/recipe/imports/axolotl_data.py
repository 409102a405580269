"""axolotl's lists of data sets: one entry to a source of a recipe, and the template that goes with them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainwright.recipe.imports.reading import Reading, hub_or_folder

TEMPLATES = {"alpaca": "alpaca", "chatml": "chatml", "llama3": "llama3", "mistral_v1": "mistral", "zephyr": "zephyr"}


def read_source(reading: Reading, entry: Any, plain: bool) -> dict[str, Any]:
    """One data set of its list."""
    entry = {"path": entry} if isinstance(entry, str) else {k: v for k, v in dict(entry).items() if v is not None}
    path, kind = str(entry.pop("path")), entry.pop("type", None)
    files, column = entry.pop("data_files", None), entry.pop("field", entry.pop("text_column", None))
    source: dict[str, Any] = {"path": hub_or_folder(path, entry.pop("revision", None))}
    if files is not None:
        names = files if isinstance(files, list) else [files]
        if source["path"].startswith("hf:"):
            source["path"] += f":{names[0]}"
        else:
            source["path"] = str(names[0]) if path in ("json", "parquet", "arrow", "text") else f"{path}/{names[0]}"
        if names[1:]:
            reading.drop("datasets[].data_files", names[1:], "one file or glob a source: add sources")
    form, columns = _format(reading, kind, entry, plain)
    if form:
        source["format"] = form
    if column and column != "text":
        columns["text"] = str(column)
    if columns:
        source["columns"] = columns
    split = entry.pop("split", None)
    if split and split != "train":
        source["split"] = str(split).partition("[")[0]
        if "[" in str(split):
            reading.drop("datasets[].split", split, "a split is taken whole")
    for key in ("trust_remote_code", "ds_type", "roles_to_train", "train_on_eos", "chat_template", "roles", "skip",
                "drop_system_message", "conversation"):  # fmt: skip
        value = entry.pop(key, None)
        expected = {"roles_to_train": ["assistant"], "train_on_eos": "turn", "skip": 0, "drop_system_message": False}
        if key in expected and value not in (None, expected[key], ["gpt"], ["assistant", "gpt"]):
            why = "answers are trained, each with the token that ends it; data.loss_on chooses"
            reading.drop(f"datasets[].{key}", value, why)
    for key, value in entry.items():
        reading.drop(f"datasets[].{key}", value, "a source has path, format, split, columns, weight and epochs")
    return source


def _format(reading: Reading, kind: Any, entry: dict[str, Any], plain: bool) -> tuple[str | None, dict[str, str]]:
    """(format, columns) of a `type`; None where looking at the data decides."""
    if isinstance(kind, Mapping):
        ours = {"field_system": "system", "field_instruction": "instruction", "field_input": "input",
                "field_output": "output"}  # fmt: skip
        for key in ("format", "no_input_format", "system_format", "system_prompt"):
            if kind.get(key):
                reading.drop(f"datasets[].type.{key}", kind[key], "chat templates write prompts: data.template")
        return "alpaca", {ours[key]: str(kind[key]) for key in ours if kind.get(key) and kind[key] != ours[key]}
    name = str(kind or "").partition(":")[0].partition(".")[0]
    messages = entry.pop("field_messages", None)
    mapping = entry.pop("message_property_mappings", None) or {}
    for old, new in (("message_field_role", "role"), ("message_field_content", "content")):
        if old in entry:
            mapping = {**mapping, new: entry.pop(old)}
    odd = {ours: theirs for ours, theirs in mapping.items()
           if theirs not in {"role": ("role", "from"), "content": ("content", "value")}.get(ours, (ours,))}  # fmt: skip
    if odd:
        reading.drop("datasets[].message_property_mappings", odd, "turns are role/content or from/value")
    if plain or name in ("completion", "pretrain"):
        return "text", {}
    if name in ("chat_template", "sharegpt"):
        if messages in ("conversations", "conversation") or (messages is None and name == "sharegpt"):
            return "sharegpt", {} if messages != "conversation" else {"conversations": "conversation"}
        return "messages", {} if messages in (None, "messages") else {"messages": str(messages)}
    if name.startswith("alpaca"):
        return "alpaca", {}
    if name:
        reading.drop("datasets[].type", kind, "the format is found by looking at the data, or data.format names it")
    return None, {}


def read_template(reading: Reading, entries: list[Any]) -> None:
    """A named template; without one, alpaca data is written in Alpaca's words, chats in the tokenizer's own."""
    named = reading.take("chat_template")
    jinja = reading.take("chat_template_jinja")
    kinds = {str(each.get("type", "")) for each in entries if isinstance(each, Mapping)}
    if named is None and kinds and all(kind.startswith("alpaca") for kind in kinds):
        reading.put("data.template", "alpaca")
    elif named in TEMPLATES:
        reading.put("data.template", TEMPLATES[named])
    elif named not in (None, "tokenizer_default") and not str(named).startswith("tokenizer_default_fallback_"):
        why = f"none of this name; the tokenizer's own is used, data.template has {', '.join(TEMPLATES)}"
        reading.drop("chat_template", named, why)
    if jinja is not None:
        reading.drop("chat_template_jinja", jinja, "templates are named, or the tokenizer's own")
