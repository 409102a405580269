"""Samples to documents of tokens, with which are trained; and what is wrong with them, counted on the way.

Owns the choice of what is tokenized how: chats by the chat template, prompt and completion as one text of which the
completion is trained, text whole, each with EOS at its end. Character filters apply here, before any work. Filters on
tokens, duplicates and length are in packing.py, where they cost nothing to change.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple

from trainwright.data.formats import BadRow, Sample
from trainwright.data.shards import IGNORED, Document
from trainwright.data.template import Template, load_template
from trainwright.data.tokenizer import Tokenizer
from trainwright.errors import UserError


class EncodeSettings(NamedTuple):
    """What decides the tokens of a sample, besides the tokenizer."""

    template: str | None
    system: str | None
    loss_on: Literal["assistant", "all", "last"]
    min_characters: int
    max_characters: int | None


class Encoder:
    """Turns samples into documents. `counts` keeps what was dropped and what looks wrong:

    dropped_short, dropped_long: outside the character filters; dropped_empty: no token left;
    replaced_characters: U+FFFD in the text, a sign of a bad encoding; double_bos, missing_eos: in the tokens.
    """

    def __init__(self, tokenizer: Tokenizer, settings: EncodeSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.counts: Counter[str] = Counter()

    @cached_property
    def template(self) -> Template:
        """The chat template; plain text never asks for it."""
        return load_template(self.settings.template, self.tokenizer)

    def keeps(self, sample: Sample) -> bool:
        """Whether the character filters keep a sample."""
        if not self.settings.min_characters and self.settings.max_characters is None:
            return True
        characters = sample.characters
        if characters <= self.settings.min_characters and self.settings.min_characters:
            self.counts["dropped_short"] += 1
            return False
        if self.settings.max_characters is not None and characters > self.settings.max_characters:
            self.counts["dropped_long"] += 1
            return False
        return True

    def encode(self, samples: Sequence[Sample]) -> list[Document | BadRow]:
        """A document for each sample, or why there is none. Documents may be empty."""
        found: list[Document | BadRow] = []
        texts = iter(self._encode_texts([sample for sample in samples if _is_text(sample)]))
        for sample in samples:
            try:
                document = next(texts) if _is_text(sample) else self._encode_one(sample)
            except (UserError, BadRow) as error:
                found.append(BadRow(str(error)))
                continue
            if isinstance(document, Document):
                self._check(sample, document)
            found.append(document)
        return found

    def _encode_texts(self, samples: Sequence[Sample]) -> list[Document | BadRow]:
        """Plain texts, tokenized together on all threads."""
        texts = [sample.text for sample in samples]
        try:
            encoded = self.tokenizer.encode_batch(texts, add_special=True)
        except UserError:  # one of them cannot be encoded: find out which
            return [self._encode_text_alone(sample) for sample in samples]
        return [
            Document(self._with_eos(ids) if sample.text else [], None, content_hash(sample))
            for ids, sample in zip(encoded, samples, strict=True)
        ]

    def _encode_text_alone(self, sample: Sample) -> Document | BadRow:
        try:
            ids = self.tokenizer.encode(sample.text, add_special=True)
        except UserError as error:
            return BadRow(str(error))
        return Document(self._with_eos(ids) if sample.text else [], None, content_hash(sample))

    def _encode_one(self, sample: Sample) -> Document:
        settings = self.settings
        if sample.messages is None:
            return self._encode_pair(sample)
        messages = sample.messages
        if settings.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": settings.system}, *messages]
        encoded = self.template.encode(messages, tools=sample.tools, loss_on=settings.loss_on)
        trained = None if settings.loss_on == "all" else encoded.trained
        eos = IGNORED if self.tokenizer.eos_id is None else self.tokenizer.eos_id
        return Document(encoded.input_ids, trained, content_hash(sample), encoded.stops, eos)

    def _encode_pair(self, sample: Sample) -> Document:
        """Prompt and completion tokenized as one text, as the model will see it; a token over the border is trained."""
        ids = self._with_eos(self.tokenizer.encode(sample.prompt + sample.text, add_special=True))
        if self.settings.loss_on == "all":
            return Document(ids, None, content_hash(sample))
        shared = 0
        for ours, prompts in zip(ids, self.tokenizer.encode(sample.prompt, add_special=True), strict=False):
            if ours != prompts:
                break
            shared += 1
        return Document(ids, [False] * shared + [True] * (len(ids) - shared), content_hash(sample))

    def _with_eos(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_id
        if eos is not None and (not ids or ids[-1] != eos):
            ids.append(eos)
        return ids

    def _check(self, sample: Sample, document: Document) -> None:
        bos, ids = self.tokenizer.bos_id, document.ids
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            self.counts["double_bos"] += 1
        if any("\ufffd" in said for said in sample.texts()):
            self.counts["replaced_characters"] += 1
        stop = self.tokenizer.stop_ids if sample.messages is None else self.template.stop
        if ids and not _ends(document, stop):
            self.counts["missing_eos"] += 1


def _ends(document: Document, stop: Sequence[int]) -> bool:
    """Whether the last token that is trained ends generation; templates may write a line break after it."""
    if document.stops:
        return True
    if document.trained is None:
        return any(token in stop for token in document.ids[-3:])
    return any(document.trained) and document.ids[-1 - document.trained[::-1].index(True)] in stop


def _is_text(sample: Sample) -> bool:
    return sample.messages is None and not sample.prompt


def content_hash(sample: Sample) -> int:
    """64 bits of the sample's content: duplicates share them, and they choose the held-out samples."""
    digest = hashlib.blake2b(sample.content().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
