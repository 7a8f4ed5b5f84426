"""Where remote tars come from, and how images come out of them without a tar, a url or a server deciding anything.

- `webdataset` 1.0.2 opens `pipe:` through a shell, http(s), sftp, ftps, scp and hf through curl, gs through gsutil, ais
  through ais, and lets GOPEN_REWRITE turn any address into any other. Its `gopen` is never called. http(s) is read in
  this process and follows redirects to http(s) alone, files are opened as files, `pipe:` goes to a shell only after
  `allow_pipes`, and all else is refused.
- Its decoders, which unpickle by the name of a member, are never called: the bytes of members that end like an image
  go to `decode`, and all others are passed over.
- Its walk through a tar holds members of any size in memory, and fills the holes of sparse ones. `tars` does neither.
"""

from __future__ import annotations

import http.client
import itertools
import random
import re
import select
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import webdataset
from braceexpand import braceexpand
from webdataset.gopen import gopen_pipe

from explora.data.loading import Unreadable
from explora.data.tars import Body, samples, text
from explora.errors import ConfigError, DataError

SCHEME = re.compile(r"(pipe):|([A-Za-z][A-Za-z0-9+.-]+)://")
_MOST = 1_000_000
_BARREN = 5
"""Tars in a row without an image, and then it is an error."""
_SILENCE = 30.0
"""Seconds without a byte after which a connection counts as broken."""
_WAITS = (1.0, 2.0, 4.0)
"""Seconds before each further attempt to take up a broken connection, for each tar."""
_PATIENCE = 600.0
"""Seconds without a byte after which a command counts as hung."""


def expanded(urls: Sequence[str]) -> tuple[str, ...]:
    """All urls that some with braces stand for.

    Raises:
        ConfigError: braces do not match, or stand for more than a million.
    """
    ends = (map(int, pair) for url in urls for pair in re.findall(r"\{(-?\d+)\.\.(-?\d+)", url))
    if any(abs(last - first) >= _MOST for first, last in ends):  # braceexpand would hold the whole range in memory
        raise ConfigError(f"urls: these braces stand for more than {_MOST:,} tars")
    try:
        found = tuple(itertools.islice(itertools.chain.from_iterable(map(braceexpand, urls)), _MOST + 1))
    except ValueError as error:
        raise ConfigError(f"urls: {error}") from None
    if len(found) > _MOST:
        raise ConfigError(f"urls: these braces stand for more than {_MOST:,} tars")
    return found


def check(url: str, allow_pipes: bool) -> None:
    """Refuse what is not read here.

    Raises:
        ConfigError: a shell command nobody allowed, a scheme other than http(s) and file, or a password.
        DataError: a file is missing.
    """
    scheme = _scheme(url)
    if scheme == "pipe" and not allow_pipes:
        raise ConfigError(f"{url}: would run a command in a shell; set allow_pipes: true if you wrote it yourself")
    if scheme not in ("", "pipe", "http", "https", "file"):
        tool = {"s3": f"aws s3 cp {url} -", "gs": f"gcloud storage cat {url}"}.get(scheme, "<a command that prints it>")
        raise ConfigError(
            f"{url}: explora reads no {scheme}:// itself; write 'pipe:{tool}' and set allow_pipes: true, or give an "
            "https:// address"
        )
    if scheme in ("http", "https") and "@" in urlsplit(url).netloc:
        raise ConfigError(f"{shown(url)}: an address may hold no password, which a redirect would tell others; sign it")
    if scheme in ("", "file") and not _path(url).is_file():
        raise DataError(f"{url}: no such file")


def shown(url: str) -> str:
    """A url for messages and records, without passwords and signatures."""
    if _scheme(url) not in ("http", "https"):
        return url
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


class Tars(Iterator[tuple[str, bytes]]):
    """Where an image is and its bytes, without end: all tars in a random order, again and again, shuffled.

    Args:
        shuffle: images held, to draw the next one from.
        rng: draws the order of tars, and the images.

    Raises:
        DataError: some tars in a row hold none.
    """

    def __init__(self, urls: Sequence[str], shuffle: int, rng: random.Random) -> None:
        self._urls, self._rng = urls, rng
        self._images = webdataset.shuffle(shuffle, rng=rng)(self._drawn())
        self.lost: list[Unreadable] = []
        """Tars and samples that were given up; whoever reads this may empty it."""

    def __next__(self) -> tuple[str, bytes]:
        return next(self._images)

    def _drawn(self) -> Iterator[tuple[str, bytes]]:
        barren = 0
        while True:
            for url in self._rng.sample(self._urls, len(self._urls)):
                barren += 1
                for image in self._read(url):
                    barren = 0
                    yield image
                if barren == _BARREN:
                    why = self.lost[-1].why if self.lost else f"{shown(url)}: no member is an image"
                    raise DataError(f"the last {barren} tars hold no image that can be read; {why}")

    def _read(self, url: str) -> Iterator[tuple[str, bytes]]:
        """The images of one tar, up to where it is broken."""
        try:
            for sample in samples(lambda: _opened(url)):
                where = f"{shown(url)}: {text(sample.key)}"
                try:
                    if sample.images:
                        yield where, sample.image()
                except DataError as error:
                    self._lose(where, error)
        except DataError as error:
            self._lose(shown(url), error)

    def _lose(self, where: str, error: DataError) -> None:
        self.lost.append(Unreadable(where, f"{where}: {error}"))


def _opened(url: str) -> Body:
    if _scheme(url) == "pipe":
        return _Command(url)
    return _Download(url) if _scheme(url) in ("http", "https") else _path(url).open("rb")


def _scheme(url: str) -> str:
    """In lower case; empty for a path."""
    match = SCHEME.match(url)
    return (match[1] or match[2]).lower() if match else ""


def _path(url: str) -> Path:
    if _scheme(url) != "file":
        return Path(url)
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ConfigError(f"{url}: names another machine; write file:/// before an absolute path")
    return Path(urllib.request.url2pathname(parts.path))


class _Command:
    """What a shell command prints, through webdataset's own pipe."""

    def __init__(self, url: str) -> None:
        self._pipe = gopen_pipe(url, bufsize=0)
        self._waiting = select.poll()
        self._waiting.register(self._pipe.stream, select.POLLIN)

    def read(self, size: int) -> bytes:
        if not self._waiting.poll(_PATIENCE * 1000):
            raise DataError(f"printed nothing for {_PATIENCE:.0f} s")
        try:
            return self._pipe.read(size)
        except OSError:
            raise DataError(f"the command ended with exit code {self._pipe.proc.returncode}") from None

    def close(self) -> None:
        self._pipe.ignore_errors = True  # the rest of a tar is of no use, nor what the command says of being stopped
        self._pipe.proc.kill()
        self._pipe.close()


class _Download:
    """A file over http(s), taken up again where the connection broke."""

    def __init__(self, url: str) -> None:
        self._url, self._at = url, 0
        self._waits = list(_WAITS)
        self._body = self._asked({})
        self._size = self._body.length
        # Only a strong mark tells that two answers hold the same bytes.
        self._mark = next(
            (m for m in map(self._body.headers.get, ("ETag", "Last-Modified")) if m and m[:2] != "W/"), ""
        )

    def read(self, size: int) -> bytes:
        while True:
            try:
                chunk = self._body.read(size)
            except (OSError, http.client.HTTPException) as error:
                self._again(str(error))
                continue
            if chunk or self._size in (None, self._at):
                self._at += len(chunk)
                return chunk
            self._again(f"the connection ended at byte {self._at} of {self._size}")

    def close(self) -> None:
        self._body.close()

    def _again(self, why: str) -> None:
        """Ask for the rest."""
        self._wait(why)
        self._body.close()
        self._body = self._asked({"Range": f"bytes={self._at}-", **({"If-Range": self._mark} if self._mark else {})})
        if self._at and self._body.status != http.client.PARTIAL_CONTENT:
            raise DataError(f"{why}, and the server does not send the rest alone")

    def _asked(self, headers: dict[str, str]) -> Any:
        while True:
            try:
                return _only_http().open(urllib.request.Request(self._url, headers=headers), timeout=_SILENCE)
            except HTTPError as error:
                error.close()
                if error.code < 500 and error.code not in (408, 429):
                    raise DataError(f"the server says {error.code} {error.reason}") from None
                self._wait(f"the server says {error.code} {error.reason}")
            except (OSError, http.client.HTTPException) as error:
                self._wait(str(error))

    def _wait(self, why: str) -> None:
        if not self._waits:
            raise DataError(f"{why}; gave up after {len(_WAITS) + 1} attempts")
        time.sleep(self._waits.pop(0))


def _only_http() -> urllib.request.OpenerDirector:
    """What never follows a redirect to a file or to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener
