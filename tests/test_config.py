"""Configs: every mistake at once, named by the path and the words of the user."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from explora import config as configs
from explora.config import Config
from explora.errors import ConfigError
from explora.schedules import Length, LengthField

MEANT = "; did you mean 'pear'?"


class Apple(Config):
    name: Literal["apple"] = "apple"
    rank: int = Field(8, ge=1)
    sweet: bool = True


class Pear(Config):
    name: Literal["pear"] = "pear"
    length: float = 1.0
    width: float = 1.0

    @model_validator(mode="after")
    def _longish(self) -> Pear:
        if self.width > self.length:
            raise ValueError(f"width {self.width} is above length {self.length}")
        return self


class Optim(Config):
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


class Tree(Config):
    fruit: Annotated[Apple | Pear, Field(discriminator="name")] = Apple()
    basket: tuple[Annotated[Apple | Pear, Field(discriminator="name")], ...] = ()
    bowl: tuple[Annotated[Apple | Pear, Field(discriminator="name")], ...] = Field((Apple(),), min_length=1)
    optim: Optim = Optim()
    count: int | Literal["auto"] = "auto"
    steps: LengthField = Length(10, "epochs")
    kind: Literal["wild", "tame"] = "tame"
    title: str | None = None


def problems(raw: Any, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        configs.load(Tree, raw, overrides)
    head, *lines = str(caught.value).split("\n")
    assert head.startswith(f"config: {len(lines)} problem")
    assert all(line.startswith("  ") and not line.startswith("   ") for line in lines)
    return [line.strip() for line in lines]


def test_the_message_of_the_design(tmp_path: Path) -> None:
    path = tmp_path / "fmow.yaml"
    path.write_text("optim: {lrr: 1e-4}\nfruit: {name: apple, rank: two}\n")
    with pytest.raises(ConfigError) as caught:
        configs.load(Tree, path)
    assert str(caught.value).split("\n") == [
        f"{path}: 2 problems",
        "  fruit.rank: expected an integer, got 'two'",
        "  optim.lrr: no such key; did you mean 'lr'?",
    ]


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({"optin": {}}, "optin: no such key; did you mean 'optim'?"),
        ({"zzz": 1}, "zzz: no such key"),
        ({"fruit": {"name": "apple", "rnak": 3}}, "fruit.rnak: no such key of 'apple'; did you mean 'rank'?"),
        ({"fruit": {"name": "pear", "rank": 3}}, "fruit.rank: no such key of 'pear'"),
        (
            {"fruit": {"name": "appel"}},
            "fruit.name: expected one of 'apple', 'pear', got 'appel'; did you mean 'apple'?",
        ),
        ({"fruit": {"rank": 3}}, "fruit.name: required, but not given"),
        ({"fruit": "apple"}, "fruit: expected a mapping of keys, got 'apple'; write {name: apple}"),
        ({"bowl": []}, "bowl: expected at least 1 of them"),
        ({"bowl": [{"name": "pera"}]}, "bowl.0.name: expected one of 'apple', 'pear', got 'pera'" + MEANT),
        ({"fruit": {"name": "pear", "width": 2}}, "fruit: width 2.0 is above length 1.0"),
        ({"fruit": {"name": "apple", "rank": 0}}, "fruit.rank: expected a value greater than or equal to 1, got 0"),
        ({"fruit": {"name": "apple", "rank": 1.5}}, "fruit.rank: expected an integer, got 1.5"),
        ({"fruit": {"name": "apple", "sweet": "very"}}, "fruit.sweet: expected true or false, got 'very'"),
        (
            {"basket": [{"name": "pear"}, {"name": "pear", "length": "x"}]},
            "basket.1.length: expected a number, got 'x'",
        ),
        ({"basket": [{"name": "pear", "width": 2}]}, "basket.0: width 2.0 is above length 1.0"),
        ({"count": "many"}, "count: expected an integer or 'auto', got 'many'"),
        ({"kind": "odd"}, "kind: expected 'wild' or 'tame', got 'odd'"),
        ({"optim": {"betas": [0.9]}}, "optim.betas.1: required, but not given"),
        ({"optim": {"lr": float("inf")}}, "optim.lr: expected a finite number, got inf"),
        ({"optim": None}, "optim: expected a mapping of keys, got None"),
        ({"title": 3}, "title: expected a string, got 3"),
    ],
)
def test_each_mistake_in_the_users_words(raw: dict[str, Any], line: str) -> None:
    assert problems(raw) == [line]


def test_a_wrong_length_says_what_lengths_look_like() -> None:
    (line,) = problems({"steps": "ten"})
    assert line.startswith("steps: expected a length such as 150,")
    assert line.endswith("got 'ten'")


def test_all_mistakes_at_once() -> None:
    raw = {"fruit": {"name": "apple", "rank": "x", "swet": 1}, "optim": {"lr": "fast"}, "extra": 0, "kind": 5}
    assert {line.partition(":")[0] for line in problems(raw)} == {
        "fruit.rank",
        "fruit.swet",
        "optim.lr",
        "extra",
        "kind",
    }


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text, value in {"1e-4": 1e-4, "1E3": 1e3, "-.5e1": -5.0, "2": 2.0, "1_0.5e+1": 105.0}.items():
        path.write_text(f"optim: {{lr: {text}}}")
        assert configs.read(path) == {"optim": {"lr": value}}
        assert configs.load(Tree, {}, [f"optim.lr={text}"]).optim.lr == value
    path.write_text("title: 1e-4x")
    assert configs.read(path) == {"title": "1e-4x"}


def test_overrides_as_list_and_as_mapping_leave_the_source_alone() -> None:
    source = {"optim": {"lr": 1.0}, "fruit": {"name": "apple", "rank": 2}}
    listed = configs.load(Tree, source, ["optim.lr=1e-4", "fruit={name: pear, length: 3}", "title=a=b"])
    mapped = configs.load(Tree, source, {"optim.lr": 1e-4, "fruit": {"name": "pear", "length": 3}, "title": "a=b"})
    assert listed == mapped
    assert (listed.optim.lr, listed.fruit, listed.title) == (1e-4, Pear(length=3), "a=b")
    assert source == {"optim": {"lr": 1.0}, "fruit": {"name": "apple", "rank": 2}}


def test_overrides_that_cannot_be_applied() -> None:
    for override, words in (
        ("optim.lr", "expected key=value"),
        ("=3", "expected key=value"),
        ("optim.lr.x=3", "'lr' holds 0.5, which has no keys"),
        ("title=[", "not valid YAML"),
    ):
        with pytest.raises(ConfigError, match=words):
            configs.load(Tree, {"optim": {"lr": 0.5}}, [override])
    assert problems({}, "optim.lrr=3") == ["optim.lrr: no such key; did you mean 'lr'?"]


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPLORA_TEST_ROOT", "/data")
    monkeypatch.delenv("EXPLORA_TEST_ABSENT", raising=False)
    raw = {"title": "${EXPLORA_TEST_ROOT}/x/${EXPLORA_TEST_ABSENT:-y}", "count": "${EXPLORA_TEST_ABSENT:-3}"}
    loaded = configs.load(Tree, raw)
    assert (loaded.title, loaded.count) == ("/data/x/y", 3)
    assert configs.load(Tree, {}, ["title=${EXPLORA_TEST_ABSENT:-}"]).title == ""
    with pytest.raises(ConfigError, match=r"\$\{EXPLORA_TEST_ABSENT\}: this environment variable is not set"):
        configs.read({"title": ["${EXPLORA_TEST_ABSENT}"]})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    with pytest.raises(ConfigError, match=r"x\.yaml: cannot read this config: no such file"):
        configs.load(Tree, path)
    with pytest.raises(ConfigError, match=r"cannot read this config: .*directory"):
        configs.load(Tree, tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read this config"):
        configs.load(Tree, path)
    path.write_text("optim: {lr: [")
    with pytest.raises(ConfigError, match=r"not valid YAML(.*\n)+.*line 1"):
        configs.load(Tree, path)
    path.write_text("- a\n- b")
    with pytest.raises(ConfigError, match="expected a mapping of keys, got list"):
        configs.load(Tree, path)
    path.write_text("# nothing but defaults\n")
    assert configs.load(Tree, path) == Tree()


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Tree().optim.lr = 2.0  # type: ignore[misc]


def test_dump_and_load_is_the_identity(tmp_path: Path) -> None:
    config = configs.load(
        Tree,
        {
            "title": "1e-4",
            "steps": "1281167 samples",
            "optim": {"lr": 1e-5},
            "fruit": {"name": "pear", "length": 2},
            "basket": [{"name": "apple", "rank": 3}],
        },
    )
    path = tmp_path / "config.yaml"
    path.write_text(configs.dump(config))
    assert configs.load(Tree, path) == config
    assert configs.parse(path) == config.model_dump(mode="json")
