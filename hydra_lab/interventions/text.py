"""Interventions as text and as JSON: the vocabulary by name, and both directions of both forms."""

import ast
import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from hydra_lab.interventions.attention import ForbidBlocks, SelectBlocks
from hydra_lab.interventions.base import Intervention
from hydra_lab.interventions.memory import ClampBeta, EditValue, MaskAddresses, ReplaceAddress, SwapAddresses
from hydra_lab.interventions.paths import CutPath, ScalePath
from hydra_lab.interventions.routing import AblateExpert, ForceExperts, RouteChunks, TemperRouting
from hydra_lab.interventions.ssm import PatchState, ScaleDecay
from hydra_lab.interventions.workspace import FreezeSlot, SwapSlots, ZeroSlot
from hydra_lab.taps import PATHS

ACTIONS: dict[str, tuple[type[Intervention], ...]] = {
    "moe": (AblateExpert, ForceExperts, RouteChunks, TemperRouting),
    "memory": (MaskAddresses, ReplaceAddress, SwapAddresses, ClampBeta, EditValue),
    "workspace": (ZeroSlot, FreezeSlot, SwapSlots),
    "ssm": (PatchState, ScaleDecay),
    "attention": (ForbidBlocks, SelectBlocks),
}
"""What can be done to each path, besides what can be done to any."""

ACTIONS_OF_ANY_PATH: tuple[type[Intervention], ...] = (CutPath, ScalePath)

FORM = "path[block].action(argument=value, ...) with a number or * for the block"

_TEXT = re.compile(r"\s*(\w+)\s*\[\s*(\*|[0-9]{1,9})\s*\]\s*\.\s*(\w+)\s*\((.*)\)\s*", re.DOTALL)
_JSON_NAMES = {"true": True, "false": False, "null": None}


def parse(text: str) -> tuple[Intervention, ...]:
    """The changes that a text asks for, in order: `moe[3].ablate(expert=2); memory[*].cut()`.

    Values are written as in JSON or as in Python.

    Raises:
        ValueError: the text is not of this form, or asks for what is not in the vocabulary.
    """
    if not isinstance(text, str):
        raise TypeError(f"a change is an Intervention or a text, got {type(text).__name__}")
    parts = [part for part in text.split(";") if part.strip()]
    if not parts:
        raise ValueError(f"{text!r} holds no intervention: write {FORM}")
    return tuple(_parse_one(part) for part in parts)


def _parse_one(text: str) -> Intervention:
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError(f"{reprlib.repr(text.strip())} is not of the form {FORM}")
    path, block, action, arguments = found.groups()
    given = _literals(arguments)
    return _make(path, "*" if block == "*" else int(block), action, given)


def _literals(text: str) -> dict[str, Any]:
    """The values of `name=value, ...`; nothing but literals is read, and nothing is executed."""
    wrong = ValueError(
        f"({reprlib.repr(text)[1:-1]}) are not arguments: write name=value, ... with plain values"
    )
    try:
        call = ast.parse(f"_({text})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise wrong
        given = {each.arg: ast.literal_eval(_WithJsonNames().visit(each.value)) for each in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise wrong from None
    if len(given) != len(call.keywords) or None in given:
        raise wrong
    return {str(name): value for name, value in given.items()}


class _WithJsonNames(ast.NodeTransformer):
    """true, false and null mean what they mean in JSON."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node


def from_dict(values: Mapping[str, Any]) -> Intervention:
    """The inverse of `Intervention.to_dict`.

    Raises:
        ValueError: a key is missing or unknown, or asks for what is not in the vocabulary.
    """
    required, known = {"path", "block", "action"}, {"path", "block", "action", "arguments"}
    if not isinstance(values, Mapping) or not required <= set(values) <= known:
        raise ValueError(
            f"an intervention is an object with path, block, action and arguments, got {reprlib.repr(values)}"
        )
    arguments = values.get("arguments", {})
    if not isinstance(arguments, Mapping):
        raise ValueError(f"arguments must be an object, got {reprlib.repr(arguments)}")
    return _make(values["path"], values["block"], values["action"], dict(arguments))


def load_interventions(file: str | Path) -> tuple[Intervention, ...]:
    """The changes that a JSON file lists: objects as `Intervention.to_dict` makes them, or texts.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a list.
    """
    try:
        listed = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(listed, list):
            raise ValueError("it holds no list")
        read = [parse(each) if isinstance(each, str) else (from_dict(each),) for each in listed]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a JSON list of interventions: {error}") from None
    return tuple(change for changes in read for change in changes)


def dump_interventions(changes: Iterable[Intervention], file: str | Path) -> None:
    """Write changes where `load_interventions` finds them, equal to the bit."""
    Path(file).write_text(json.dumps([each.to_dict() for each in changes], indent=1) + "\n", encoding="utf-8")


def _make(path: Any, block: Any, action: Any, arguments: dict[str, Any]) -> Intervention:
    if path not in PATHS:
        raise ValueError(f"path {path!r} is not one of {', '.join(PATHS)}")
    offered = {each.action: each for each in (*ACTIONS[path], *ACTIONS_OF_ANY_PATH)}
    if not isinstance(action, str) or action not in offered:
        raise ValueError(f"{path} has no action {action!r}; it has {', '.join(offered)}")
    change = offered[action]
    defaults = change.argument_defaults()
    unknown = [name for name in arguments if name not in defaults]
    if unknown:
        takes = f"it takes {', '.join(defaults)}" if defaults else "it takes none"
        raise ValueError(f"{path}.{action} has no argument {unknown[0]!r}; {takes}")
    missing = [name for name, default in defaults.items() if default is MISSING and name not in arguments]
    if missing:
        raise ValueError(f"{path}.{action} needs {' and '.join(missing)}")
    of_path = {"path": path} if change in ACTIONS_OF_ANY_PATH else {}
    return change(block=block, **of_path, **arguments)
