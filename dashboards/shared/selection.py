"""What is picked: a token, block, expert, slot or row is the same on every page, and part of the address.

A page names what it picks by a key: `st.selectbox("Expert", experts, key=linked("expert", experts))`. The key's value
comes from the address (on a visitor's first page), from the page before, or is the default; whatever is not among the
options gives way to the default, numbers to the nearest option.
"""

from collections.abc import Sequence
from typing import Any

import streamlit as st

LONGEST_IN_ADDRESS = 1500
"""Characters of a text that is still part of the address; browsers and proxies cut much longer ones."""

_PICKED, _DEFAULTS, _PAGE, _SEEDED, _STALE = "picked", "defaults", "page on show", "seeded", "page is stale"
_PAGE_WIDE = {"prompt", "intervene", "open"}
"""What is picked for the whole page, beyond the fragment that picks it."""


def read_address(page: str) -> None:
    """Take over what the address says when a visitor comes, or follows a link to another page.

    Args:
        page: the page that is about to run. On the page that the visitor is on already the address is only ever what
            `write_address` made it, perhaps late, and is not read.
    """
    st.session_state[_STALE] = False
    if st.session_state.get(_PAGE) == page:
        return
    st.session_state[_PAGE] = page
    st.session_state[_SEEDED] = set()
    for key in st.query_params:
        values = st.query_params.get_all(key)
        _picked()[key] = values if len(values) > 1 else values[0]
        st.session_state.pop(key, None)


def write_address() -> None:
    """Put everything that is picked, other than defaults, into the address."""
    defaults = st.session_state.setdefault(_DEFAULTS, {})
    picked = {key: st.session_state.get(key, value) for key, value in _picked().items()}
    _picked().update(picked)
    address = {
        key: [str(each) for each in value] if isinstance(value, list) else str(value)
        for key, value in picked.items()
        if value != defaults.get(key, "") and value is not None and (value != [] or key in defaults)
    }
    address = {key: value for key, value in address.items() if len(str(value)) <= LONGEST_IN_ADDRESS}
    if address != _current_address():
        st.query_params.from_dict(address)


def linked(key: str, options: Sequence[Any] | None, default: Any = None) -> str:
    """The key of a widget with one value that pages share; call it just before the widget, and give that no default.

    Args:
        options: values that the widget takes; None where it takes any text.
        default: where nothing was picked yet; the first option unless given.
    """
    if default is None:
        default = "" if options is None else next(iter(options), None)
    value = _wanted(key, default)
    if options is None:
        value = str(value)
    elif value not in options:
        value = _nearest(value, options, default)
    _keep(key, value, default)
    return key


def linked_several(key: str, options: Sequence[Any]) -> str:
    """As `linked`, of a widget that takes any number of the options; none is picked at first."""
    wanted = _wanted(key, [])
    names = {str(each) for each in (wanted if isinstance(wanted, list) else [wanted])}
    _keep(key, [option for option in options if str(option) in names], [])
    return key


def linked_flag(key: str) -> str:
    """As `linked`, of a toggle, which is off at first."""
    _keep(key, str(_wanted(key, False)) == "True", False)
    return key


def picked(key: str, default: Any = None) -> Any:
    """What is picked under `key`, on whatever page; text where it comes from the address and no page has read it."""
    return _wanted(key, default)


def pick(**values: Any) -> None:
    """Pick values from a callback, or on a page that does not show their widgets."""
    _picked().update(values)
    st.session_state.update(values)
    if not _PAGE_WIDE.isdisjoint(values):
        st.session_state[_STALE] = True


def page_is_stale() -> bool:
    """Whether something was picked that a fragment alone does not show; a new run of the page ends that."""
    return st.session_state.get(_STALE, False)


def _picked() -> dict[str, Any]:
    return st.session_state.setdefault(_PICKED, {})


def _wanted(key: str, default: Any) -> Any:
    value = st.session_state.get(key)
    return _picked().get(key, default) if value is None else value


def _keep(key: str, value: Any, default: Any) -> None:
    st.session_state.setdefault(_DEFAULTS, {})[key] = default
    _picked()[key] = value
    # The first time on a page the value still belongs to the widget of the page before, which is another widget.
    seeded: set[str] = st.session_state[_SEEDED]
    if key not in seeded or st.session_state.get(key) != value:
        seeded.add(key)
        st.session_state[key] = value


def _nearest(value: Any, options: Sequence[Any], default: Any) -> Any:
    """The option that `value` names as text, else the nearest number among them, else the default."""
    if not isinstance(options, range):
        named = {str(option): option for option in options}
        if str(value) in named:
            return named[str(value)]
    numbers = [option for option in (options[0], options[-1]) if isinstance(option, int)] if options else []
    try:
        number = int(value)
    except (TypeError, ValueError):
        return default
    if len(numbers) < 2:
        return default
    if isinstance(options, range):
        return min(max(number, numbers[0]), numbers[1])
    return min(
        (option for option in options if isinstance(option, int)), key=lambda option: abs(option - number)
    )


def _current_address() -> dict[str, Any]:
    return {
        key: values if len(values := st.query_params.get_all(key)) > 1 else values[0]
        for key in st.query_params
    }
