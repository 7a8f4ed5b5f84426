"""Recipes: what they make of a tree in the exact layout of a data set, and of one that is not."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_shards import eurosat, folder, resisc45, table, ucmerced
from data_shards.layout import Samples, checked
from explora.bands import PHOTOGRAPH, SENTINEL2
from explora.data.decode import decode
from explora.data.shards.listing import Listing, RawSample
from explora.data.shards.manifest import Groups
from explora.errors import DataError

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("EXPLORA_SHARED", "../shared"), "data")
BANDS = tuple(SENTINEL2)
"""As in ESA's products."""
MEANS = (
    1354.41,
    1118.24,
    1042.93,
    947.63,
    1199.47,
    1999.79,
    2369.22,
    2296.83,
    2594.14,
    732.08,
    12.11,
    1819.01,
    1118.92,
)
STDS = (245.72, 333.01, 395.09, 593.75, 566.42, 861.18, 1086.63, 1117.98, 1231.59, 404.92, 4.78, 1002.59, 761.30)
"""Published statistics of all 27,000 images of EuroSAT by band, see `reference/ecosystem.md` 3b."""


def touch(root: Path, *names: str) -> Path:
    """Empty files: recipes look at names only."""
    for name in names:
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def listed(listing: Listing) -> list[tuple[str, str | None]]:
    """Name and class of each sample; going through them twice gives the same."""
    samples = list(listing.samples)
    assert samples == list(listing.samples)
    assert all(sample.path.is_file() for sample in samples)
    classes = listing.classes or []
    return [(sample.name, classes[sample.label] if sample.label >= 0 else None) for sample in samples]


def shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no {name} in {SHARED}; set EXPLORA_SHARED to the folder that holds data/")
    return SHARED / name


def entry_points() -> dict[str, Callable[..., Listing]]:
    """What pyproject.toml names, as it is installed."""
    return {point.name: point.load() for point in importlib.metadata.entry_points(group="explora.recipes")}


def test_every_recipe_is_registered() -> None:
    written = set()
    for path in (ROOT / "data_shards").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("samples"):
                written.add(getattr(importlib.import_module(f"data_shards.{path.stem}"), node.name))
    assert written == set(entry_points().values()), "run `pip install -e . --no-deps` after a change of pyproject.toml"


@pytest.mark.parametrize("name", sorted({*entry_points(), "folder"}))
def test_a_missing_root_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such (folder|file); expected "):
        entry_points()[name](tmp_path / "nowhere")


@pytest.mark.parametrize("name", sorted({*entry_points()} - {"table"}))
def test_an_empty_root_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected|looked for"):
        entry_points()[name](tmp_path)


def test_folders_can_be_gone_through_twice(tmp_path: Path) -> None:
    touch(tmp_path, "train/b/2.png", "train/b/10.PNG", "train/a/1.tif", "train/a/notes.txt", "train/.git/x.png")
    assert listed(folder.samples(tmp_path, "train")) == [("a/1.tif", "a"), ("b/10.PNG", "b"), ("b/2.png", "b")]
    assert listed(folder.samples(tmp_path / "train" / "b")) == [("10.PNG", None), ("2.png", None)]
    with pytest.raises(DataError, match="no split 'test'; splits there: train"):
        folder.samples(tmp_path, "test")
    with pytest.raises(DataError, match=r"perhaps .*train itself is the root"):
        folder.samples(tmp_path)


# Class folders -------------------------------------------------------------------------------------------------------

NESTED = "ds/images/remote_sensing/otherDatasets/sentinel_2/tif"


@pytest.mark.parametrize(
    ("recipe", "home", "ending"),
    [
        (eurosat.samples, "", "jpg"),
        (eurosat.samples, "", "png"),
        (eurosat.samples, "2750", "jpg"),
        (eurosat.samples13, "", "tif"),
        (eurosat.samples13, NESTED, "tif"),
    ],
)
def test_eurosat(recipe: Callable[..., Listing], home: str, ending: str, tmp_path: Path) -> None:
    for name in eurosat.CLASSES:
        touch(tmp_path, *(f"{home}/{name}/{name}_{n}.{ending}" for n in (1, 2)), f"{home}/{name}/{name}_1.aux.xml")
    (tmp_path / "eurosat-train.txt").write_bytes(b"\xef\xbb\xbfRiver_2.jpg\r\nAnnualCrop_1.jpg\r\n\r\n")
    (tmp_path / "eurosat-test.txt").write_text("River_1.jpg\n")
    listing = recipe(tmp_path)
    assert listing.classes == list(eurosat.CLASSES) == sorted(eurosat.CLASSES)
    assert listed(listing)[:2] == [(f"AnnualCrop/AnnualCrop_{n}.{ending}", "AnnualCrop") for n in (1, 2)]
    assert len(listed(listing)) == 20
    order = [(f"River/River_2.{ending}", "River"), (f"AnnualCrop/AnnualCrop_1.{ending}", "AnnualCrop")]
    assert listed(recipe(tmp_path, "train")) == order
    assert listed(recipe(tmp_path, "test")) == [(f"River/River_1.{ending}", "River")]
    with pytest.raises(DataError, match="no split 'val'; splits there: test, train"):
        recipe(tmp_path, "val")
    assert listing.pixels is PHOTOGRAPH if ending != "tif" else len(listing.pixels.bands) == 13


def test_eurosat_has_rgb_and_all_bands_side_by_side(tmp_path: Path) -> None:
    touch(tmp_path, "2750/River/River_1.jpg", f"{NESTED}/River/River_1.tif", f"{NESTED}/River/River_2.tif")
    assert listed(eurosat.samples(tmp_path)) == [("River/River_1.jpg", "River")]
    assert len(listed(eurosat.samples13(tmp_path))) == 2
    with pytest.raises(DataError, match=r"no images; expected <class>/<image> ending in .tif or .tiff"):
        eurosat.samples13(tmp_path / "2750")


def test_class_folders_say_what_is_wrong(tmp_path: Path) -> None:
    touch(tmp_path, "River/River_1.tif", "Forest/Forest_1.tif", "notes/readme.txt")
    with pytest.raises(DataError, match=r"no split 'train'; expected a list eurosat-train\.txt"):
        eurosat.samples13(tmp_path, "train")
    (tmp_path / "eurosat-train.txt").write_text("Forest_1.jpg\nRiver_7.jpg\nRiver_8.jpg\n")
    said = r"eurosat-train\.txt: 2 of 3 images are not where they should be; the first is River_7\.jpg"
    with pytest.raises(DataError, match=said):
        eurosat.samples13(tmp_path, "train")
    (tmp_path / "eurosat-train.txt").write_text("\n")
    with pytest.raises(DataError, match="no images in it"):
        eurosat.samples13(tmp_path, "train")
    (tmp_path / "eurosat-train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        eurosat.samples13(tmp_path, "train")
    touch(tmp_path, "Rivers/River_1.tif")
    with pytest.raises(DataError, match="Rivers is no class of this data set, whose classes are AnnualCrop, "):
        eurosat.samples13(tmp_path)


def test_a_few_listed_images_may_be_absent(tmp_path: Path) -> None:
    touch(tmp_path, "River/River_1.tif", "Forest/Forest_1.tif")
    (tmp_path / "eurosat-train.txt").write_text("Forest_1.jpg\nRiver_7.jpg\nRiver_1.jpg\n")
    found = [(sample.name, sample.fault) for sample in eurosat.samples13(tmp_path, "train").samples]
    fault = "absent, but listed in eurosat-train.txt"
    assert found == [("Forest/Forest_1.tif", ""), ("River_7.jpg", fault), ("River/River_1.tif", "")]


def test_only_the_first_images_are_looked_at_unless_most_are_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_shards.layout.LOOKED_AT", 4)
    touch(tmp_path, "there.png")
    seen: list[int] = []

    def check(names: Sequence[str]) -> str:
        def find() -> Iterator[RawSample]:
            seen.clear()
            for number, name in enumerate(names, 1):
                seen.append(number)
                yield RawSample(tmp_path / f"{name}.png")
            raise DataError("line 10: damaged")

        samples = checked(Samples(find), tmp_path / "list.csv")
        looked_at = len(seen)
        with pytest.raises(DataError, match="line 10: damaged"):
            list(samples)
        return f"{looked_at} of {len(seen)}"

    assert check(["there"] * 9) == "4 of 9"
    assert check(["x", "there", "x", "there"] + ["x"] * 5) == "4 of 9"
    assert check(["x", "x", "x"] + ["there"] * 6) == "6 of 9"
    with pytest.raises(DataError, match="line 10: damaged"):
        check(["x"] * 9)


@pytest.mark.parametrize("home", ["NWPU-RESISC45", ""])
def test_resisc45(home: str, tmp_path: Path) -> None:
    for name in resisc45.CLASSES:
        touch(tmp_path, *(f"{home}/{name}/{name}_{n:03}.jpg" for n in (1, 2)))
    (tmp_path / "resisc45-val.txt").write_text("storage_tank_002.jpg\nairplane_001.jpg\n")
    listing = resisc45.samples(tmp_path)
    assert listing.classes == sorted(set(listing.classes or ()))
    assert len(listing.classes) == 45
    assert len(listed(listing)) == 90
    two = [("storage_tank/storage_tank_002.jpg", "storage_tank"), ("airplane/airplane_001.jpg", "airplane")]
    assert listed(resisc45.samples(tmp_path, "val")) == two


@pytest.mark.parametrize("home", ["Images", "UCMerced_LandUse/Images", ""])
def test_ucmerced(home: str, tmp_path: Path) -> None:
    for name in ucmerced.CLASSES:
        touch(tmp_path, *(f"{home}/{name}/{name}{n:02}.tif" for n in (0, 1)))
    (tmp_path / "uc_merced-test.txt").write_text("tenniscourt01.tif\nagricultural00.tif\n")
    listing = ucmerced.samples(tmp_path)
    assert listing.classes == sorted(set(listing.classes or ()))
    assert len(listing.classes) == 21
    assert len(listed(listing)) == 42
    two = [("tenniscourt/tenniscourt01.tif", "tenniscourt"), ("agricultural/agricultural00.tif", "agricultural")]
    assert listed(ucmerced.samples(tmp_path, "test")) == two


def test_a_divided_ucmerced(tmp_path: Path) -> None:
    touch(tmp_path, "train/airplane/airplane01.jpg", "test/airplane/airplane00.jpg", "test/river/river03.jpg")
    both = [("train/airplane/airplane01.jpg", "airplane"), ("test/airplane/airplane00.jpg", "airplane")]
    assert listed(ucmerced.samples(tmp_path)) == [*both, ("test/river/river03.jpg", "river")]
    assert listed(ucmerced.samples(tmp_path, "train")) == both[:1]
    assert {sample.label for sample in ucmerced.samples(tmp_path / "test").samples} == {1, 16}
    with pytest.raises(DataError, match="no split 'val'; splits there: train, test"):
        ucmerced.samples(tmp_path, "val")


# Real data -----------------------------------------------------------------------------------------------------------


def test_the_real_tifs_have_the_bands_that_the_recipe_says() -> None:
    listing = eurosat.samples13(shared("eurosat100/tif"))
    images = [decode(sample.path.read_bytes(), listing.pixels) for sample in listing.samples]
    assert len(images) == 100
    assert {(image.shape, image.dtype) for image in images} == {((64, 64, 13), np.dtype("uint16"))}
    means = np.mean(images, axis=(0, 1, 2))
    named = dict(zip(listing.pixels.names, means, strict=True))
    assert min(named, key=named.__getitem__) == "B10"
    assert max(named, key=named.__getitem__) == "B8A"

    def far_from_published(names: Sequence[str]) -> set[str]:
        found = dict(zip(names, means, strict=True))
        return {n for n, mean, std in zip(BANDS, MEANS, STDS, strict=True) if abs(found[n] - mean) > 0.35 * std}

    assert far_from_published(listing.pixels.names) == set()
    assert {"B8A", "B09", "B10"} <= far_from_published(BANDS), "the order of ESA's products would be wrong"


def test_the_real_pictures() -> None:
    assert len(listed(eurosat.samples(shared("eurosat100/png")))) == 100
    merced = shared("ucmerced")
    assert len(listed(ucmerced.samples(merced))) == 2100
    assert len(listed(ucmerced.samples(merced, "train"))) == 1680
    listing = ucmerced.samples(merced / "test")
    assert np.bincount([sample.label for sample in listing.samples]).tolist() == [20] * 21


# Tables --------------------------------------------------------------------------------------------------------------


def csv(folder: Path, text: str) -> Path:
    touch(folder, "a.png", "deep/b.png", "c.png")
    (folder / "list.csv").write_bytes(text.encode())
    return folder / "list.csv"


def test_a_csv_as_excel_writes_it(tmp_path: Path) -> None:
    path = csv(
        tmp_path,
        "\ufeffid,Image_Path,note,Category,region,split\r\n"
        '1,c.png,"dry, ""very""",river,Asia,train\r\n2,deep/b.png,,barn,,test\r\n\r\n'
        '3,a.png,"two\nlines",,Africa,train\r\n',
    )
    listing = table.samples(path)
    assert listing.classes == ["barn", "river"]
    assert listed(listing) == [("c.png", "river"), ("deep/b.png", "barn"), ("a.png", None)]
    assert listing.groups == Groups(by="region", names=["Africa", "Asia"])
    assert [sample.group for sample in listing.samples] == [1, -1, 0]
    train = table.samples(path, "train")
    assert train.classes == ["barn", "river"], "a split has the classes of the whole table"
    assert listed(train) == [("c.png", "river"), ("a.png", None)]
    with pytest.raises(DataError, match="no split 'val'; splits there: test, train"):
        table.samples(path, "val")


def test_numbers_are_labels_as_they_are(tmp_path: Path) -> None:
    listing = table.samples(csv(tmp_path, f"label,path\n2,a.png\n-1,c.png\n0.0,{tmp_path / 'deep/b.png'}\n"))
    assert listing.classes == ["0", "1", "2"]
    assert [sample.label for sample in listing.samples] == [2, -1, 0]
    assert table.samples(csv(tmp_path, "path\na.png\n")).classes is None
    assert table.samples(csv(tmp_path, "path,label\na.png,10\nc.png,2 bis\n")).classes == ["10", "2 bis"]
    with pytest.raises(DataError, match="123456790 classes"):
        table.samples(csv(tmp_path, "path,label\na.png,123456789\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,label\na.png,1\n", "no column of paths .*; columns there: name, label"),
        ("", "no column of paths .*; columns there: none"),
        ("path,label\n", "list.csv: no images in it"),
        ("path,label\na.png,1\nx.png,1\ny.png,1\n", "2 of 3 images are not where they should be; the first is .*x.png"),
        ("path,label\na.png,1\n,1\n", "line 3: no path"),
        ("path,label\na.png\n", "line 2: 1 cells, but there are 2 columns"),
    ],
)
def test_a_wrong_csv(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        table.samples(csv(tmp_path, text))


def test_other_wrong_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no column for the split 'train'; name it split or"):
        table.samples(csv(tmp_path, "path\na.png\n"), "train")
    (tmp_path / "list.csv").write_bytes(b"path\n\xff\xfe\n")
    with pytest.raises(DataError, match="cannot be read as CSV in UTF-8"):
        table.samples(tmp_path / "list.csv")
    with pytest.raises(DataError, match=r"expected a file that ends in \.csv or \.parquet"):
        table.samples(touch(tmp_path, "list.xls") / "list.xls")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install 'explora\[parquet\]'"):
        table.samples(touch(tmp_path, "list.parquet") / "list.parquet")


def test_parquet_says_the_same_as_csv(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"path": ["c.png", "a.png", "deep/b.png"], "label": [1.0, None, 0.0], "split": ["x", "y", "x"]}
    parquet.write_table(pa.table({**columns, "bytes": [b"1", b"2", b"3"]}), tmp_path / "list.parquet", row_group_size=2)
    path = csv(tmp_path, "path,label,split\nc.png,1,x\na.png,,y\ndeep/b.png,0,x\n")
    for split in (None, "x"):
        one, two = table.samples(tmp_path / "list.parquet", split), table.samples(path, split)
        assert (one.classes, list(one.samples)) == (two.classes, list(two.samples))
    (tmp_path / "list.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        table.samples(tmp_path / "list.parquet")
