"""Sentencepiece models that no tokenizer.json equals: the package sentencepiece encodes.

Owns `SentencepiecePipeline`, which answers to the part of `tokenizers.Tokenizer` that `tokenizer.py` uses.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken

from trainwright.errors import UserError
from trainwright.vocabulary import CONTROL, UNKNOWN, Piece


class _Encoding(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]


class SentencepiecePipeline:
    """A sentencepiece model with special tokens cut out before it sees the text.

    Each text between two special tokens is encoded as a text of its own. `encode_special_tokens` True leaves special
    tokens in the text, as the attribute of that name does in `tokenizers`.
    """

    def __init__(self, path: Path, model: bytes, pieces: Sequence[Piece]) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise UserError(
                f"{path} has no exact tokenizer.json, so it needs the package sentencepiece: "
                "pip install 'trainwright[formats]'"
            ) from None
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:
            raise UserError(f"sentencepiece cannot read {path}: {error}") from None
        self.model = model
        self.name = path.name
        self.encode_special_tokens = False
        self._pieces = [piece.text for piece in pieces]
        special = [(piece.text, at) for at, piece in enumerate(pieces) if piece.kind in (UNKNOWN, CONTROL)]
        self._added = {at: AddedToken(text, normalized=False, special=True) for text, at in special}
        self._cutters: dict[bool, tuple[dict[str, int], re.Pattern[str]]] = {}
        self._ids = dict(zip(self._pieces, range(len(self._pieces)), strict=True))

    def copy(self) -> SentencepiecePipeline:
        """The same model, to encode under other rules."""
        made = SentencepiecePipeline.__new__(SentencepiecePipeline)
        made.__dict__.update(self.__dict__)
        return made

    def to_str(self) -> str:
        """All that decides ids, as text."""
        return base64.b64encode(self.model).decode() + "".join(f"\n{at} {t.content}" for at, t in self._added.items())

    def add_tokens(self, tokens: Sequence[AddedToken]) -> None:
        """Appends tokens; those that the model has become special where they stand."""
        for token in tokens:
            if token.content not in self._ids:
                self._ids[token.content] = len(self._pieces)
                self._pieces.append(token.content)
            self._added[self._ids[token.content]] = token
        self._cutters.clear()

    def encode(self, text: str, add_special_tokens: bool = False) -> _Encoding:
        """Ids and the characters that each stands for."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, piece, special in self._cut(text):
            if special is not None:
                ids.append(special)
                offsets.append((start, start + len(piece)))
                continue
            for part_id, (first, last) in self._spans(piece):
                ids.append(part_id)
                offsets.append((start + first, start + last))
        return _Encoding(ids, offsets)

    def _spans(self, text: str) -> Iterable[tuple[int, tuple[int, int]]]:
        try:
            found = self._processor.encode(text, out_type="offset_mapping")
        except RuntimeError:  # sentencepiece 0.2.0
            parts = self._processor.encode(text, out_type="immutable_proto").pieces  # type: ignore[arg-type]
            return [(part.id, (part.begin, part.end)) for part in parts]
        return zip(found["ids"], found["offsets"], strict=True)

    def encode_batch_fast(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[_Encoding]:
        """Ids of each text, without offsets."""
        encodings = []
        for text in texts:
            ids: list[int] = []
            for _, piece, special in self._cut(text):
                ids += self._processor.encode(piece) if special is None else [special]
            encodings.append(_Encoding(ids, []))
        return encodings

    def _cut(self, text: str) -> Iterator[tuple[int, str, int | None]]:
        """Pieces of text with their place, and the id of those that are added tokens."""
        known, pattern = self._cutter(self.encode_special_tokens)
        at = 0
        for found in pattern.finditer(text):
            if found.start() > at:
                yield at, text[at : found.start()], None
            yield found.start(), found[0], known[found[0]]
            at = found.end()
        if at < len(text):
            yield at, text[at:], None

    def _cutter(self, plain: bool) -> tuple[dict[str, int], re.Pattern[str]]:
        """The added tokens that are found in text, and the expression that finds them, the longest first."""
        if plain not in self._cutters:
            known = {token.content: at for at, token in self._added.items() if not (token.special and plain)}
            longest_first = sorted(known, key=len, reverse=True)
            self._cutters[plain] = known, re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        return self._cutters[plain]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; each run between two special tokens is decoded as a text of its own."""
        text = ""
        run: list[int] = []
        for token_id in ids:
            if token_id in self._added:
                text += self._processor.decode(run)
                text += "" if skip_special_tokens and self._added[token_id].special else self._added[token_id].content
                run = []
            else:
                run.append(token_id)
        return text + self._processor.decode(run)

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else None

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        return dict(self._ids)

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        return dict(self._added)
