"""Settings of a study: its config.toml, and what the command line says instead."""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read_settings(config: Path, overrides: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The settings of a study.

    Args:
        config: its config.toml.
        overrides: setting -> value as a person writes it; it must have the default's type.

    Raises:
        ValueError: there is no such setting, or a value has another type than its default.
    """
    with config.open("rb") as file:
        settings = tomllib.load(file)
    for name, text in (overrides or {}).items():
        if name not in settings:
            raise ValueError(
                f"the study {config.parent.name} has no setting {name!r}; it has {', '.join(settings)}"
            )
        settings[name] = _parse(name, text, settings[name])
    return settings


def parse_overrides(words: Iterable[str]) -> dict[str, str]:
    """`name=value` words as a mapping.

    Raises:
        ValueError: a word has no "=".
    """
    overrides: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"a setting is written name=value, got {word!r}")
        overrides[name.strip()] = value.strip()
    return overrides


def _parse(name: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = None
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(f"{name}={text} must be of the type of its default, {default!r}")
    return value
