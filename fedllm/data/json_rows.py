"""Rows of JSON files: lines, or one list. A file is untrusted: it is read a bounded line at a time."""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fedllm.errors import FedError

Row = dict[str, Any]

LONGEST_ROW = 4 << 20
"""Bytes: a row of a million tokens."""

LONGEST_LIST = 1 << 30
"""Bytes of one JSON list, which is parsed in one piece."""

MARK = b"\xef\xbb\xbf"
TURNS = ("messages", "conversations", "conversation")
NEEDED = "Needed: JSON Lines, or one JSON list of objects."


def read(file: Path) -> list[Row]:
    """The rows of a file of JSON Lines, or of one JSON list; UTF-8, gzipped where the name ends in ``.gz``.

    One JSON object whose only list of objects is under a key, such as ``{"data": [...]}``, gives that list.

    Raises:
        FedError: where it is none of them, or a row is longer than ``LONGEST_ROW``; names the line.
    """
    try:
        with _opened(file) as stream:
            rows = _rows(file, stream)
    except (OSError, EOFError, zlib.error) as error:
        raise FedError(f"{file} cannot be read: {error}.") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise FedError(f"{file}, row {number}: a row is a JSON object such as {{...}}, got {str(row)[:40]!r}.")
    return rows


def _opened(file: Path) -> IO[bytes]:
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer
    stream = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        stream.close()
        raise FedError(f"{file} is no regular file: rows are read from files.")
    return gzip.open(stream) if file.suffix == ".gz" else stream  # type: ignore[return-value]


def _rows(file: Path, stream: IO[bytes]) -> list[Any]:
    lines = _lines(file, stream)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return []
    if first[1].lstrip()[:1] == b"[":
        return list(_parsed(_whole(file, first[1], stream), str(file)))
    under_key = _under_a_key(file, first[1], stream) if file.name.endswith((".json", ".json.gz")) else None
    if under_key is not None:
        return under_key
    parsed = [_parsed(_text(file, first[1], first[0]), f"{file}, line {first[0]}")]
    parsed += [_parsed(_text(file, line, n), f"{file}, line {n}") for n, line in lines if line.strip()]
    return parsed


def _lines(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; a JSON list may be one long line, which ``_whole`` reads on."""
    number = 0
    while line := stream.readline(LONGEST_ROW + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(MARK)
        if len(line) > LONGEST_ROW and line.lstrip()[:1] != b"[":
            raise FedError(f"{file}, line {number} has more than {LONGEST_ROW} bytes: no row is that long.")
        yield number, line


def _whole(file: Path, begun: bytes, stream: IO[bytes]) -> str:
    body = begun + stream.read(LONGEST_LIST)
    if len(body) > LONGEST_LIST:
        raise FedError(
            f"{file} is one JSON list of more than {LONGEST_LIST} bytes: save it as JSON Lines, a row a line."
        )
    return _text(file, body, None)


def _under_a_key(file: Path, begun: bytes, stream: IO[bytes]) -> list[Any] | None:
    """The rows of one JSON object over many lines; ``None``, and the stream where it was, for JSON Lines."""
    if not isinstance(stream, io.BufferedReader | gzip.GzipFile):
        return None
    place = stream.tell()
    try:
        page = json.loads(_whole(file, begun, stream))
    except (ValueError, RecursionError):
        page = None
    lists = {key: value for key, value in page.items() if _are_rows(key, value)} if isinstance(page, dict) else {}
    if len(lists) == 1:
        return next(iter(lists.values()))
    if len(lists) > 1:
        held = ", ".join(f"{key} ({len(value)})" for key, value in lists.items())
        raise FedError(f"{file} is one JSON object with several lists of rows: {held}. Save one of them as JSON Lines.")
    stream.seek(place)
    return None


def _are_rows(key: str, value: Any) -> bool:
    return key not in TURNS and isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _text(file: Path, body: bytes, line: int | None) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        where = "" if line is None else f", line {line}"
        raise FedError(
            f"{file}{where} is not UTF-8 text: byte {error.start} is {body[error.start : error.start + 1]!r}."
        ) from error


def _parsed(text: str, where: str) -> Any:
    try:
        page = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.rstrip().endswith(","):
            raise FedError(f"{where}: the line ends in a comma. In JSON Lines a row ends with its line.") from error
        raise FedError(f"{where}: not JSON ({error}). {NEEDED}") from error
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(page, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.start + 1]
            raise FedError(f"{where}: {half!r} is half a character (a lone surrogate), and no text.") from error
    return page
