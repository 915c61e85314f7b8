"""A study's settings: plain values of a config.toml and of the command line, checked."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

S = TypeVar("S")


def settings_from(kind: type[S], values: Mapping[str, Any]) -> S:
    """The dataclass `kind` made from plain values.

    Raises:
        ValueError: a name is unknown or missing, or the dataclass refuses a value.
    """
    known = {field.name for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    unknown, missing = set(values) - known, known - set(values)
    if unknown:
        raise ValueError(f"unknown settings {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    if missing:
        raise ValueError(f"missing settings {', '.join(sorted(missing))}")
    return kind(**values)


def check_at_least(settings: object, least: int, *names: str) -> None:
    """Raises ValueError unless each of the named fields is a whole number of at least `least`."""
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
