"""Tars that are read from front to back: over http, from pipes, from files; nothing in them decides anything."""

import gzip
import http.server
import io
import itertools
import json
import logging
import os
import pickle
import random
import re
import shlex
import subprocess
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from explora import config as configs
from explora.data import remote_tars
from explora.data.decode import decode
from explora.data.remote import RemoteConfig, RemoteSet, RemoteStream, remote
from explora.data.shards.index import ShardSet
from explora.data.shards.listing import Listing, RawSample
from explora.data.shards.pack import pack
from explora.data.stream import Step, Stream
from explora.data.views import Center, Key, MultiCrop, Views
from explora.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

N = 12
VIEWS = MultiCrop(global_size=16, local_size=8, local_crops=2, patch_size=4)


class Whole(Views):
    """The image as it is, and the number that its crops hang on."""

    name: Literal["whole"] = "whole"

    def names(self) -> frozenset[str]:
        return frozenset({"image"})

    def sides(self) -> tuple[int, ...]:
        return (20,)

    def needed(self) -> int:
        return 0

    def sample(self, image: np.ndarray, key: Key) -> dict[str, Tensor]:
        return {"image": torch.from_numpy(image.copy()), "number": torch.tensor(key.sample)}

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, blob in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(blob)
            tar.addfile(header, io.BytesIO(blob))
    return file.getvalue()


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three tars of four images each, beside what no image is."""
    (tmp_path / "tars").mkdir()
    for shard in range(3):
        members = {"__meta__/x.png": b"no sample", "readme": b"no ending"}
        for number in range(4 * shard, 4 * shard + 4):
            members[f"a/{number:03}.cls"] = b"1"
            members[f"a/{number:03}.PNG"] = png(number)
            members[f"a/{number:03}.pyd"] = pickle.dumps(Explodes())
        (tmp_path / f"tars/{shard:03}.tar").write_bytes(tarred(members))
    return tmp_path / "tars"


class Explodes:
    """Whoever unpickles this leaves the interpreter."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The same images, packed."""
    root = tmp_path_factory.mktemp("packed")
    for number in range(N):
        (root / f"{number}.png").write_bytes(png(number))
    return pack(Listing(None, [RawSample(root / f"{number}.png") for number in range(N)]), root / "out", name="x")


class Server(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; `flaky/` breaks off half way, `busy/` is not ready at first, `moved/` leads elsewhere."""

    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Range")))
        kind, _, name = self.path.partition("?")[0].lstrip("/").partition("/")
        if kind == "moved":
            return self._end(302, b"", Location=f"file://{self.directory}/{name}")
        if kind == "busy" and len(self.asked) < 3:
            return self._end(503, b"")
        path = Path(self.directory) / name
        if not path.exists():
            return self._end(404, b"")
        body, wanted = path.read_bytes(), self.headers.get("Range")
        if wanted and kind != "stubborn":
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            assert self.headers["If-Range"] == '"mark"'
            return self._end(206, body[first:])
        cut = len(body) // 2 if kind in ("flaky", "stubborn") else len(body)
        return self._end(200, body[:cut], len(body))

    def _end(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "ETag": '"mark"', "Content-Length": str(length or len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(tars: Path) -> Iterator[Callable[[str], str]]:
    """The address of a kind of answer; `.asked` has the requests."""
    asked: list[tuple[str, str | None]] = []
    handler = type("Handler", (Server,), {"asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(tars))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def address(path: str) -> str:
            return f"http://127.0.0.1:{server.server_port}/{path}?token=secret"

        address.asked = asked  # type: ignore[attr-defined]
        yield address
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_tars, "_WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts a program fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(os, "system", refuse)


def opened(urls: object, **options: Any) -> RemoteSet:
    return RemoteSet(RemoteConfig(urls=urls, **options))  # type: ignore[arg-type]


def stream(shards: RemoteSet, views: Views | None = None, workers: int = 0, **changes: Any) -> RemoteStream:
    return RemoteStream(shards, views or Whole(), workers=workers, **({"batch_size": 4, "seed": 7} | changes))


def seen(steps: list[Step]) -> list[int]:
    """The numbers of the images, in order."""
    known = {decode(png(number)).tobytes(): number for number in range(N)}
    parts = itertools.chain.from_iterable(step.micro_batches for step in steps)
    return [known[image.numpy().tobytes()] for part in parts for image in part["image"]]


def test_what_names_remote_tars(tmp_path: Path) -> None:
    (tmp_path / "a.tar").mkdir()
    yes = [
        "http://h/x.tar",
        "HTTPS://h/x",
        "s3://b/x",
        "gs://b/x",
        "file:///x.tar",
        "pipe:cat x",
        "d/{0..9}.tar",
        "x.tgz",
    ]
    assert all(map(remote, yes))
    assert not any(map(remote, ["runs/shards", "tarpit/x", str(tmp_path / "a.tar"), "piped", "/a.target/x"]))


def test_every_image_of_every_tar_in_a_pass(tars: Path) -> None:
    shards = opened(f"{tars}/{{000..002}}.tar")
    steps = list(stream(shards, batch_size=N).steps(3))
    assert [step.index for step in steps] == [0, 1, 2]
    assert {step.images for step in steps} == {N}
    assert all(step.unreadable == () for step in steps)
    passes = [seen([step]) for step in stream(opened(f"{tars}/{{000..002}}.tar", shuffle=1), batch_size=N).steps(3)]
    assert [sorted(one) for one in passes] == [list(range(N))] * 3
    assert len({tuple(one) for one in passes}) > 1
    assert Counter(seen(steps)) != Counter(range(N))  # a buffer holds images over
    assert seen(steps) == seen(list(stream(shards, batch_size=N).steps(3)))
    assert seen(steps) != seen(list(stream(shards, batch_size=N, seed=8).steps(3)))


def test_batches_are_laid_out_as_those_of_shards(tars: Path, packed: ShardSet) -> None:
    cut = {"batch_size": 8, "micro_batches": 2, "ranks": 2, "rank": 1}
    ours = next(stream(opened(f"{tars}/000.tar"), VIEWS, **cut).steps(1))
    theirs = next(Stream(packed, VIEWS, seed=7, workers=0, **cut).steps(1))
    assert len(ours.micro_batches) == len(theirs.micro_batches) == 2
    for one, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
        assert {name: (each.shape, each.dtype) for name, each in one.items()} == {
            name: (each.shape, each.dtype) for name, each in other.items()
        }
        assert torch.equal(one["mask"], other["mask"])
        assert VIEWS.finish(one).keys() == VIEWS.names()


def test_crops_hang_on_the_number_of_the_sample(tars: Path) -> None:
    (tars / "one.tar").write_bytes(tarred({"x.png": png(5)}))
    for rank in range(2):
        step = list(stream(opened(str(tars / "one.tar")), VIEWS, rank=rank, ranks=2).steps(2))[1]
        for place, number in enumerate(range(4 + 2 * rank, 6 + 2 * rank)):
            expected = VIEWS.sample(decode(png(5)), Key(7, 0, number))
            assert all(torch.equal(step.micro_batches[0][name][place], expected[name]) for name in expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_tar_is_enough_for_two_ranks(tars: Path, workers: int) -> None:
    """All yield full steps, each in an order of its own."""
    ranks = [stream(opened(f"file://{tars}/001.tar"), rank=rank, ranks=2, workers=workers) for rank in range(2)]
    steps = [list(one.steps(5)) for one in ranks]
    assert [len(one) for one in steps] == [5, 5]
    assert all(len(step.micro_batches[0]["image"]) == 2 for one in steps for step in one)
    assert set(seen(steps[0])) | set(seen(steps[1])) <= {4, 5, 6, 7}
    assert seen(steps[0]) != seen(steps[1])
    numbers = [torch.cat([step.micro_batches[0]["number"] for step in one]).tolist() for one in steps]
    assert sorted(numbers[0] + numbers[1]) == list(range(20))


@pytest.mark.usefixtures("no_processes")
def test_http_starts_no_program(served: Any) -> None:
    shards = opened([served("plain/000.tar").replace("http", "HTTP"), served("plain/{001,002}.tar")], shuffle=1)
    assert sorted(seen(list(stream(shards, batch_size=N).steps(1)))) == list(range(N))
    assert {path for path, _ in served.asked} == {f"/plain/00{number}.tar?token=secret" for number in range(3)}
    assert "secret" not in shards.name


@pytest.mark.usefixtures("no_processes")
def test_a_broken_connection_is_taken_up_again(served: Any, tars: Path) -> None:
    shards = opened(served("flaky/000.tar"), shuffle=1)
    (step,) = stream(shards).steps(1)
    assert sorted(seen([step])) == [0, 1, 2, 3]
    assert step.unreadable == ()
    half = len((tars / "000.tar").read_bytes()) // 2
    assert [asked for _, asked in served.asked] == [None, f"bytes={half}-"]


def test_a_busy_server_is_asked_again(served: Any) -> None:
    (step,) = stream(opened(served("busy/000.tar"), shuffle=1)).steps(1)
    assert sorted(seen([step])) == [0, 1, 2, 3]
    assert len(served.asked) == 3


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("plain/absent.tar", r"127\.0\.0\.1:\d+/plain/absent\.tar: the server says 404"),
        ("moved/000.tar", "302"),
        ("stubborn/000.tar", None),
    ],
)
def test_a_list_that_gives_nothing_ends_soon(served: Any, path: str, words: str | None) -> None:
    began = time.monotonic()
    if words is None:  # half of the tar is there, time and again
        steps = stream(opened(served(path)), batch_size=1, max_corrupt=0).steps(99)
        with pytest.raises(DataError, match="the server does not send the rest alone"):
            list(steps)
    else:
        with pytest.raises(DataError, match=f"the last 5 tars hold no image that can be read; .*{words}") as caught:
            next(stream(opened(served(path))).steps(1))
        assert "secret" not in str(caught.value)
    assert time.monotonic() - began < 10


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(remote_tars, "_WAITS", (1.0, 2.0))
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(DataError, match=r"Connection refused.*; gave up after 3 attempts"):
        next(stream(opened("http://127.0.0.1:9/x.tar")).steps(1))
    assert waited == [1.0, 2.0] * 5


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("pipe:touch {marker}", "would run a command in a shell; set allow_pipes: true"),
        (
            "s3://bucket/x.tar",
            r"reads no s3:// itself; write 'pipe:aws s3 cp s3://bucket/x\.tar -' and set allow_pipes",
        ),
        ("gs://bucket/x.tar", "write 'pipe:gcloud storage cat gs://bucket"),
        ("sftp://host/x.tar", "reads no sftp:// itself"),
        ("hf://datasets/x.tar", "reads no hf:// itself"),
        ("ais://host/x.tar", "reads no ais:// itself"),
        ("file://host/x.tar", "names another machine"),
        ("https://user:secret@host/x.tar", r"https://host/x\.tar: .* no password"),
        ("nowhere/{{0..3}}.tar", r"nowhere/0\.tar: no such file"),
        ("-", "-: no such file"),
        ("; touch {marker}; #.tar", "no such file"),
        ("x{{.tar", "urls: "),
        ("{{0..99999999999}}.tar", "more than 1,000,000 tars"),
    ],
)
def test_what_is_not_read_here_is_refused(tmp_path: Path, url: str, words: str) -> None:
    marker = tmp_path / "marker"
    with pytest.raises((ConfigError, DataError), match=words):
        opened(url.format(marker=marker))
    assert not marker.exists()


@pytest.mark.usefixtures("no_processes")
def test_webdatasets_own_rewriting_is_not_in_force(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", f"{tars}=pipe:false ")
    assert len(list(stream(opened(str(tars / "000.tar"))).steps(2))) == 2


@pytest.mark.usefixtures("no_processes")
def test_names_for_a_shell_are_just_names(tmp_path: Path) -> None:
    name = f"; touch {tmp_path.name}; $(id) `id`.tar"
    (tmp_path / name).write_bytes(tarred({"../../$(id)`id`;\n|.png": png(3), "/etc/x.png": png(4)}))
    (step,) = stream(opened(str(tmp_path / name)), batch_size=2).steps(1)
    assert set(seen([step])) <= {3, 4}


def test_pipes_run_where_they_are_asked_for(tars: Path) -> None:
    url = f"pipe:cat {shlex.quote(str(tars))}/{{000,001}}.tar"
    shards = opened(url, allow_pipes=True, shuffle=1)
    assert len(shards.urls) == 2
    assert sorted(seen(list(stream(shards, batch_size=8).steps(1)))) == list(range(8))


def test_a_pipe_that_fails_or_hangs_is_an_error(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="the last 5 tars hold no image"):
        next(stream(opened("pipe:exit 7", allow_pipes=True)).steps(1))
    monkeypatch.setattr(remote_tars, "_PATIENCE", 0.05)
    with pytest.raises(DataError, match="printed nothing for"):
        next(stream(opened("pipe:exec sleep 60", allow_pipes=True)).steps(1))
    half = f"pipe:head -c 6000 {tars}/000.tar; exit 7"
    with pytest.raises(DataError, match=r"unexpected end of data|exit code 7"):
        list(stream(opened(half, allow_pipes=True), batch_size=1, max_corrupt=0).steps(9))


def damaged(kind: str) -> bytes:
    """A tar whose first image can be read."""
    good, plain = {"0.png": png(0)}, tarred({"0.png": png(0), "1.png": png(1), "2.png": png(2)})
    second = plain.index(b"1.png")
    if kind == "header":
        return plain[:second] + b"\xff" * 512 + plain[second + 512 :]
    if kind == "cut":
        return plain[: second + 700]
    if kind == "cut between":
        return plain[:second]
    if kind == "two images":
        return tarred({**good, "x.jpg": png(1), "x.other.png": png(2)})
    return tarred({**good, "broken.png": png(1)[:200]})


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("header", "bad.tar: is damaged or cut off"),
        ("cut", "bad.tar: unexpected end of data"),
        ("cut between", "bad.tar: is damaged or cut off"),
        ("two images", "bad.tar: x: needs one image member"),
        ("image", "bad.tar: broken: not a whole, readable image"),
    ],
)
def test_damage_is_passed_over_counted_and_named(tars: Path, kind: str, words: str, workers: int) -> None:
    (tars / "bad.tar").write_bytes(damaged(kind))
    made = stream(opened([str(tars / "bad.tar"), str(tars / "001.tar")], shuffle=1), workers=workers, max_corrupt=0.9)
    steps = list(made.steps(8))
    assert set(seen(steps)) == {0, 4, 5, 6, 7}
    unreadable = [each for step in steps for each in step.unreadable]
    assert len(unreadable) == made.corrupt >= 5
    assert len({each.where for each in unreadable}) == 1
    assert all(words in each.why for each in unreadable)
    strict = stream(opened([str(tars / "bad.tar"), str(tars / "001.tar")], shuffle=1), workers=workers)
    with pytest.raises(
        DataError, match=r"11 images or tars .* more than max_corrupt \(0\.001\) allows.*(\n.*bad\.tar)+"
    ):
        list(strict.steps(50))


def test_a_tar_that_is_not_padded_is_whole(tars: Path) -> None:
    content = (tars / "000.tar").read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512 + 1024)
    assert len(content) % tarfile.RECORDSIZE
    (tars / "short.tar").write_bytes(content)
    for url in (str(tars / "short.tar"), f"pipe:cat {tars}/short.tar"):
        made = stream(opened(url, allow_pipes=True, shuffle=1))
        assert set(seen(list(made.steps(4)))) == {0, 1, 2, 3}
        assert made.corrupt == 0


def test_nothing_but_broken_images_is_an_error_soon(tars: Path) -> None:
    (tars / "bad.tar").write_bytes(tarred({f"{number}.jpg": b"no image" for number in range(40)}))
    with pytest.raises(DataError, match=r"bad\.tar: \d+: not a whole.*; nor can the 15 images before it"):
        next(stream(opened(str(tars / "bad.tar"))).steps(1))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(tarred({"x.png": png(0)})), "is compressed"),
        (b"<html>not found</html>" * 100, "invalid header|is no tar"),
        (b"", "empty"),
        (tarred({"x.txt": b"text"}), "no member is an image"),
    ],
)
def test_what_is_no_tar_of_images(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(DataError, match=f"the last 5 tars hold no image that can be read; .*({words})"):
        next(stream(opened(str(tmp_path / "x.tar"))).steps(1))


def huge(kind: str) -> bytes:
    """The beginning of a tar that would fill the memory."""
    header = tarfile.TarInfo("x.png")
    header.size = 2**40
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    if kind == "header":
        block[156:157] = tarfile.GNUTYPE_LONGNAME
    elif kind == "sparse":
        block[156:157] = tarfile.GNUTYPE_SPARSE
        block[124:136] = b"%011o\0" % 512
        block[386:410] = b"%011o\0%011o\0" % (2**32, 512)
        block[483:495] = b"%011o\0" % (2**33 - 1)
    block[148:156] = b" " * 8
    block[148:155] = b"%06o\0" % sum(block)
    return bytes(block) + bytes(17 * 2**20)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("image", r"x: x\.png of \d+ bytes is above the bound of 536870912"),
        ("sparse", r"x: x\.png is a link, a device or a file with holes"),
        ("header", "holds a header above the bound of 16777216"),
    ],
)
def test_bombs_are_passed_over(tmp_path: Path, kind: str, words: str) -> None:
    (tmp_path / "x.tar").write_bytes(huge(kind))
    tars = remote_tars.Tars([str(tmp_path / "x.tar")], 1, random.Random(0))
    with pytest.raises(DataError, match="the last 5 tars hold no image"):
        next(tars)
    assert re.search(words, tars.lost[0].why)


def test_going_on_warns_and_gives_other_images(tars: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = opened(f"{tars}/{{000..002}}.tar")
    whole = list(stream(shards).steps(6))
    first = stream(shards)
    position = next(itertools.islice(first.steps(6), 1, None)) and first.state_dict()
    assert position["samples"] == 8
    with caplog.at_level(logging.WARNING, "explora"):
        ranks = [stream(shards, rank=rank, ranks=2, position=json.loads(json.dumps(position))) for rank in range(2)]
        stream(shards, position=stream(shards).state_dict())
    assert [line.partition(": ")[2] for line in caplog.messages] == ["not exactly resumable: goes on with other images"]
    steps = [list(one.steps(6)) for one in ranks]
    assert [step.index for step in steps[0]] == [2, 3, 4, 5]
    assert [one.state_dict()["samples"] for one in ranks] == [24, 24]
    numbers = [torch.cat([step.micro_batches[0]["number"] for step in one]).tolist() for one in steps]
    assert sorted(numbers[0] + numbers[1]) == list(range(8, 24))
    assert seen(list(stream(shards, position=position).steps(6))) != seen(whole[2:])
    assert seen(list(stream(shards, position=position).steps(6))) == seen(
        list(stream(shards, position=position).steps(6))
    )


def test_a_position_of_another_run_is_refused(tars: Path) -> None:
    shards, other = opened(f"{tars}/000.tar"), opened(f"{tars}/001.tar")
    position = stream(shards).state_dict()
    for made, words in (
        (lambda: stream(other, position=position), "urls: saved"),
        (lambda: stream(shards, position=position, seed=8), "seed: saved 7, now 8"),
        (lambda: stream(shards, position=position, batch_size=8), "batch size: saved 4, now 8"),
        (lambda: stream(shards, position={**position, "order": "full"}), "order: saved full, now remote"),
    ):
        with pytest.raises(DataError, match=words):
            made()


def test_what_remote_tars_cannot_give(tars: Path) -> None:
    shards = opened(f"{tars}/000.tar")
    with pytest.raises(DataError, match="have no labels"):
        stream(shards, Center(size=8))
    with pytest.raises(DataError, match="bands B08 are not among"):
        stream(shards, Whole(bands=("B08",), mean=(0.5,), std=(0.5,)))
    with pytest.raises(ConfigError, match="choose a multiple of 3"):
        stream(shards, micro_batches=3)
    with pytest.raises(DataError, match="do not say how many images they hold; give `samples`"):
        len(shards)


def test_a_set_says_what_it_is(tars: Path) -> None:
    config = configs.validate(RemoteConfig, {"urls": [f"{tars}/00{{0,1}}.tar"], "samples": 8})
    shards = RemoteSet(config)
    assert (len(shards), shards.classes, shards.name) == (8, None, f"{tars}/000.tar and 1 more")
    assert shards.fingerprint == opened((f"{tars}/000.tar", f"{tars}/001.tar")).fingerprint
    assert shards.fingerprint != opened(f"{tars}/000.tar").fingerprint
    assert remote_tars.shown("https://user:pass@host:8/a.tar?X-Amz-Signature=1#x") == "https://host:8/a.tar"
    for wrong in ({"urls": []}, {"urls": ""}, {"urls": "x.tar", "shuffle": 0}):
        with pytest.raises(ConfigError):
            configs.validate(RemoteConfig, wrong)


def test_a_buffer_mixes_tars(tars: Path) -> None:
    tarsful = remote_tars.Tars(opened(f"{tars}/{{000..002}}.tar").urls, 8, random.Random(0))
    wheres = [where for where, _ in itertools.islice(tarsful, 60)]
    changes = sum(one.split(": ")[0] != other.split(": ")[0] for one, other in itertools.pairwise(wheres))
    assert changes > 25  # fourteen if they came one tar after the other
