"""Settings from TOML: overrides of them, and dataclasses built from tables of any content."""

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints


def override_setting(table: dict, override: str):
    """Puts "table.key=value" into parsed TOML; stages count from 0.

    Raises:
        ValueError: It names no setting.
    """
    name, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"{override!r:.80}: write it as table.key=value.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    *parents, key = name.strip().split(".")
    for parent in parents:
        try:
            table = table[int(parent)] if isinstance(table, list) else table.setdefault(parent, {})
        except (IndexError, ValueError):
            raise ValueError(f"{override!r:.80}: there is no stage {parent}.") from None
        if not isinstance(table, dict | list):
            raise ValueError(f"{override!r:.80}: {parent} is not a table.")
    if isinstance(table, list):
        raise ValueError(f"{override!r:.80}: name a setting of the stage, as stage.0.steps=100.")
    table[key] = value


def build_table(kind: Any, value: Any, where: str) -> Any:
    """Builds `kind` from parsed TOML, refusing unknown keys and wrong types."""
    if get_origin(kind) is UnionType:
        kind = next(option for option in get_args(kind) if option is not type(None))
        return None if value is None else build_table(kind, value, where)
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a table, got {value!r:.80}.")
        hints = get_type_hints(kind)
        _refuse_unknown(value, set(hints), where)
        built = {
            key: build_table(hints[key], item, f"{where}: {key}") for key, item in value.items()
        }
        optional = {f.name for f in fields(kind) if {f.default, f.default_factory} != {MISSING}}
        if missing := [f.name for f in fields(kind) if f.name not in optional | set(built)]:
            raise ValueError(f"{where}: missing {', '.join(missing)}.")
        try:
            return cast(Callable[..., Any], kind)(**built)
        except (ValueError, TypeError) as error:  # types inside tables of any content
            raise ValueError(f"{where}: {error}") from None
    if get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        return [build_table(get_args(kind)[0], item, where) for item in items]
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a table, got {value!r:.80}.")
        inner = get_args(kind)[1]
        return {key: build_table(inner, item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # TOML's true is a Python int as well.
    fits = kind is Any or (isinstance(value, kind) and isinstance(value, bool) == (kind is bool))
    if not fits:
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r:.80}.")
    return value


def check_ranges(settings: Any, at_least: Mapping[str, float]):
    """Refuses numbers below their least value, and those that are not finite."""
    for name in (f.name for f in fields(settings)):
        value = getattr(settings, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}, but must be a finite number.")
        if isinstance(value, int) and abs(value) >= 2**53:
            raise ValueError(f"{name} is larger than any count can be.")
        if value is not None and name in at_least and value < at_least[name]:
            raise ValueError(f"{name} is {value}, but must be at least {at_least[name]}.")


def _refuse_unknown(table: dict, known: set[str], where: str):
    if unknown := sorted(set(table) - known):
        raise ValueError(
            f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}."
        )
