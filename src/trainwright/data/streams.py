"""A plain, .gz or .zst file as one stream of unpacked bytes with a position.

Owns opening, moving and turning what goes wrong on the way into one line. What the bytes mean is in readers.py.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from trainwright.errors import UserError

BLOCK_BYTES = 1 << 20
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}


class Stream:
    """Unpacked bytes of a file, read forwards. Every method raises UserError when the file cannot be read."""

    def __init__(self, path: str | Path, compression: str = "") -> None:
        self.path = str(path)
        self.compression = compression
        self.position = 0
        self._raw = self._open()

    def _open(self) -> BinaryIO:
        try:
            if self.compression == "gz":
                return gzip.open(self.path, "rb")  # type: ignore[return-value]
            if self.compression == "zst":
                import pyarrow as pa  # unpacks zstd, so nothing more needs to be installed

                return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(self.path), "zstd"), BLOCK_BYTES)
            return open(self.path, "rb", buffering=BLOCK_BYTES)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from None

    def read(self, count: int) -> bytes:
        """At most `count` bytes; empty at the end."""
        try:
            block = self._raw.read(count)
        except (OSError, EOFError, zlib.error) as error:
            raise self._broken(error) from None
        self.position += len(block)
        return block

    def readline(self, limit: int) -> bytes:
        """At most `limit` bytes up to and with the next newline; empty at the end."""
        try:
            line = self._raw.readline(limit)
        except (OSError, EOFError, zlib.error) as error:
            raise self._broken(error) from None
        self.position += len(line)
        return line

    def skip_line(self) -> None:
        """Moves past the next newline."""
        while part := self.readline(BLOCK_BYTES):
            if part.endswith(b"\n"):
                return

    def move(self, position: int) -> None:
        """Goes to `position`: at once in a plain file, by unpacking up to it in a packed one."""
        if not self.compression:
            self._raw.seek(position)
            self.position = position
            return
        if position < self.position:
            self._raw.close()
            self._raw, self.position = self._open(), 0
        while self.position < position and self.read(min(position - self.position, BLOCK_BYTES)):
            pass

    def size(self) -> int:
        """Bytes of the unpacked file; a packed one is unpacked to its end for this."""
        if not self.compression:
            return Path(self.path).stat().st_size
        while self.read(BLOCK_BYTES):
            pass
        return self.position

    def _broken(self, error: Exception) -> UserError:
        return UserError(f"{self.path} breaks off or is no {self.compression or 'plain'} file: {error}")

    def close(self) -> None:
        self._raw.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
