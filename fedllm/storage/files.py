"""Files of a run's folder: each whole or not at all, never through a link, and a sentence where the disk refuses."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fedllm.errors import FedError

CAUSES = {
    errno.ENOSPC: "there is no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "it would be larger than the system's limit for files",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "the folder is no longer there",
    errno.ESTALE: "the folder is no longer there",
    errno.EACCES: "writing is not permitted",
    errno.EPERM: "writing is not permitted",
    errno.ELOOP: "it is a link, and nothing is written through links",
    errno.EISDIR: "a folder is in its place",
    errno.EEXIST: "something else is in its place",
    errno.ENOTDIR: "a file is in the place of its folder",
    errno.ENAMETOOLONG: "the name is too long",
}
"""Errors of the system, in words."""

LASTING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
"""Errors that say something about the disk, whatever was being written."""

_CODE = re.compile(r"(?:code: |os error )(\d+)")
"""Where safetensors' messages keep the system's error number."""


class Unwritten(FedError):
    """A file that the system did not let us write."""


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Says in a sentence what the system has against writing ``place``.

    Raises:
        Unwritten: for any error of the system's in the block.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise Unwritten(f"{place} cannot be written: {cause(error)}.") from error
    except ValueError as error:  # a path with a null character
        raise Unwritten(f"{str(place)!r} is no path: {error}.") from error


def cause(error: OSError | SafetensorError) -> str:
    """The reason in words, without the path."""
    found = _CODE.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number in CAUSES:
        return CAUSES[number]
    told = error.strerror if isinstance(error, OSError) else None
    return " ".join((told or str(error) or type(error).__name__).split())[:200]


def make_folder(place: Path) -> Path:
    """The folder, made in one that is there already; a link in its place is refused."""
    with writing(place):
        place.mkdir(exist_ok=True)
    if place.is_symlink():
        raise Unwritten(f"{place} is a link, and nothing is written through links: put a folder there.")
    return place


def write(file: Path, data: str | bytes) -> None:
    """``data`` into ``file`` by way of a temporary one and a rename, on disk when it returns.

    A link at either name is replaced and never followed.
    """
    scratch = file.with_name(f".{file.name}.writing")
    with writing(file):
        scratch.unlink(missing_ok=True)
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data.encode() if isinstance(data, str) else data)
                stream.flush()
                os.fsync(stream.fileno())
            scratch.replace(file)
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
        sync(file.parent)


def append(file: Path, text: str) -> None:
    """``text`` at the end of ``file``, on disk when it returns; a link is refused."""
    with writing(file):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        with os.fdopen(os.open(file, flags, 0o666), "wb") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())


def read_bytes(file: Path, most: int) -> bytes:
    """The whole of a regular file.

    Raises:
        FedError: a link, a device or a pipe, more than ``most`` bytes, or none there.
    """
    try:
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FedError(f"{file} is no regular file.")
            if status.st_size > most:
                raise FedError(f"{file} has {status.st_size} bytes, and at most {most} are read.")
            return stream.read()
    except OSError as error:
        reason = "it is a link, and none is followed" if error.errno == errno.ELOOP else error.strerror
        raise FedError(f"{file} cannot be read: {reason}.") from error


def check_own(root: Path, file: Path) -> Path:
    """``file``, which lies below ``root``, where it is a regular file that no link leads to.

    Raises:
        FedError: it, or a folder on the way to it, is a link or no regular file.
    """
    place = root
    for part in file.relative_to(root).parts:
        place = place / part
        try:
            kind = place.lstat().st_mode
        except OSError as error:
            raise FedError(f"{place} cannot be read: {error.strerror}.") from error
        if stat.S_ISLNK(kind):
            raise FedError(f"{place} is a link, and no link is followed out of a run's folder: copy the file there.")
        if not (stat.S_ISREG(kind) if place == file else stat.S_ISDIR(kind)):
            raise FedError(f"{place} is no regular {'file' if place == file else 'folder'}.")
    return file


def sync(path: Path) -> None:
    """Has the file, or the folder's list of names, on disk when it returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
