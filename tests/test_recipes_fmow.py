"""The three recipes of fMoW on tiny trees in their exact layouts, with what is ugly about them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from data_shards import fmow_rgb, fmow_sentinel, wilds_fmow
from explora.data.shards.listing import Listing
from explora.errors import DataError


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def listed(listing: Listing) -> list[tuple[str, str]]:
    """Name and class of each sample; going through them twice gives the same."""
    samples = list(listing.samples)
    assert samples == list(listing.samples)
    assert all(sample.path.is_file() for sample in samples)
    return [(sample.name, (listing.classes or [])[sample.label]) for sample in samples]


def test_there_are_62_classes_in_the_order_of_the_alphabet() -> None:
    assert len(fmow_rgb.CLASSES) == 62
    assert list(fmow_rgb.CLASSES) == sorted(set(fmow_rgb.CLASSES))
    assert fmow_rgb.NO_CLASS not in fmow_rgb.CLASSES
    # Numbers that SatMAE's lists of the classes give, as anchors against a forgotten one.
    assert [fmow_rgb.CLASSES.index(name) for name in ("airport", "dam", "park", "zoo")] == [0, 12, 34, 61]


# fMoW-RGB, official --------------------------------------------------------------------------------------------------


def place(
    root: Path, split: str, category: str, image: str, *boxes: tuple[str, list[int]], size: tuple[int, int]
) -> Path:
    """One image as the archive has it: both resolutions, each with its metadata. Returns the path of the JSON."""
    folder = root / split / category / f"{category}_{image.partition('_')[0]}"
    for kind, scale in (("rgb", 1), ("msrgb", 4)):
        stem = touch(folder / f"{category}_{image}_{kind}.jpg").with_suffix(".json")
        found = [
            {"ID": number, "category": said, "box": [side // scale for side in box], "visible": True}
            for number, (said, box) in enumerate(boxes, 7)
        ]
        metadata = {"gsd": 0.5 * scale, "timestamp": "2015-04-11T09:18:14Z", "country_code": "FRA"}
        sizes = {"img_width": size[0] // scale, "img_height": size[1] // scale}
        stem.write_text(json.dumps({**metadata, **sizes, "bounding_boxes": found}))
    return folder / f"{category}_{image}_rgb.json"


def official(root: Path) -> Path:
    place(root, "train", "zoo", "0_1", ("zoo", [100, 200, 300, 400]), size=(1000, 1000))
    two = [
        ("zoo", [0, 0, 600, 600]),
        ("false_detection", [1, 1, 50, 50]),
        ("barn", [900, 950, 60, 50]),
        ("barn", [5, 5, 2, 9]),
    ]
    place(root, "train", "zoo", "0_0", *two, size=(1000, 1000))
    place(root, "train", "false_detection", "4_0", ("false_detection", [10, 10, 90, 90]), size=(500, 500))
    place(root, "train", "airport", "12_3", ("airport", [0, 0, 500, 100]), size=(1000, 200))
    place(root, "val", "airport_hangar", "3_0", ("airport_hangar", [5, 6, 20, 30]), size=(800, 600))
    touch(root / "train" / "airport" / "airport_12" / ".DS_Store")
    touch(root / "seq" / "0012_0" / "0012_0_0_rgb.jpg")
    return root


def test_official_metadata(tmp_path: Path) -> None:
    root = official(tmp_path)
    train = [
        ("train/airport/airport_12/airport_12_3_rgb.jpg", "airport"),
        ("train/zoo/zoo_0/zoo_0_0_rgb.jpg#0", "zoo"),
        ("train/zoo/zoo_0/zoo_0_0_rgb.jpg#2", "barn"),
        ("train/zoo/zoo_0/zoo_0_1_rgb.jpg", "zoo"),
    ]
    val = [("val/airport_hangar/airport_hangar_3/airport_hangar_3_0_rgb.jpg", "airport_hangar")]
    assert listed(fmow_rgb.samples(root, "train")) == train
    assert listed(fmow_rgb.samples(root, "val")) == val
    assert listed(fmow_rgb.samples(root)) == train + val
    with pytest.raises(DataError, match="no split 'seq'; splits there: train, val"):
        fmow_rgb.samples(root, "seq")


def test_boxes_are_cut_with_context(tmp_path: Path) -> None:
    boxes = {sample.name: sample.box for sample in fmow_rgb.samples(official(tmp_path)).samples}
    # 300 and 400 of 1000 pixels: a margin of 0.3 and 0.2 times the box, half of it on each side.
    assert boxes["train/zoo/zoo_0/zoo_0_1_rgb.jpg"] == (100 - 45, 200 - 40, 300 + 90, 400 + 80)
    # 600 of 1000: 0.15 times, cut at the upper left.
    assert boxes["train/zoo/zoo_0/zoo_0_0_rgb.jpg#0"] == (0, 0, 600 + 45, 600 + 45)
    # 60 and 50 of 1000: 2 times, cut at the lower right.
    assert boxes["train/zoo/zoo_0/zoo_0_0_rgb.jpg#2"] == (840, 900, 160, 100)
    # As in the official baseline, 500 wide is compared with a height of 200, and 100 high with a width of 1000.
    assert boxes["train/airport/airport_12/airport_12_3_rgb.jpg"] == (0, 0, 500 + 37, 100 + 50)


def test_one_box_may_stand_without_a_list(tmp_path: Path) -> None:
    path = place(tmp_path, "train", "zoo", "0_1", ("zoo", [100, 200, 300, 400]), size=(1000, 1000))
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "bounding_boxes": content["bounding_boxes"][0]}))
    assert listed(fmow_rgb.samples(tmp_path)) == [("train/zoo/zoo_0/zoo_0_1_rgb.jpg", "zoo")]


def test_official_metadata_that_is_wrong(tmp_path: Path) -> None:
    root = official(tmp_path)
    path = root / "train/zoo/zoo_0/zoo_0_1_rgb.json"
    whole = path.read_text()
    name = "train/zoo/zoo_0/zoo_0_1_rgb.jpg"

    def fault() -> str:
        found = {sample.name: sample for sample in fmow_rgb.samples(root, "train").samples}
        assert len(found) == 4
        assert [key for key, sample in found.items() if sample.fault] == [name]
        assert (found[name].path, found[name].label) == (root / name, -1)
        return found[name].fault

    deep = "[" * 100_000
    for damaged in ("", "[]", deep, whole[:-10], whole.replace('"box"', '"bux"'), whole.replace("1000", "0")):
        path.write_text(damaged)
        assert fault().startswith("zoo_0_1_rgb.json: no readable metadata of fMoW: ")
    path.write_text(whole.replace('"zoo"', '"circus"'))
    assert fault() == "zoo_0_1_rgb.json: 'circus' is none of the 62 classes of fMoW"
    path.unlink()
    assert fault().startswith("zoo_0_1_rgb.json: no readable metadata of fMoW: FileNotFoundError")


def test_official_images_that_are_absent(tmp_path: Path) -> None:
    root = official(tmp_path)
    (root / "train/airport/airport_12/airport_12_3_rgb.jpg").unlink()
    assert len(list(fmow_rgb.samples(root, "train").samples)) == 4, "the packer leaves it out"
    (root / "train/zoo/zoo_0/zoo_0_0_rgb.json").write_text("")
    with pytest.raises(DataError, match=r"train: 2 of 3 images are not where .*airport_12_3_rgb\.jpg \(absent\)"):
        fmow_rgb.samples(root)
    assert len(listed(fmow_rgb.samples(root, "val"))) == 1


# fMoW-RGB, SatMAE's lists --------------------------------------------------------------------------------------------


def test_satmae_csv(tmp_path: Path) -> None:
    elsewhere = touch(tmp_path / "elsewhere" / "zoo_0_0_rgb.jpg")
    root = official(tmp_path / "fmow")  # is not looked at beside a list
    for name in ("train/zoo/zoo_0/zoo_0_0_rgb.jpg", "train/airport/airport_12/airport_12_3_rgb.jpg"):
        touch(root / "cut" / name)
    (root / "train_62classes.csv").write_bytes(
        b"\xef\xbb\xbfcategory,location,timestamp,cloud\r\n"
        b"61,cut/train/zoo/zoo_0/zoo_0_0_rgb.jpg,2015-04-11T09:18:14Z,0\r\n"
        b"airport,cut/train/airport/airport_12/airport_12_3_rgb.jpg,2015-04-11T09:18:14Z,0\r\n"
    )
    (root / "test_62classes.csv").write_text(f"61,{elsewhere},2015-04-11T09:18:14Z\n")
    train = [
        ("cut/train/zoo/zoo_0/zoo_0_0_rgb.jpg", "zoo"),
        ("cut/train/airport/airport_12/airport_12_3_rgb.jpg", "airport"),
    ]
    assert listed(fmow_rgb.samples(root, "train")) == train
    assert listed(fmow_rgb.samples(root)) == [(str(elsewhere), "zoo"), *train]
    assert {sample.box for sample in fmow_rgb.samples(root).samples} == {None}
    with pytest.raises(DataError, match="no split 'val'; splits there: test, train"):
        fmow_rgb.samples(root, "val")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("label,path,timestamp\n", r"train_62classes\.csv: no images in it"),
        ("label,path,timestamp\n62,a.jpg,2015\n", r"line 2: '62' is none of the 62 classes"),
        ("0,a.jpg,2015\nzo,a.jpg,2015\n", r"line 2: 'zo' is none of the 62 classes"),
        ("0\n", r"line 1: expected label, image path, timestamp"),
        ("0,a.jpg,2015\n1,b.jpg,2015\n1,c.jpg,2015\n", r"2 of 3 images are not where they should be; .*b\.jpg"),
    ],
)
def test_satmae_csv_that_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg")
    (tmp_path / "train_62classes.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        fmow_rgb.samples(tmp_path)


# fMoW-Sentinel -------------------------------------------------------------------------------------------------------

HEADER = ",category,location_id,image_id,timestamp,polygon"
POLYGON = '"POLYGON ((32.6 39.9, 32.7 39.9, 32.7 39.8, 32.6 39.9))"'


@pytest.mark.parametrize("home", ["", "fmow-sentinel/"])
def test_fmow_sentinel(home: str, tmp_path: Path) -> None:
    train = ["train/zoo/zoo_7/zoo_7_11.tif", "train/airport_hangar/airport_hangar_0/airport_hangar_0_2.tif"]
    for name in [*train, "val/zoo/zoo_9/zoo_9_0.tif", "train/zoo/zoo_7/zoo_7_12.tif"]:
        touch(tmp_path / home / name)
    rows = [f"0,zoo,7,11,2016-04-11T09:18:14Z,{POLYGON}", f"1,airport_hangar,0,2,2017-01-01T00:00:00Z,{POLYGON}"]
    (tmp_path / "train.csv").write_text("\n".join([HEADER, *rows]))
    (tmp_path / "val.csv").write_text(f"{HEADER}\n0,zoo,9,0,2016-04-11T09:18:14Z,{POLYGON}\n")
    (tmp_path / "countries.csv").write_text("country,code\nFrance,FRA\n")
    both = [(home + train[0], "zoo"), (home + train[1], "airport_hangar")]
    assert listed(fmow_sentinel.samples(tmp_path, "train")) == both
    assert listed(fmow_sentinel.samples(tmp_path)) == [*both, (f"{home}val/zoo/zoo_9/zoo_9_0.tif", "zoo")]
    with pytest.raises(DataError, match="no split 'test'; splits there: train, val"):
        fmow_sentinel.samples(tmp_path, "test")


def test_fmow_sentinel_means_reflectance_of_13_bands(tmp_path: Path) -> None:
    touch(tmp_path / "train/zoo/zoo_7/zoo_7_11.tif")
    (tmp_path / "train.csv").write_text("category,location_id,image_id,timestamp\nzoo,7,11,2016-04-11T09:18:14Z\n")
    pixels = fmow_sentinel.samples(tmp_path).pixels
    assert (pixels.dtype, pixels.unit, pixels.scale, pixels.offset) == ("uint16", "reflectance", 1e-4, 0)
    # SatMAE drops the bands 0, 9 and 10 and groups what is left; these are the groups by name.
    left = [name for number, name in enumerate(pixels.names) if number not in (0, 9, 10)]
    groups = [[left[number] for number in group] for group in ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))]
    assert groups == [["B02", "B03", "B04", "B08"], ["B05", "B06", "B07", "B8A"], ["B11", "B12"]]


def test_fmow_sentinel_with_paths_of_its_own(tmp_path: Path) -> None:
    touch(tmp_path / "flat" / "one.tif")
    table = "category,location_id,image_id,timestamp,image_path\nzoo,7,11,2016-04-11T09:18:14Z,"
    (tmp_path / "train.csv").write_text(table + "flat/one.tif\n")
    assert listed(fmow_sentinel.samples(tmp_path)) == [("flat/one.tif", "zoo")]
    again = "\nzoo,7,12,2016-04-11T09:18:14Z,"
    (tmp_path / "train.csv").write_text(f"{table}flat/absent.tif{again}flat/one.tif\n")
    assert [sample.name for sample in fmow_sentinel.samples(tmp_path).samples] == ["flat/absent.tif", "flat/one.tif"]
    (tmp_path / "train.csv").write_text(table + "/atlas/fmow-sentinel/train/zoo/zoo_7/zoo_7_11.tif\n")
    with pytest.raises(DataError, match=r"1 of 1 images are not where they should be; .*train/zoo/zoo_7/zoo_7_11\.tif"):
        fmow_sentinel.samples(tmp_path)
    touch(tmp_path / "train/zoo/zoo_7/zoo_7_11.tif")
    assert listed(fmow_sentinel.samples(tmp_path)) == [("train/zoo/zoo_7/zoo_7_11.tif", "zoo")]


# WILDS ---------------------------------------------------------------------------------------------------------------

ROWS = [
    *[("train", "zoo", "FRA", "2012-12-31T23:59:59Z"), ("train", "zoo", "FRA", "2013-01-01T00:00:00Z")],
    *[("val", "dam", "KEN", "2012-06-01T00:00:00Z"), ("val", "dam", "KEN", "2013-01-01T00:00:00Z")],
    *[("val", "dam", "KEN", "2015-12-31T23:59:59Z"), ("val", "dam", "KEN", "2016-01-01T00:00:00Z")],
    *[("test", "barn", "ATA", "2012-06-01T00:00:00Z"), ("test", "barn", "XKX", "2015-06-01T00:00:00Z")],
    *[("test", "barn", "XKX", "2016-01-01T00:00:00Z"), ("test", "barn", "JPN", "2017-06-01T00:00:00Z")],
    *[("seq", "barn", "JPN", "2011-06-01T00:00:00Z"), ("train", "barn", "JPN", "2002-06-01T00:00:00Z")],
]
SPLITS = {"train": [0, 11], "id_val": [2], "id_test": [6], "val": [3, 4], "test": [8, 9]}
"""Rows by split, told by hand from the code of WILDS 1.1: official scheme, `time_after_2016`."""


def wilds(root: Path) -> Path:
    lines = [f"{split},{n},{name},{code},{time},0.5" for n, (split, name, code, time) in enumerate(ROWS)]
    (root / "rgb_metadata.csv").write_text(
        "\n".join(["split,img_id,category,country_code,timestamp,gsd", *lines]) + "\n"
    )
    countries = [
        "France,FRA,Europe",
        "Kenya,KEN,Africa",
        "Japan,JPN,Asia",
        '"Congo, the",COD,Africa',
        "Antarctica,ATA,",
    ]
    (root / "country_code_mapping.csv").write_text("\n".join(["name,alpha-3,region", *countries]) + "\n")
    for row in range(len(ROWS)):
        touch(root / "images" / f"rgb_img_{row}.png")
    return root


def test_wilds_splits_by_split_and_year(tmp_path: Path) -> None:
    root = wilds(tmp_path)
    for split, rows in SPLITS.items():
        expected = [(f"images/rgb_img_{row}.png", ROWS[row][1]) for row in rows]
        assert listed(wilds_fmow.samples(root, split)) == expected
    everything = sorted(row for rows in SPLITS.values() for row in rows)
    assert [name for name, _ in listed(wilds_fmow.samples(root))] == [f"images/rgb_img_{row}.png" for row in everything]
    with pytest.raises(DataError, match="no split 'seq'; splits there: train, id_val, id_test, val, test"):
        wilds_fmow.samples(root, "seq")


def test_wilds_regions_are_groups(tmp_path: Path) -> None:
    root = wilds(tmp_path)
    listing = wilds_fmow.samples(root)
    assert listing.groups is not None
    assert listing.groups.by == "region"
    assert listing.groups.names == ["Africa", "Asia", "Europe", "Other"]
    found = Counter(listing.groups.names[sample.group] for sample in listing.samples)
    assert found == {"Africa": 3, "Asia": 2, "Europe": 1, "Other": 2}, "unknown codes and empty regions are Other"
    assert wilds_fmow.samples(root, "id_test").groups == listing.groups, "splits number groups alike"


def test_wilds_that_is_wrong(tmp_path: Path) -> None:
    root = wilds(tmp_path)
    (root / "images" / "rgb_img_9.png").unlink()
    assert len(list(wilds_fmow.samples(root, "test").samples)) == 2
    (root / "images" / "rgb_img_8.png").unlink()
    with pytest.raises(DataError, match=r"2 of 2 images are not where they should be; .*rgb_img_8\.png"):
        wilds_fmow.samples(root, "test")
    metadata = (root / "rgb_metadata.csv").read_text()
    (root / "rgb_metadata.csv").write_text(metadata.replace("2002-06-01T00:00:00Z", "yesterday"))
    with pytest.raises(DataError, match="line 13: timestamp 'yesterday' does not begin with a year"):
        wilds_fmow.samples(root, "train")
    (root / "rgb_metadata.csv").write_text(metadata.replace("timestamp", "time"))
    with pytest.raises(DataError, match="no column timestamp; columns there: split, img_id, category"):
        wilds_fmow.samples(root)
    (root / "country_code_mapping.csv").unlink()
    with pytest.raises(DataError, match=r"no country_code_mapping\.csv; expected it there"):
        wilds_fmow.samples(root)
