"""What silently ruins a run, found before it starts.

Owns the findings and their words. They are judged from figures that were counted anyway, so every run is checked.
`data.accept` goes on in spite of those that can be meant; the others have no use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, get_args

from trainwright.data.formats import Message
from trainwright.data.template import load_template
from trainwright.data.tokenizer import Tokenizer
from trainwright.errors import UserError
from trainwright.recipe.data import DataRecipe, Finding

# A bad encoding replaces characters everywhere; a few come with any text of the web.
REPLACED_SHARE = 0.01
PROBE: list[Message] = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "4"},
]


class Complaint(NamedTuple):
    """One thing that is wrong. `name` is what data.accept calls it, "" when it cannot be accepted."""

    name: str
    words: str


def examine(
    tokens: Mapping[str, int],
    rows: Mapping[str, int],
    data: DataRecipe,
    tokenizer: Tokenizer,
    vocab_size: int | None,
    chats: bool,
) -> list[Complaint]:
    """Everything that is wrong, worst first. `tokens` and `rows` are the figures of tokenized.py and arrange.py.

    Args:
        vocab_size: rows of the model's embedding, None when not known.
        chats: whether a chat template was used.
    """
    found: list[Complaint] = []

    def complain(name: str, words: str) -> None:
        assert name == "" or name in get_args(Finding)
        found.append(Complaint(name, words))

    documents = max(1, tokens.get("documents", 0))
    if vocab_size is not None and tokens.get("max_id", 0) >= vocab_size:
        complain("", beyond_embedding(tokens["max_id"], vocab_size))
    if count := tokens.get("double_bos", 0):
        complain(
            "double_bos",
            f"{count:,} of {documents:,} samples start with BOS twice: take it out of the data or the template",
        )
    if count := tokens.get("missing_eos", 0):
        complain(
            "missing_eos",
            f"{count:,} of {documents:,} samples do not end in a trained EOS, so the model would not learn to stop: "
            "set eos_token in tokenizer_config.json, or choose another data.template",
        )
    if (count := tokens.get("replaced_characters", 0)) > REPLACED_SHARE * documents:
        complain(
            "replaced_characters",
            f"{count:,} of {documents:,} samples hold U+FFFD, the mark of text decoded wrongly: "
            "write the files again from their source in UTF-8",
        )
    if (count := rows.get("truncated_answers", 0)) > data.max_truncated * max(1, rows["documents"]):
        complain(
            "truncated_answers",
            f"{count:,} of {rows['documents']:,} samples have their answer cut at data.seq_len={data.seq_len}, "
            f"data.max_truncated={data.max_truncated} allows less: raise data.seq_len, or set data.too_long=drop",
        )
    if chats and data.template is not None and (difference := _other_than_own(data.template, tokenizer)):
        complain(
            "template",
            f"data.template={data.template} is not the tokenizer's own template ({difference}): "
            "drop data.template to train what the model knows already",
        )
    return [complaint for complaint in found if complaint.name not in data.accept]


def beyond_embedding(largest: int, vocab_size: int) -> str:
    """What is said of token ids that the model has no embedding for."""
    return (
        f"the data hold token id {largest}, the model's embedding has {vocab_size} rows: "
        "tokenizer and model do not belong together"
    )


def refuse(complaints: list[Complaint]) -> None:
    """Raises UserError with every complaint, if there are any."""
    if complaints:
        words = "; ".join(complaint.words for complaint in complaints)
        names = [complaint.name for complaint in complaints if complaint.name]
        raise UserError(words + (f" (data.accept={names} goes on all the same)".replace("'", "") if names else ""))


def refuse_empty(name: str, tokens: Mapping[str, int], rows: Mapping[str, int], data: DataRecipe, side: str) -> None:
    """Says why a source gave no row. Raises UserError always."""
    if side == "validation":
        raise UserError(
            f"data.validation={data.validation} of {tokens.get('documents', 0):,} samples holds out none: raise it"
        )
    if tokens.get("bad_rows") and not tokens.get("documents"):
        raise UserError(f"{name} has no good row: {tokens['bad_rows']:,} were skipped, data.on_bad_row=stop says why")
    if not tokens.get("rows"):
        raise UserError(f"{name} holds no sample")
    if rows.get("untrained"):
        raise UserError(
            f"{name} has no trained token: in all {rows['untrained']:,} samples the trained part lies behind "
            f"data.seq_len={data.seq_len}, or data.loss_on={data.loss_on} finds nothing: raise data.seq_len"
        )
    held_out = f", data.validation={data.validation}" if data.validation and isinstance(data.validation, float) else ""
    raise UserError(
        f"{name} is empty after filtering: of {tokens['rows']:,} samples none is left, "
        f"see data.filter, data.too_long={data.too_long}{held_out} and data.seq_len={data.seq_len}"
    )


def _other_than_own(template: str, tokenizer: Tokenizer) -> str:
    """How the named template differs from the tokenizer's own on a short conversation; "" if it does not."""
    if tokenizer.chat_template is None:
        return ""
    chosen = load_template(template, tokenizer).render(PROBE)
    try:
        own = load_template(None, tokenizer).render(PROBE)
    except UserError as error:
        return f"which fails: {error}"
    if chosen == own:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(chosen, own, strict=False)) if a != b), min(len(chosen), len(own)))
    return f"it writes {chosen[at : at + 24]!r} where its own writes {own[at : at + 24]!r}"
