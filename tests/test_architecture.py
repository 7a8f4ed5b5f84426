"""The walls of docs/architecture.md: floors, doors, sizes, names, and that nothing is left out of its union."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from explora.adapt import AnyMethod, Method
from explora.config import Config
from explora.data import AnyViews, Views
from explora.evaluation import AnyEvaluator, Evaluator
from explora.incremental import AnyHead, AnyRouter, Head, Router
from explora.models import exports, formats
from explora.models.extensions import EXTENSIONS

ROOT = Path(__file__).parents[1]
PACKAGES = [name for name in ("explora", "launch", "data_shards") if (ROOT / name).is_dir()]
FILES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))

FLOORS = {
    **dict.fromkeys(["launch", "data_shards"], 9),
    "explora.cli": 8,
    "explora.stages": 7,
    "explora.engine": 6,
    **dict.fromkeys(["explora.objectives", "explora.evaluation", "explora.incremental"], 5),
    **dict.fromkeys(["explora.adapt", "explora.data", "explora.distributed", "explora.reporting"], 4),
    "explora.models": 3,
    **dict.fromkeys(["explora.runs", "explora.config", "explora.schedules", "explora.bands"], 2),
    "explora.errors": 1,
}
NEIGHBOURS = {("explora.runs", "explora.config"), ("explora.bands", "explora.config")}
"""The exceptions: a run records its config, and what bands are is part of one."""
DOORS = {
    "timm": "explora.models",
    "torchvision": "explora.models",
    "xformers": "explora.models",
    "webdataset": "explora.data",
    "braceexpand": "explora.data",
    "simplejpeg": "explora.data",
    "PIL": "explora.data",
    "tifffile": "explora.data",
    "imagecodecs": "explora.data",
    "pyarrow": "data_shards",
    "jinja2": "explora.reporting",
    "matplotlib": "explora.reporting",
    "sklearn": "explora.evaluation",
    "tensorboard": "explora.runs",
    "yaml": "explora.config",
    "fvcore": "explora.schedules",
    "typer": "explora.cli",
    "submitit": "launch",
    "rich": "launch",
}
VERBS = {"launch.verbs": "typer"}
"""Modules that bring further verbs to the command line."""
BESIDE_A_CONFIG = {"Field", "PositiveFloat", "PositiveInt", "field_validator", "model_validator"}
"""What configs may take from pydantic; the rest is behind `explora.config`."""
PYDANTIC = {"explora.config", "explora.schedules"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """`explora.data.views` is in `explora.data`; the top package itself is the surface."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "explora" else parts[0]


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Every (module, name) that a file imports anywhere, the name empty for `import module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            yield from ((node.module or "", alias.name) for alias in node.names)


def targets(path: Path) -> Iterator[str]:
    """The rooms of this project that a file imports: `from explora import config` names one too."""
    for module, name in imports(path):
        if module == "explora" and f"explora.{name}" in FLOORS:
            yield f"explora.{name}"
        elif module.partition(".")[0] in PACKAGES:
            yield room_of(module)


def test_imports_go_down() -> None:
    upward = []
    for path in FILES:
        room = room_of(module_of(path))
        if room == "explora":
            continue  # the surface names everything, on first use
        assert room in FLOORS, f"{room} has no floor; add it to docs/architecture.md and here"
        for target in targets(path):
            surface = room in ("explora.cli", "launch") and target == "explora"  # each verb is such a function
            lower = FLOORS.get(target, 99) < FLOORS[room]
            if not (lower or surface or target == room or (room, target) in NEIGHBOURS):
                upward.append(f"{path}: {room} imports {target}")
    assert upward == []


def test_doors() -> None:
    strangers = []
    for path in FILES:
        module = module_of(path)
        for imported, name in imports(path):
            package = imported.partition(".")[0]
            if room_of(module) != DOORS.get(package, room_of(module)) and VERBS.get(module) != package:
                strangers.append(f"{path} imports {imported}")
            if package == "pydantic" and module not in PYDANTIC and name not in BESIDE_A_CONFIG:
                strangers.append(f"{path} imports {name or 'all of'} pydantic")
    assert strangers == []


def test_sizes() -> None:
    large = [f"{path}: {n} lines" for path in FILES if (n := len(path.read_text().splitlines())) > 350]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                large += [f"{path}: {node.name} has {length} lines"] if length > 50 else []
    assert large == []


def test_names_and_first_lines() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert [path for path in FILES if vague & set(path.relative_to(ROOT).with_suffix("").parts)] == []
    assert [path for path in FILES if not ast.get_docstring(ast.parse(path.read_text()))] == []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ClassDef) and node.name.endswith("Manager")), path
            assert not (isinstance(node, ast.Name) and node.id == "hasattr"), path


def subclasses(kind: type, room: str) -> set[type]:
    """All concrete subclasses that any file of a room defines."""
    package = importlib.import_module(room)
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{room}.{found.name}")
    known: set[type] = set()
    left: list[Any] = [kind]
    while left:
        children = [child for child in left.pop().__subclasses__() if child.__module__.startswith(room)]
        known |= {child for child in children if "name" in child.model_fields}
        left += children
    return known


@pytest.mark.parametrize(
    ("kind", "union", "room"),
    [
        (Method, AnyMethod, "explora.adapt"),
        (Views, AnyViews, "explora.data"),
        (Evaluator, AnyEvaluator, "explora.evaluation"),
        (Router, AnyRouter, "explora.incremental"),
        (Head, AnyHead, "explora.incremental"),
    ],
)
def test_whatever_a_room_defines_can_be_named_in_a_config(kind: type[Config], union: Any, room: str) -> None:
    members = set(get_args(get_args(union)[0]))
    assert subclasses(kind, room) == members
    for member in members:
        (tag,) = get_args(member.model_fields["name"].annotation)
        assert member.model_fields["name"].default == tag


def modules_with(room: str, function: str) -> set[str]:
    """Modules of a room that define a function of this name at their top."""
    found = set()
    for path in (ROOT / room).glob("*.py"):
        body = ast.parse(path.read_text()).body
        if any(isinstance(node, ast.FunctionDef) and node.name == function for node in body):
            found.add(path.stem)
    return found - {"__init__"}


def test_whatever_reads_or_writes_weights_is_named() -> None:
    assert modules_with("explora/models/formats", "read") <= set(formats.__all__)
    written = {type(writer) for writer in exports.FORMATS.values()}
    importable = {path.stem for path in (ROOT / "explora/models/exports").glob("*.py")} - {"__init__", "base", "card"}
    assert importable == {kind.__module__.rpartition(".")[2] for kind in written} == set(exports.FORMATS)


def test_extensions_are_named() -> None:
    room = ROOT / "explora/models/extensions"
    assert {path.stem for path in room.glob("*.py")} - {"__init__"} == set(EXTENSIONS)


def config_classes() -> set[type[Config]]:
    """Every config that the project defines anywhere."""
    for path in FILES:
        importlib.import_module(module_of(path))
    known: set[type[Config]] = set()
    left: list[type[Config]] = [Config]
    while left:
        children = [child for child in left.pop().__subclasses__() if child.__module__.partition(".")[0] in PACKAGES]
        known |= set(children)
        left += children
    return known


def test_configs_say_what_they_are() -> None:
    assert [kind for kind in config_classes() if not kind.__doc__] == []


def bare_fields(body: list[ast.stmt]) -> Iterator[str]:
    """Annotated names of a class without a sentence below them."""
    for statement, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            said = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and below.value.value
            if not (isinstance(said, str) and said.endswith(".")):
                yield statement.target.id


def test_config_fields_say_what_they_are() -> None:
    known = {(kind.__module__, kind.__qualname__) for kind in config_classes()}
    bare = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and (module_of(path), node.name) in known:
                bare += [f"{path.relative_to(ROOT)}: {node.name}.{field}" for field in bare_fields(node.body)]
    assert bare == []
