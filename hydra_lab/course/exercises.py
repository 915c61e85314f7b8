"""Checks of an exercise: each failure is one friendly message with a hint, not a traceback."""

from typing import Any

import torch

from hydra_lab.course.reading import show_text


class NotYet(AssertionError):
    """An exercise whose answer is not right yet. A notebook shows its message alone, without the traceback."""

    def _render_traceback_(self) -> list[str]:
        """What IPython prints instead of a traceback: the message, line by line."""
        return [f"\x1b[1mNot yet.\x1b[0m {self}"]


def check(condition: Any, hint: str) -> None:
    """Raise `NotYet(hint)` unless `condition` (a bool, or a tensor or array of one) is true."""
    if not bool(condition):
        raise NotYet(hint)


def check_close(actual: Any, expected: Any, hint: str, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Raise `NotYet` unless `actual` equals `expected` (tensors, arrays or numbers, of any one shape).

    Equal means |actual - expected| <= atol + rtol * |expected| for every element, as in `torch.isclose`. The message
    is the hint, and after it what differs: the kind of value, the shape, or the first element that is off.
    """
    wanted = _as_tensor(expected)
    try:
        given = _as_tensor(actual)
    except (TypeError, ValueError, RuntimeError):
        raise NotYet(f"{hint}\nThis should be a tensor or numbers, but it is {_describe(actual)}.") from None
    if given.shape != wanted.shape:
        raise NotYet(f"{hint}\nThe shape is {list(given.shape)}; it should be {list(wanted.shape)}.")
    different = ~torch.isclose(given, wanted, rtol=rtol, atol=atol, equal_nan=True)
    if not different.any():
        return
    where = tuple(different.nonzero()[0].tolist())
    place = f" at index {list(where)}" if where else ""
    count = f" {int(different.sum())} of {different.numel()} elements differ." if where else ""
    raise NotYet(
        f"{hint}\nThe first difference{place}: {given[where].item():.6g} instead of {wanted[where].item():.6g}.{count}"
    )


def _as_tensor(value: Any) -> torch.Tensor:
    tensor = torch.as_tensor(value).detach().cpu()
    return tensor if tensor.is_complex() else tensor.double()


def _describe(value: Any) -> str:
    if value is None:
        return "None (does the function return its result?)"
    return f"a {type(value).__name__}"


def passed(name: str) -> None:
    """Say that every check of the exercise `name` ("1.2") went through; the last line of its check cell."""
    show_text(f"✅ **Exercise {name}** is right.", f"Exercise {name} is right.")
