"""Text to capture: files of text or JSONL, and directories of them, cut into windows of tokens."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PIECE_BYTES = 1 << 20
"""A long text is tokenized in pieces of about this many bytes, cut at line ends, so that memory stays bounded."""


@dataclass(frozen=True)
class Source:
    """One file and the domain of its texts (a JSONL line may name its own)."""

    path: Path
    domain: str

    @property
    def is_jsonl(self) -> bool:
        return self.path.suffix.lower() in JSONL_SUFFIXES


class Inspection(NamedTuple):
    """What reading all sources once tells.

    Attributes:
        digests: SHA-256 of each file.
        sizes: bytes of each file.
        domains: labels in order of first appearance.
    """

    digests: tuple[str, ...]
    sizes: tuple[int, ...]
    domains: tuple[str, ...]


class Piece(NamedTuple):
    """A piece of a document: its text, its label, which document it belongs to, and the bytes of input up to here."""

    text: str
    domain: str
    document: int
    bytes_read: int


class Window(NamedTuple):
    """One sample: at most `sequence_length` consecutive tokens of a document.

    Attributes:
        ids: [length] token ids.
        domain: label.
        document: index of the document, counted over all sources.
        offset: tokens of the document before this window.
        bytes_read: bytes of input read so far.
    """

    ids: NDArray[np.int64]
    domain: str
    document: int
    offset: int
    bytes_read: int


def find_sources(paths: Sequence[str | Path]) -> list[Source]:
    """The files below `paths`, sorted by name within each directory; hidden files are left out.

    A file's domain is its name without suffix. In a directory, each subdirectory is a domain, and files that lie in
    the directory itself have its name.

    Raises:
        ValueError: a path does not exist, or there is no file at all.
    """
    sources: list[Source] = []
    for path in map(Path, paths):
        if path.is_file():
            sources.append(Source(path, path.stem))
        elif path.is_dir():
            for file in sorted(path.rglob("*")):
                inside = file.relative_to(path).parts
                if file.is_file() and not any(part.startswith(".") for part in inside):
                    sources.append(Source(file, inside[0] if len(inside) > 1 else path.resolve().name))
        else:
            raise ValueError(f"{path}: no such file or directory")
    if not sources:
        raise ValueError(f"no file to capture in {', '.join(map(str, paths)) or 'an empty list of paths'}")
    return sources


def inspect(sources: Sequence[Source]) -> Inspection:
    """Read everything once: digests, sizes, domains, and any error of form before the model runs.

    Raises:
        ValueError: a file is not UTF-8 or not valid JSONL, named with its line; or there is no text at all.
    """
    digests, sizes, domains = [], [], {}
    for source in sources:
        digest = hashlib.sha256()
        with source.path.open("rb") as file:
            for block in iter(lambda: file.read(PIECE_BYTES), b""):
                digest.update(block)
        digests.append(digest.hexdigest())
        sizes.append(source.path.stat().st_size)
        for piece in _pieces(source, 0, 0):
            domains[piece.domain] = None
    if not domains:
        raise ValueError(f"no text in {', '.join(str(source.path) for source in sources)}")
    return Inspection(tuple(digests), tuple(sizes), tuple(domains))


def windows(
    sources: Iterable[Source], tokenizer: Any, sequence_length: int, limit_tokens: int | None = None
) -> Iterator[Window]:
    """Cut every document into windows of `sequence_length` tokens (the last one of a document may be shorter) until
    `limit_tokens` tokens have been handed out. No special tokens are added.

    Raises:
        ValueError: as in `inspect`.
    """
    left = limit_tokens
    held: list[int] = []
    last: Piece | None = None
    offset = 0

    def cut(final: bool) -> Iterator[Window]:
        nonlocal held, offset, left
        assert last is not None
        start = 0
        while len(held) - start >= sequence_length or (final and start < len(held)):
            size = min(sequence_length, len(held) - start)
            size = size if left is None else min(size, left)
            if size == 0:
                break
            ids = np.array(held[start : start + size], dtype=np.int64)
            yield Window(ids, last.domain, last.document, offset, last.bytes_read)
            start, offset = start + size, offset + size
            left = None if left is None else left - size
        held = held[start:]

    for piece in _all_pieces(sources):
        if last is not None and piece.document != last.document:
            yield from cut(final=True)
            held, offset = [], 0
        last = piece
        held += tokenizer(piece.text, add_special_tokens=False, verbose=False)["input_ids"]
        yield from cut(final=False)
        if left == 0:
            return
    if last is not None:
        yield from cut(final=True)


def _all_pieces(sources: Iterable[Source]) -> Iterator[Piece]:
    document, bytes_read = 0, 0
    for source in sources:
        piece = None
        for piece in _pieces(source, document, bytes_read):
            yield piece
        document = document if piece is None else piece.document + 1
        bytes_read += source.path.stat().st_size


def _pieces(source: Source, document: int, bytes_read: int) -> Iterator[Piece]:
    """Pieces of one file that hold any text, documents counted from `document`, bytes from `bytes_read`."""
    held: list[str] = []
    size = 0
    with source.path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _decode(raw, source.path, number)
            bytes_read += len(raw)
            if source.is_jsonl:
                entry = _parse(line, source, number)
                if entry is not None and entry[0]:
                    yield Piece(entry[0], entry[1], document, bytes_read)
                    document += 1
                continue
            held.append(line)
            size += len(raw)
            if size >= PIECE_BYTES:
                yield Piece("".join(held), source.domain, document, bytes_read)
                held, size = [], 0
    text = "".join(held)
    if text:
        yield Piece(text, source.domain, document, bytes_read)


def _decode(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: not UTF-8 text (byte {raw[error.start]:#04x})") from None


def _parse(line: str, source: Source, number: int) -> tuple[str, str] | None:
    """(text, domain) of one line of JSONL, None for a blank one."""
    if not line.strip():
        return None
    where = f"{source.path}:{number}"
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ValueError(f'{where}: needs an object with a string "text"')
    domain = entry.get("domain", source.domain)
    if not isinstance(domain, str) or not domain:
        raise ValueError(f'{where}: "domain" must be a non-empty string, got {domain!r}')
    return entry["text"], domain
