"""Images of several classes each: packed, read, refused where one label is needed, and single labels as ever."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from sklearn.preprocessing import MultiLabelBinarizer

from data_shards import table
from explora.bands import Pixels
from explora.data import Center, Listing, RawSample, ShardSet, batches, pack, stage
from explora.data.shards.manifest import ROW, fingerprint
from explora.errors import DataError

CLASSES = ["urban", "pasture", "forest", "moor", "marsh", "salt", "sea", "beach", "rock", "ice", "burnt"]
"""More than a byte of them."""
LABELS: list[tuple[int, ...]] = [(0, 10), (), (7,), (8, 7, 6), (2,), (10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), (1, 3)]
SEVERAL = 4000
"""Bytes of a shard that make several of these images."""


def images(root: Path, labels: list[tuple[int, ...]] | list[int]) -> list[RawSample]:
    root.mkdir(exist_ok=True)
    found = []
    for number, label in enumerate(labels):
        pixels = np.full((8, 8, 3), 20 * number, np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.bmp")
        found.append(RawSample(root / f"{number}.bmp", label))
    return found


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    root = tmp_path_factory.mktemp("several")
    pack(Listing(CLASSES, images(root / "raw", LABELS)), root / "out", name="x", shard_bytes=SEVERAL)
    return root / "out"


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed, tmp_path / "copied")


def test_every_image_keeps_its_labels(packed: Path) -> None:
    shards = ShardSet.open(packed)
    assert len(shards.manifest.shards) > 2
    expected = MultiLabelBinarizer(classes=range(len(CLASSES))).fit_transform(LABELS)
    assert shards.multilabel
    assert (shards.targets.dtype, shards.targets.shape) == (np.uint8, (7, 11))
    assert shards.targets.tolist() == expected.tolist()
    assert shards.taking(np.array([3, 0])).targets.tolist() == expected[[3, 0]].tolist()
    assert pickle.loads(pickle.dumps(shards.taking(np.array([5])))).targets.tolist() == expected[[5]].tolist()
    assert shards.index["label"].tolist() == [-1] * 7
    rows = np.load(packed / "labels.npy")
    assert [[c for c in range(11) if row[c // 8] >> c % 8 & 1] for row in rows] == [sorted(some) for some in LABELS]


def test_what_needs_one_label_is_refused(packed: Path) -> None:
    with pytest.raises(DataError, match=r"may have several labels each.* use what takes several labels"):
        _ = ShardSet.open(packed).labels


def test_batches_hold_a_row_for_each_image(packed: Path, tmp_path: Path) -> None:
    view, shards = Center(size=4, resize=4), ShardSet.open(packed)
    found = [batch["label"] for batch in batches(shards, view, 4, workers=0)]
    assert [(some.dtype, len(some)) for some in found] == [(torch.uint8, 4), (torch.uint8, 3)]
    assert torch.cat(found).tolist() == shards.targets.tolist()
    single = pack(Listing(CLASSES, images(tmp_path / "raw", [3, -1, 10])), tmp_path / "out", name="x")
    (batch,) = batches(single, view, 4, workers=0)
    assert (batch["label"].dtype, batch["label"].tolist()) == (torch.int64, [3, -1, 10])


def test_targets_of_single_labels(tmp_path: Path) -> None:
    shards = pack(Listing(["a", "b", "c"], images(tmp_path / "raw", [2, -1, 0])), tmp_path / "out", name="x")
    assert not shards.multilabel
    assert shards.targets.dtype == np.uint8
    assert shards.targets.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    bare = pack(Listing(None, images(tmp_path / "raw", [-1, -1])), tmp_path / "bare", name="x")
    assert bare.targets.shape == (2, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_them(packed: Path) -> None:
    paths = sorted(map(str, packed.glob("*.tar")))
    theirs = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [json.loads(sample["json"])["labels"] for sample in theirs] == [sorted(some) for some in LABELS]
    assert not any("cls" in sample for sample in theirs)


# What sets were before ----------------------------------------------------------------------------------------------


def test_sets_of_single_labels_are_what_they_were(tmp_path: Path) -> None:
    """Digests of what was written before there were several labels or masks; a manifest of then still opens."""
    raw = []
    for number, label in enumerate((0, 1, -1)):
        Image.fromarray(np.full((2, 3, 3), 40 * number, np.uint8)).save(tmp_path / f"{number}.bmp")
        raw.append(RawSample(tmp_path / f"{number}.bmp", label))
    out = tmp_path / "out"
    shards = pack(Listing(["crop", "water"], raw), out, name="x")
    assert shards.fingerprint == "776579e688e4b6a0def96aa96eece6d1c058c5b518927aaf42b469cb05a2f2c9"
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in out.glob("*[!n]")}
    assert files == {"index.npy": "07898580027e4a23", "shard-000000.tar": "668333fc786030ec"}
    said = json.loads((out / "manifest.json").read_text())
    assert said.pop("labels_sha256") is said.pop("masks") is None
    (out / "manifest.json").write_text(json.dumps(said))
    old = ShardSet.open(out)
    old.verify()
    assert old.labels.tolist() == [0, 1, -1]
    assert (old.multilabel, old.masks) == (False, None)


# The fingerprint, damage, copies ------------------------------------------------------------------------------------


def test_the_fingerprint_hangs_on_every_label(packed: Path, tmp_path: Path) -> None:
    whole = ShardSet.open(packed)
    again = pack(Listing(CLASSES, images(tmp_path / "raw", LABELS)), tmp_path / "one", name="y")
    assert again.fingerprint == whole.fingerprint
    other = pack(Listing(CLASSES, images(tmp_path / "raw", [(1, 10), *LABELS[1:]])), tmp_path / "two", name="x")
    single = pack(Listing(CLASSES, images(tmp_path / "raw", [-1] * 7)), tmp_path / "three", name="x")
    assert len({whole.fingerprint, other.fingerprint, single.fingerprint}) == 3


def test_the_fingerprint_is_what_the_docs_say() -> None:
    """The second example of docs/data.md: its text, then label, digest and bits of two images."""
    text = (Path(__file__).parents[1] / "docs/data.md").read_text(encoding="utf-8")
    example = next(line for line in text.splitlines() if line.endswith('{"masks": ["road"], "multilabel": true}]'))
    classes, pixels, _ = json.loads(example)
    rows = np.zeros(2, ROW)
    rows["label"], rows["digest"] = -1, (5, 6)
    bits, masks = np.array([[1], [2]], np.uint8), np.array([7, 8], np.uint64)
    by_hand = b"".join(
        (-1).to_bytes(4, "little", signed=True)
        + digest.to_bytes(8, "little")
        + bytes([row])
        + mask.to_bytes(8, "little")
        for digest, row, mask in ((5, 1, 7), (6, 2, 8))
    )
    columns = [(rows["label"], rows["digest"], bits, masks)]
    found = fingerprint(classes, Pixels(**pixels), columns, multilabel=True, masks=["road"])
    assert found == hashlib.sha256(example.encode() + by_hand).hexdigest()


def test_damaged_labels_are_found(copied: Path) -> None:
    ShardSet.open(copied).verify()
    path = copied / "labels.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"1 fault\(s\).*\n.*labels\.npy: not the labels that were packed$"):
        ShardSet.open(copied).verify()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"labels\.npy: damaged: expected the labels of 7 images in 11 classes; pack"):
        ShardSet.open(copied)
    path.unlink()
    with pytest.raises(DataError, match=r"labels\.npy: damaged: No such file"):
        ShardSet.open(copied)


def test_a_manifest_with_other_labels(copied: Path) -> None:
    path = copied / "manifest.json"
    said = json.loads(path.read_text())
    for change in ({"labels_sha256": "x"}, {"classes": None}):
        path.write_text(json.dumps(said | change))
        with pytest.raises(DataError, match=r"manifest\.json: damaged"):
            ShardSet.open(copied)
    path.write_text(json.dumps(said | {"labels_sha256": None}))
    with pytest.raises(DataError, match="not the index that was packed"):
        ShardSet.open(copied).verify()


def test_copies_on_a_node_hold_the_labels(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    place = stage(copied, tmp_path / "scratch")
    ShardSet.open(place).verify()
    (place / "labels.npy").unlink()
    assert ShardSet.open(stage(copied, tmp_path / "scratch")).targets.sum() == sum(map(len, LABELS))
    (place / "labels.npy").unlink()
    whole = (copied / "labels.npy").read_bytes()
    (copied / "labels.npy").write_bytes(whole[:-1] + b"\1")
    with pytest.raises(DataError, match=r"labels\.npy: damaged: its content is not what the manifest says"):
        stage(copied, tmp_path / "scratch")


# What is refused, and tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "labels", "words"),
    [
        (CLASSES, [(1,), 2], r"1\.bmp: label 2, but the images before it have a tuple of labels"),
        (CLASSES, [2, (1,)], r"1\.bmp: label \(1,\), but the images before it have one label"),
        (CLASSES, [(1,), (2, 11)], r"1\.bmp: label 11, but there are 11 class names"),
        (CLASSES, [(-1,)], r"0\.bmp: label -1, but"),
        (None, [()], "may have several labels, but there are no class names"),
    ],
)
def test_wrong_labels(classes: list[str] | None, labels: list[int], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        pack(Listing(classes, images(tmp_path / "raw", labels)), tmp_path / "out", name="x")
    assert not (tmp_path / "out").exists()


def test_a_table_of_several_labels(tmp_path: Path) -> None:
    images(tmp_path, [-1] * 4)
    path = tmp_path / "list.csv"
    path.write_text("path,Labels,split\n0.bmp,water; crop,a\n1.bmp,,a\n2.bmp,crop|crop|,b\n3.bmp,barn,a\n")
    listing = table.samples(path, "a")
    assert listing.classes == ["barn", "crop", "water"]
    assert [sample.label for sample in listing.samples] == [(1, 2), (), (0,)]
    shards = pack(table.samples(path), tmp_path / "out", name="x")
    assert shards.targets.tolist() == [[0, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]]
    path.write_text("path,labels\n0.bmp,4;0\n1.bmp,-1\n2.bmp,2\n")
    numbered = table.samples(path)
    assert numbered.classes == ["0", "1", "2", "3", "4"]
    assert [sample.label for sample in numbered.samples] == [(0, 4), (), (2,)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,label,labels\n0.bmp,1,1;2\n", "has both a column label, of one label an image, and labels, of several"),
        ("path,labels\n0.bmp,\n", "its column labels names no class"),
    ],
)
def test_a_wrong_table(text: str, words: str, tmp_path: Path) -> None:
    images(tmp_path, [-1])
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        table.samples(tmp_path / "list.csv")


def test_parquet_holds_lists(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images(tmp_path, [-1] * 3)
    columns = {"path": ["0.bmp", "1.bmp", "2.bmp"], "labels": [["sea, salt", "ice"], [], None]}
    parquet.write_table(arrow.table(columns), tmp_path / "list.parquet")
    listing = table.samples(tmp_path / "list.parquet")
    assert listing.classes == ["ice", "sea, salt"]
    assert [sample.label for sample in listing.samples] == [(0, 1), (), ()]


def test_members_are_plain(packed: Path) -> None:
    with tarfile.open(next(iter(sorted(packed.glob("*.tar"))))) as tar:
        assert [name.partition(".")[2] for name in tar.getnames()[:2]] == ["bmp", "json"]
