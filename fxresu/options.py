"""Options as dataclass fields: one place for a name, its default, its help, its check, and its form on the command
line and in files."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import importlib
import json
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from fxresu.errors import ConfigError

__all__ = [
    "Named",
    "add_option_arguments",
    "callable_name",
    "from_mapping",
    "given_options",
    "import_callable",
    "near",
    "normalise",
    "option",
    "options_table",
    "read_options",
    "refuse",
]

T = TypeVar("T")
Named = str | Callable[..., Any]
"""A choice by name, by "module:function", or the callable itself."""
SUFFIXES = (".toml", ".yaml", ".yml", ".json")


def option(
    default: Any,
    help: str,
    *,
    group: str = "",
    choices: tuple[str | None, ...] = (),
    names: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
    remedy: str = "",
) -> Any:
    """A dataclass field that is an option. Its annotation says its type: bool, int, float, str, tuple[float, ...] of a
    fixed length, each also "| None"; "Named" is one of `names`, a "module:function", or a callable.

    Args:
        choices: the only values; names: those of a "Named" option that a callable may replace.
        low, high: bounds of a number, inclusive unless open. remedy: what to say when they are exceeded.
    """
    bounds = (low, high, open_low, open_high)
    metadata = {"help": help, "group": group, "choices": choices, "names": names, "bounds": bounds, "remedy": remedy}
    return dataclasses.field(default=default, metadata=metadata)


# --- checks ----------------------------------------------------------------------------------------------------------


def refuse(name: str, value: object, remedy: str) -> None:
    """ConfigError for one option."""
    raise ConfigError(f"{name}={value!r}; {remedy}")


def near(word: object, known: Iterable[str]) -> str:
    """ " (did you mean ...?)" or nothing."""
    found = difflib.get_close_matches(str(word), list(known), n=2)
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


def normalise(instance: Any) -> None:
    """Check every option of a (frozen) dataclass by its annotation and metadata; numbers become int and float.

    Raises:
        ConfigError: names the option, its value and what would be right.
    """
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        kind, optional = _kind(field)
        if optional and value is None:
            continue
        checked = _checked(field, kind, value)
        if checked is not value:
            object.__setattr__(instance, field.name, checked)
        _check_bounds(field, checked)


def _kind(field: dataclasses.Field) -> tuple[str, bool]:
    text = str(field.type)
    return text.removesuffix(" | None"), text.endswith("| None")


def _checked(field: dataclasses.Field, kind: str, value: Any) -> Any:
    name, choices = field.name, field.metadata.get("choices", ())
    if kind.startswith("tuple"):
        return _numbers(name, value, kind.count(",") + 1)
    if kind == "bool" and not isinstance(value, bool):
        refuse(name, value, "must be True or False")
    if kind == "int":
        if isinstance(value, bool) or not isinstance(value, Integral):
            refuse(name, value, "must be an integer")
        return int(value)
    if kind == "float":
        if not _is_number(value):
            refuse(name, value, "must be a finite number")
        return float(value)
    if kind == "Named":
        _check_named(name, value, field.metadata["names"])
    if choices and value not in choices:
        hint = near(value, [c for c in choices if c]) if isinstance(value, str) else ""
        refuse(name, value, f"must be one of {', '.join(map(repr, choices))}{hint}")
    return value


def _numbers(name: str, value: Any, length: int) -> tuple[float, ...]:
    if not isinstance(value, (tuple, list)) or len(value) != length or not all(map(_is_number, value)):
        refuse(name, value, f"must be {length} numbers")
    return tuple(map(float, value))


def _check_named(name: str, value: Any, names: tuple[str, ...]) -> None:
    if callable(value) or value in names:
        return
    if not isinstance(value, str) or ":" not in value:
        hint = near(value, names) if isinstance(value, str) else ""
        refuse(name, value, f"must be one of {', '.join(names)}, 'module:function', or a callable{hint}")
    import_callable(value, name)


def _check_bounds(field: dataclasses.Field, value: Any) -> None:
    low, high, open_low, open_high = field.metadata.get("bounds", (None, None, False, False))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    below = low is not None and (value < low or (open_low and value == low))
    above = high is not None and (value > high or (open_high and value == high))
    if below or above:
        refuse(field.name, value, field.metadata["remedy"] or f"must be {_interval(low, high, open_low, open_high)}")


def _interval(low: float | None, high: float | None, open_low: bool, open_high: bool) -> str:
    if high is None:
        return "positive" if low == 0 and open_low else "not negative" if low == 0 else f"at least {low:g}"
    return f"in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


# --- callables by name -----------------------------------------------------------------------------------------------


@functools.cache
def import_callable(text: str, name: str = "callable") -> Callable[..., Any]:
    """The function that "package.module:function" names.

    Raises:
        ConfigError: names the option, the text and what could not be found.
    """
    module, _, attribute = text.partition(":")
    here = os.getcwd()  # a console script does not have the working directory on its path
    sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{name}={text!r}; module {module!r} cannot be imported: {error}") from None
    finally:
        sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(found, part):
            hint = near(part, (n for n in dir(found) if not n.startswith("_")))
            raise ConfigError(f"{name}={text!r}; {module!r} has no {part!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{name}={text!r}; a {type(found).__name__} cannot be called")
    return found


def callable_name(value: Any) -> Any:
    """ "module:function" for a callable, which `import_callable` reads back if it is importable; others unchanged."""
    if not callable(value):
        return value
    owner = value if hasattr(value, "__qualname__") else type(value)
    return f"{owner.__module__}:{owner.__qualname__}"


# --- files and mappings ----------------------------------------------------------------------------------------------


def from_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
    """An instance of the dataclass `cls` with these options (lists stand for tuples); refuses unknown ones."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"configuration={values!r}; must be a mapping of options to values")
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown option {key!r}{near(key, known)}; the options are {', '.join(known)}")
    return cls(**values)


def read_options(path: str | Path) -> dict[str, Any]:
    """Options from a TOML, YAML or JSON file, told apart by its suffix.

    Raises:
        ConfigError: another suffix, or a file that is not what its suffix says.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"configuration file {str(path)!r}; its name must end in {', '.join(SUFFIXES)}")
    language = {".toml": "TOML", ".json": "JSON"}.get(path.suffix, "YAML")
    try:
        values = _parse(path.read_text(encoding="utf-8"), language)
    except ValueError as error:  # of which TOML's, JSON's and Unicode's errors are subclasses
        raise ConfigError(f"configuration file {str(path)!r} is not {language}: {error}") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"configuration file {str(path)!r} holds no options, but {type(values).__name__}")
    return dict(values)


def _parse(text: str, language: str) -> Any:
    if language == "TOML":
        return tomllib.loads(text)
    if language == "JSON":
        return json.loads(text)
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 1e-4 as a number, as YAML 1.2 does; PyYAML's own rule makes a text of it. Refuses a key given twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next((k for k in keys if keys.count(k) > 1), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


# --- command line ----------------------------------------------------------------------------------------------------


def add_option_arguments(parser: argparse.ArgumentParser, cls: type) -> None:
    """One argument for every option of `cls`, in the groups that its options name. Defaults are None: not given."""
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        title = field.metadata.get("group", "") or "options"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add(groups[title], field)


def _add(group: Any, field: dataclasses.Field) -> None:
    flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"].replace("%", "%%")
    kind, _ = _kind(field)
    options = [c for c in (field.metadata["choices"] or field.metadata["names"]) if c]
    text += f": {', '.join(options)}" if options else ""
    text += "" if field.default is None else f" (default: {_shown(field.default)})"
    if kind == "bool":
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif kind.startswith("tuple"):
        names = tuple(field.name.upper() for _ in range(kind.count(",") + 1))
        group.add_argument(flag, type=float, nargs=len(names), default=None, metavar=names, help=text)
    elif kind in ("int", "float"):
        group.add_argument(flag, type=int if kind == "int" else float, default=None, metavar="N", help=text)
    else:
        group.add_argument(flag, default=None, metavar="X", type=_list_or_text, help=text)


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _list_or_text(text: str) -> str | tuple[float, ...]:
    """ "0.5,0.7" is a list of numbers; anything else a name."""
    if "," not in text:
        return text
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return text


def given_options(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The options of `cls` that the command line named."""
    found = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(cls)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in found.items() if v is not None}


def options_table(cls: type) -> str:
    """All options of `cls` as Markdown tables, one for each group."""
    groups: dict[str, list[str]] = {}
    for field in dataclasses.fields(cls):
        choices = ", ".join(f"`{c}`" for c in (field.metadata["choices"] or field.metadata["names"]) if c)
        default = "" if field.default is None else f"`{_shown(field.default)}`"
        text = field.metadata["help"].replace("|", "\\|")
        row = f"| `{field.name}` | {default} | {text} | {choices} |"
        groups.setdefault(field.metadata["group"] or "options", []).append(row)
    head = "| option | default | what it is | choices |\n|---|---|---|---|\n"
    return "\n\n".join(f"## {title.capitalize()}\n\n{head}" + "\n".join(rows) for title, rows in groups.items()) + "\n"
