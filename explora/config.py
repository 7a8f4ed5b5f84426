"""Strict YAML plus `a.b=c` overrides to frozen pydantic models; all mistakes reported at once.

A config class stands beside the code that reads it and derives from `Config`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeAlias, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from explora.errors import ConfigError

Overrides: TypeAlias = Mapping[str, Any] | Sequence[str] | None


class Config(BaseModel):
    """Base of all configs: frozen, keyword-only, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


C = TypeVar("C", bound=Config)
free: dict[str, Any] = {"free": True}
"""`Field(json_schema_extra=free)`: a key that changes no number, so a run may go on with another value of it."""


def read(source: str | Path | Mapping[str, Any], overrides: Overrides = None) -> dict[str, Any]:
    """Read a YAML file or a mapping, expand `${VAR}` / `${VAR:-default}`, apply dotted overrides.

    Overrides are `{"optim.lr": 1e-4}` or `["optim.lr=1e-4"]`; their values are read as YAML.

    Raises:
        ConfigError: the file is missing, is not YAML, or an override has no `=`.
    """
    raw: Any = parse(Path(source)) if isinstance(source, str | Path) else _copy(source)
    if not isinstance(raw, dict):
        raise ConfigError(f"{name_of(source)}: expected a mapping of keys, got {type(raw).__name__}")
    for path, value in _pairs(overrides):
        _set(raw, path, value)
    return _expand(raw)


def validate(kind: type[C], raw: Mapping[str, Any], source: object = "config") -> C:
    """Turn a mapping into a config.

    Raises:
        ConfigError: lists every problem with its path and, for an unknown key, the nearest known one.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = list(_problems(kind, raw, error))
        head = f"{name_of(source)}: {len(lines)} problem{'s' if len(lines) != 1 else ''}"
        raise ConfigError("\n  ".join([head, *lines])) from None


def load(kind: type[C], source: str | Path | Mapping[str, Any], overrides: Overrides = None) -> C:
    """`read` then `validate`."""
    return validate(kind, read(source, overrides), source)


def dump(config: Config) -> str:
    """The resolved config as YAML, every default written out."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def free_keys(config: Config, path: str = "") -> Iterator[str]:
    """Dotted paths of the keys that are marked `free`."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if field.json_schema_extra == free:
            yield f"{path}{name}"
        elif isinstance(value, Config):
            yield from free_keys(value, f"{path}{name}.")


def name_of(source: object) -> str:
    """How messages call a config source: its path, or `config` for a mapping."""
    return str(source) if isinstance(source, str | Path) else "config"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as a string; this loader reads it as the number everyone means."""


class _Dumper(yaml.SafeDumper):
    """Its counterpart: quotes a string that the loader would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def parse(path: Path) -> Any:
    """The content of a YAML file as it stands, variables not expanded.

    Raises:
        ConfigError: the file is missing or not valid YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ConfigError(f"{path}: cannot read this config: {reason}") from None
    try:
        return yaml.load(text, _Loader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None


def _copy(value: Any) -> Any:
    """A deep copy in plain containers, so that overrides never reach the caller's mapping."""
    if isinstance(value, Mapping):
        return {str(key): _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _pairs(overrides: Overrides) -> Iterator[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        yield from ((str(path), _copy(value)) for path, value in overrides.items())
        return
    for item in overrides or ():
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise ConfigError(f"override '{item}': expected key=value, for example optim.lr=1e-4")
        try:
            yield path, yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override '{item}': the value is not valid YAML: {error}") from None


def _set(raw: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node = raw
    for key in parents:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override '{path}': '{key}' holds {child!r}, which has no keys")
        node = child
    node[last] = value


_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _expand(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item) for item in value]
    return _VARIABLE.sub(_variable, value) if isinstance(value, str) else value


def _variable(match: re.Match[str]) -> str:
    name, default = match.groups()
    value = os.environ.get(name, default)
    if value is None:
        raise ConfigError(f"${{{name}}}: this environment variable is not set; set it or write ${{{name}:-default}}")
    return value


_EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping of keys"),
    "string_type": "a string",
}


def _problems(kind: type[Config], raw: Any, error: ValidationError) -> Iterator[str]:
    """One line a problem; what the branches of a union expect at the same key is joined by `or`."""
    found: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        path, problem = _problem(kind, raw, item)
        if item["type"] == "too_short" and any(other.startswith(f"{path}.") for other in found):
            continue  # what is wrong with its items has left it without them
        if problem not in found.setdefault(path, []):
            found[path].append(problem)
    for path, problems in found.items():
        parts = [re.fullmatch("expected (.*?)(, got .*)?", problem, re.DOTALL) for problem in problems]
        if all(parts) and len(parts) > 1:
            branches = [part for part in parts if part]
            problems = [f"expected {' or '.join(part[1] for part in branches)}{branches[0][2] or ''}"]
        yield from (f"{path}: {problem}" for problem in problems)


def _problem(kind: type[Config], raw: Any, item: Any) -> tuple[str, str]:
    """The path of a pydantic error, in keys that the user wrote, and what is wrong there."""
    location, shown = _written(raw, item["loc"], item["type"]), item.get("input")
    if item["type"].startswith("union_tag"):
        location.append(item["ctx"]["discriminator"].strip("'"))
    path = ".".join(str(part) for part in location) or "(top level)"
    if item["type"] == "extra_forbidden":
        tag = item["loc"][-2] if len(item["loc"]) > 1 and item["loc"][-2] not in location else None
        of = f" of '{tag}'" if tag else ""
        return path, f"no such key{of}" + _nearest(str(location[-1]), _known_keys(kind, raw, item["loc"]))
    if item["type"] in ("missing", "union_tag_not_found"):
        return path, "required, but not given"
    if item["type"] == "union_tag_invalid":
        tag, tags = item["ctx"]["tag"], item["ctx"]["expected_tags"]
        return path, f"expected one of {tags}, got {tag!r}" + _nearest(tag, re.findall("'([^']*)'", tags))
    if item["type"] == "too_short":
        message = f"expected at least {item['ctx']['min_length']} of them"
    elif item["type"] in _EXPECTED:
        message = f"expected {_EXPECTED[item['type']]}"
        if isinstance(shown, str) and "mapping" in message and "name" in _known_keys(kind, raw, (*item["loc"], "")):
            return path, f"{message}, got {shown!r}; write {{name: {shown}}}"
    else:
        message = re.sub("^Input should be (?=greater|less|a multiple)", "expected a value ", item["msg"])
        message = message.removeprefix("Value error, ").replace("Input should be", "expected", 1)
        message = message[0].lower() + message[1:]
    return path, message + (f", got {shown!r}" if isinstance(shown, str | int | float | None) else "")


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _written(raw: Any, location: Sequence[str | int], kind: str) -> list[str | int]:
    """The parts of a pydantic location that are keys of the input; the others are tags of unions."""
    node, written = raw, []
    for number, part in enumerate(location):
        absent = kind == "missing" and number == len(location) - 1
        inside = part in node if isinstance(node, Mapping) else isinstance(node, list | tuple) and part != str(part)
        if not inside and not absent:
            continue
        written.append(part)
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            node = None
    return written


def _known_keys(kind: type[Config], raw: Any, location: Sequence[str | int]) -> list[str]:
    """Field names of the config that holds the last key of `location`."""
    kinds: list[type[Config]] = [kind]
    node: Any = raw
    for part in location[:-1]:
        tagged = [k for k in kinds if (f := k.model_fields.get("name")) is not None and f.default == part]
        if isinstance(node, Mapping) and part not in node and tagged:
            kinds = tagged
            continue
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            node = None
        if isinstance(part, str):
            kinds = [c for k in kinds if part in k.model_fields for c in _configs_in(k.model_fields[part].annotation)]
    return sorted({name for k in kinds for name in k.model_fields})


def _configs_in(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated, list, dict, tuple):
        return [found for argument in get_args(annotation) for found in _configs_in(argument)]
    return []
