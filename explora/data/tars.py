"""The samples of a tar, from front to back, whoever made it: nothing in it decides how much memory or time it takes.

`tarfile` alone would hold a header of any size in memory, follow headers within headers until Python gives up, read on
for ages behind the end of a file, and end quietly where a header is damaged. Names tell samples apart, as `webdataset`
does it, and are never used as paths. Compressed tars are refused: nothing bounds what they unpack to, and no image in
them can be reached alone.
"""

from __future__ import annotations

import http.client
import re
import tarfile
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from explora.data.decode import MAX_BYTES
from explora.data.shards.listing import EXTENSIONS
from explora.data.shards.segmentation import MASK
from explora.errors import DataError

HEADER: Final = 16 * 2**20
"""Bytes of a member's headers, and of what is read ahead of need."""
FACTS: Final = 2**20
"""Bytes of a member that is no image, such as `.cls` or `.json`."""
_BUFFER: Final = 2**18
"""Bytes that are read at a time."""
_NAMED: Final = 5
"""Images of one sample that messages name."""
_NAME: Final = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_NO_SAMPLE: Final = re.compile(r"__[^/]*__($|/)")
_COMPRESSED: Final = re.compile(rb"\x1f\x8b|BZh[1-9]1AY|\xfd7zXZ|\x5d\x00\x00\x80|\x28\xb5\x2f\xfd")
"""How files of gzip, bzip2, xz, lzma and zstd begin."""
_DAMAGE: Final = (ValueError, EOFError, OverflowError, LookupError)
"""What tarfile may raise, beside its own errors, at a header that is damaged or made to do damage."""


class Body(Protocol):
    """Bytes from front to back."""

    def read(self, size: int, /) -> bytes: ...
    def close(self) -> None: ...


@dataclass
class Sample:
    """Members side by side whose paths are the same up to the first dot of the file name."""

    key: str
    """What their paths begin with."""
    images: int = 0
    """How many of them are images; masks are none."""
    offset: int = 0
    """Where the first image's bytes start, from the start of the tar."""
    _endings: list[str] = field(default_factory=list)
    _contents: dict[str, bytes | DataError] = field(default_factory=dict)

    def image(self) -> bytes:
        """The bytes of its image.

        Raises:
            DataError: there is none, or more than one, or it is above the bound of `decode` or no plain file.
        """
        if self.images != 1:
            raise DataError(f"needs one image member, has {', '.join(map(text, self._endings)) or 'none'}")
        return self.facts(self._endings[0]) or b""

    def facts(self, ending: str) -> bytes | None:
        """The bytes of another member that was asked for, None where there is none.

        Raises:
            DataError: it is above `FACTS`, or no plain file.
        """
        content = self._contents.get(ending)
        if isinstance(content, DataError):
            raise content
        return content

    def _add(self, member: _Member, wanted: Collection[str]) -> None:
        image = f".{member.ending.rpartition('.')[2]}" in EXTENSIONS and member.ending != MASK
        if not self.images if image else member.ending in wanted:
            self._contents[member.ending] = member.content(MAX_BYTES if image else FACTS)
            self.offset = member.header.offset_data if image else self.offset
        if image:
            self.images += 1
            self._endings += [member.ending][: _NAMED - len(self._endings)]


class _Member(NamedTuple):
    """One file in a tar, while the tar stands at it."""

    key: str
    ending: str
    header: tarfile.TarInfo
    tar: tarfile.TarFile

    def content(self, bound: int) -> bytes | DataError:
        """Its bytes, or why it is left where it is.

        Raises:
            DataError: the tar ends before it does.
        """
        name, size = text(self.header.name), self.header.size
        if not self.header.isreg() or self.header.issparse():
            return DataError(f"{name} is a link, a device or a file with holes")
        if size > bound:
            return DataError(f"{name} of {size} bytes is above the bound of {bound}")
        with self.tar.extractfile(self.header) as file:  # type: ignore[union-attr]  # a plain file has content
            return file.read()


def samples(opened: Callable[[], Body], wanted: Collection[str] = ()) -> Generator[Sample, None, None]:
    """The samples of a tar, also those that have no image, up to where it is broken.

    Args:
        opened: opens it; what it returns is closed in the end.
        wanted: endings of the members to read beside images, in lower case.

    Raises:
        DataError: it cannot be read, is compressed, damaged, cut off or no tar at all, or has a header above `HEADER`.
    """
    sample, fault = Sample(""), ""
    try:
        with _told(), closing(opened()) as body:
            for member in _members(_Bounded(body)):
                if member.key != sample.key:
                    if sample.key:
                        yield sample
                    sample = Sample(member.key)
                sample._add(member, wanted)
    except DataError as error:
        fault = str(error)  # the error itself would hold this frame, and what was read, in a circle
    if sample.key:
        yield sample
    if fault:
        raise DataError(fault)


def text(name: str) -> str:
    """A foreign name for messages: printable, and not without end."""
    return ascii(name)[1:-1][:200]


@contextmanager
def _told() -> Iterator[None]:
    """Whatever a tar makes Python raise, as what is wrong with it."""
    try:
        yield
    except DataError:
        raise
    except RecursionError:
        raise DataError("is damaged: its headers never end") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from None
    except (tarfile.TarError, http.client.HTTPException) as error:
        raise DataError(str(error) or type(error).__name__) from None
    except _DAMAGE as error:
        raise DataError(f"is damaged: {error}") from None


def _members(stream: _Bounded) -> Iterator[_Member]:
    with tarfile.open(fileobj=stream, mode="r|", bufsize=_BUFFER) as tar:  # type: ignore[call-overload]  # reading needs no more
        while (header := tar.next()) is not None:
            tar.members.clear()  # or it would remember every one
            stored = tar.offset - header.offset_data  # of a file with holes, `size` says how long it would be
            if stored < 0 or header.size < 0:
                raise DataError(f"is damaged: {text(header.name)} has a size below zero")
            stream.allow(stored)
            name = None if header.isdir() or _NO_SAMPLE.match(header.name) else _NAME.match(header.name)
            if name:
                yield _Member(name[1], name[2].lower(), header, tar)
        if stream.latest(tar.offset) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"is damaged or cut off at byte {tar.offset}: no end mark of a tar is there")


class _Bounded:
    """A tar as tarfile reads it, with bounds on what it may ask for."""

    def __init__(self, body: Body) -> None:
        self._body, self._left, self._at, self._tail, self._ended = body, HEADER, 0, b"", False

    def allow(self, size: int) -> None:
        """Let this much pass, and then a header."""
        self._left = size + HEADER

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; none at the end, once."""
        chunk = self._body.read(size)
        if not self._at and _COMPRESSED.match(chunk):
            raise DataError("is compressed, so no image in it can be reached alone; unpack it to a plain .tar")
        if not chunk and self._ended:  # tarfile would go on for as many bytes as the header says
            raise DataError("unexpected end of data")
        self._ended = not chunk
        self._left -= len(chunk)
        if self._left < 0:
            raise DataError(f"holds a header above the bound of {HEADER} bytes")
        self._at += len(chunk)
        self._tail = (self._tail + chunk)[-2 * _BUFFER :]  # more than tarfile reads ahead
        return chunk

    def latest(self, offset: int) -> bytes:
        """The block at an offset, of those that were read last."""
        start = offset - self._at + len(self._tail)
        return self._tail[start : start + tarfile.BLOCKSIZE] if start >= 0 else b""
