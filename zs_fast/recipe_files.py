"""Recipes: TOML files and command-line overrides in, one validated RunConfig out.

Whatever is wrong is one ConfigError with one line per problem: the key, the value, where it came from, what is allowed
and the nearest valid name. A recipe and a flag go through the same check, so both read the same.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pydantic
from pydantic.fields import FieldInfo

from zs_fast.config import RunConfig, Section
from zs_fast.errors import ConfigError

RECIPES = Path(__file__).with_name("recipes")

Overrides = Mapping[str, Sequence[str]]
"""Dotted field name -> the words given for it on the command line."""


def load_recipe(recipes: Sequence[str | Path], overrides: Overrides | None = None) -> RunConfig:
    """The configuration of `recipes` (names or paths, merged left to right) with `overrides` on top.

    Raises ConfigError for an unknown recipe, unreadable TOML, an unknown key, or a value of the wrong type or range.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for recipe in recipes:
        path = find_recipe(recipe)
        _merge(values, _read_toml(path), origins, f"in {path.name}")
    problems = []
    for name, words in (overrides or {}).items():
        if name in fields():
            _place(values, name, _from_words(name, words))
            origins[name] = "on the command line"
        else:
            problems.append(_unknown_key(name, " ".join(words), "on the command line"))
    if problems:
        raise ConfigError("\n".join(problems))
    return _validate(values, origins)


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe given by path (it ends in .toml or holds a slash) or by name."""
    text = str(recipe)
    if is_path(text):
        return Path(text)
    if text in recipe_names():
        return RECIPES / f"{text}.toml"
    raise ConfigError(
        f"recipe {text!r} is not one of {', '.join(recipe_names()) or '(none installed)'}"
        f"{_nearest(text, recipe_names())}; a file of your own is given by its path, ending in .toml"
    )


def is_path(text: str) -> bool:
    return text.endswith(".toml") or "/" in text


def looks_like_recipe(word: str) -> bool:
    """Is this word of a command line a recipe, rather than the value of a flag before it?"""
    return word.startswith("--") or is_path(word) or word in recipe_names()


def recipe_names() -> list[str]:
    """The recipes that come with zs_fast, by name."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


@cache
def fields() -> dict[str, FieldInfo]:
    """Every field of RunConfig by its dotted name, in order: `train.steps`, ..."""

    def walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from walk(field.annotation, f"{prefix}{name}.")
            else:
                yield prefix + name, field

    return dict(walk(RunConfig, ""))


def is_list(name: str) -> bool:
    """Does the field of this dotted name take several values?"""
    return name in fields() and get_origin(fields()[name].annotation) is tuple


@cache
def sections() -> list[str]:
    return sorted({name.partition(".")[0] for name in fields() if "." in name})


def allowed(field: FieldInfo) -> str:
    """What a field takes, in words: `a whole number >= 1`, `'grpo' or 'reinforce'`, ..."""
    return _type_in_words(field.annotation, field.metadata)


def _type_in_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        inner = [m for item in annotation.__metadata__ for m in getattr(item, "metadata", [item])]
        return _type_in_words(annotation.__origin__, [*inner, *metadata])
    if origin is Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"a list of {_type_in_words(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: " + ", ".join(_type_in_words(argument) for argument in arguments)
    if NoneType in arguments:
        options = [_type_in_words(argument) for argument in arguments if argument is not NoneType]
        return " or ".join(options) + ", or left out"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return words[annotation] + _limits_in_words(metadata)


def _limits_in_words(metadata: Sequence[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{sign} {getattr(m, name):g}" for m in metadata for name, sign in signs.items() if hasattr(m, name)]
    return " " + " and ".join(limits) if limits else ""


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(recipe_names())
        raise ConfigError(f"recipe file {path} does not exist; recipes given by name: {known}") from None
    except OSError as error:
        raise ConfigError(f"recipe file {path} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe file {path} is not UTF-8 text: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe file {path} is not valid TOML: {error}") from None


def _merge(into: dict[str, Any], values: Mapping[str, Any], origins: dict[str, str], origin: str, at: str = "") -> None:
    for key, value in values.items():
        name = f"{at}{key}"
        if isinstance(value, dict) and isinstance(into.get(key, {}), dict):
            _merge(into.setdefault(key, {}), value, origins, origin, f"{name}.")
        else:
            into[key] = value
        origins[name] = origin


def _place(values: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for key in path:
        inner = values.get(key)
        values = values.setdefault(key, {}) if isinstance(inner, dict) or inner is None else {}
    values[last] = value


def _from_words(name: str, words: Sequence[str]) -> Any:
    """The words of a flag as the field's type; words that don't fit stay text, and the check then names them."""
    field = fields()[name]
    if not is_list(name) and len(words) != 1:
        return list(words)
    given: Any = list(words) if is_list(name) else words[0]
    if given == "none" and NoneType in get_args(field.annotation):
        return None
    try:
        value = pydantic.TypeAdapter(field.annotation).validate_python(given)
    except pydantic.ValidationError:
        return given
    return str(value) if isinstance(value, Path) else value


def _validate(values: dict[str, Any], origins: Mapping[str, str]) -> RunConfig:
    def not_json(value: object) -> Any:
        raise ConfigError(f"a recipe holds {value}, a {type(value).__name__}; no field takes that type")

    try:
        # As JSON, because its strict mode takes what TOML can say (lists, text for paths) and converts nothing else.
        return RunConfig.model_validate_json(json.dumps(values, default=not_json), strict=True)
    except pydantic.ValidationError as error:
        problems = [_problem(details, values, origins) for details in error.errors(include_url=False)]
    raise ConfigError("\n".join(dict.fromkeys(problems)))


def _problem(details: Any, values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    location = [str(part) for part in details["loc"]]
    if details["type"] == "extra_forbidden":
        name = ".".join(location)
        return _unknown_key(name, details["input"], origins.get(name, ""))
    # The location may end in a list index or a union's branch; the field is its longest known beginning.
    name = next((n for k in range(len(location), 0, -1) if (n := ".".join(location[:k])) in fields()), "")
    if name:
        value: Any = values
        for key in name.split("."):
            value = value[key]
        options = [o for o in _literals(fields()[name].annotation) if isinstance(o, str)]
        wrong = details["input"]
        hint = _nearest(wrong, options) if isinstance(wrong, str) else ""
        where = origins.get(name, "")
        return f"{name} = {_shown(value)}{where and f' ({where})'}: takes {allowed(fields()[name])}{hint}"
    if details["type"] == "value_error":  # a rule over several fields, which says everything itself
        return str(details["ctx"]["error"])
    name = ".".join(location)
    return f"{name} = {_shown(details['input'])}: takes a section, [{name}] with keys {_keys(name)}"


def _unknown_key(name: str, value: Any, origin: str) -> str:
    section, _, _ = name.rpartition(".")
    if isinstance(value, dict) and not section:
        known = f"the sections are {', '.join(sections())}"
    elif section in sections():
        known = f"[{section}] has {_keys(section)}"
    else:
        known = f"top level has {_keys('')}, and the sections {', '.join(sections())}"
    hint = _nearest(name, [*fields(), *sections()])
    return f"unknown key {name} = {_shown(value)}{origin and f' ({origin})'}: {known}{hint}"


def _keys(section: str) -> str:
    return ", ".join(n.rpartition(".")[2] for n in fields() if n.rpartition(".")[0] == section)


def _literals(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(option for argument in get_args(annotation) for option in _literals(argument))


def _nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, by the whole dotted name or, for `--steps`, by its last part; empty if nothing is near."""
    last = name.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == last] or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    near = near or [k for k in known if difflib.get_close_matches(last, [k.rpartition(".")[2]], cutoff=0.75)]
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def _shown(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
