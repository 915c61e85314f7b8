"""Tokens of a text, coloured by a signal."""

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import traitlets
from numpy.typing import ArrayLike

from hydra_lab.figures.theme import Theme, colours
from hydra_lab.widgets.base import MAX_DRAWN, Payload, Widget, module_text, svg_document, svg_text
from hydra_lab.widgets.colouring import ink, limits_of, value_colours
from hydra_lab.widgets.text import shown

Details = Sequence[Sequence[tuple[str, str]]]
"""For each token, pairs of label and value."""


def token_strip_payload(
    texts: Sequence[str],
    values: ArrayLike,
    *,
    label: str,
    diverging: bool = False,
    categories: Sequence[str] | None = None,
    limits: tuple[float, float] | None = None,
    details: Details | None = None,
    chunk_size: int | None = None,
    chunk_labels: Sequence[str] | None = None,
    selected: int | None = None,
    theme: Theme = "light",
) -> Payload:
    """What `TokenStrip` draws.

    Args:
        texts: [L] text of each token.
        values: [L] signal. NaN stays without colour. With `categories`, the index of the token's category; -1 has none.
        label: what the signal is, with its unit.
        diverging: whether the signal has a true zero with a meaning on both sides.
        categories: names of the categories, where the signal is one.
        limits: ends of the colour scale; the signal's own unless given.
        details: shown on hover and focus, after the token's text and value.
        chunk_size: tokens per chunk; a mark stands before each chunk's first token.
        chunk_labels: text of each mark; the chunk's number unless given.
        selected: token that is outlined.

    Raises:
        ValueError: the lengths disagree, a category or the selection is out of range, or an option contradicts another.
    """
    signal = np.asarray(values, dtype=np.float64)
    num_tokens = len(texts)
    if signal.shape != (num_tokens,):
        raise ValueError(f"values have shape {signal.shape} for {num_tokens} tokens")
    if details is not None and len(details) != num_tokens:
        raise ValueError(f"{len(details)} details for {num_tokens} tokens")
    check_token(selected, num_tokens)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be positive")
    if categories is None:
        ends = limits or limits_of(signal, diverging)
        fills = value_colours(signal, ends, diverging=diverging, theme=theme)
        shown_values = ["none" if np.isnan(value) else f"{value:.4g}" for value in signal]
        steps = value_colours(np.linspace(*ends, 9), ends, diverging=diverging, theme=theme)
        legend: Payload = {"label": label, "low": f"{ends[0]:.4g}", "high": f"{ends[1]:.4g}", "steps": steps}
    else:
        if diverging or limits is not None:
            raise ValueError("categories have neither a zero nor limits")
        names, palette = list(categories), colours(len(categories), theme)
        index = signal.astype(np.int64)
        if not (np.isfinite(signal).all() and ((index >= -1) & (index < len(names))).all()):
            raise ValueError(f"a category is not among -1..{len(names) - 1}")
        fills = [palette[i] if i >= 0 else None for i in index]
        shown_values = [names[i] if i >= 0 else "none" for i in index]
        keys = [
            {"name": name, "fill": fill, "ink": ink(fill)} for name, fill in zip(names, palette, strict=True)
        ]
        legend = {"label": label, "keys": keys}
    marks: list[Payload] = []
    if chunk_size is not None:
        starts = range(0, num_tokens, chunk_size)
        if chunk_labels is not None and len(chunk_labels) != len(starts):
            raise ValueError(f"{len(chunk_labels)} labels for {len(starts)} chunks")
        marks = [
            {"token": start, "label": str(chunk if chunk_labels is None else chunk_labels[chunk])}
            for chunk, start in enumerate(starts)
        ]
    tokens = [
        {
            "text": shown(text),
            "fill": fill,
            "ink": None if fill is None else ink(fill),
            "details": [
                ["token", f"{i}"],
                [label, value],
                *([shown(name), shown(detail)] for name, detail in (details[i] if details else ())),
            ],
        }
        for i, (text, fill, value) in enumerate(zip(texts, fills, shown_values, strict=True))
    ]
    return {
        "label": f"Tokens coloured by {label}",
        "tokens": tokens,
        "marks": marks,
        "legend": legend,
        "selected": selected,
        "theme": theme,
    }


def check_token(selected: int | None, num_tokens: int) -> None:
    """Raise ValueError where `selected` is no token."""
    if selected is not None and not 0 <= selected < num_tokens:
        raise ValueError(f"selected is {selected}; there are {num_tokens} tokens")


class TokenStrip(Widget):
    """Tokens of a text coloured by a signal; takes the arguments of `token_strip_payload`.

    Attributes:
        selected: index of the selected token, or None.
    """

    _esm = module_text("token_strip", "anywidget")
    selected = traitlets.Int(None, allow_none=True).tag(sync=True)

    def __init__(self, texts: Sequence[str], values: ArrayLike, **options: Any) -> None:
        payload = token_strip_payload(texts, values, **options)
        super().__init__(payload=payload, selected=payload["selected"])

    @traitlets.validate("selected")
    def _check_selected(self, proposal: Any) -> int | None:
        check_token(proposal["value"], len(self.payload["tokens"]))
        return proposal["value"]

    def to_svg(self) -> str:
        """The first tokens as a picture, wrapped at 900 pixels."""
        return token_strip_svg(self.payload | {"selected": self.selected})


def token_strip_svg(payload: Payload, width: float = 900) -> str:
    """A picture of a payload; a long text is cut, and a sentence says so."""
    marks = {mark["token"]: mark["label"] for mark in payload["marks"]}
    body: list[str] = [svg_text(4, 14, payload["label"])]
    x, y, step = 4.0, 38.0, 7.4
    for index, token in enumerate(payload["tokens"][:MAX_DRAWN]):
        if index in marks:
            body.append(svg_text(x + 4, y - 4, marks[index], 'font-size="9"'))
            x += 8 + 5.6 * len(marks[index])
        text = token["text"].replace("\n", "").replace("\t", "  ")
        size = step * sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text) + 2
        if x + size > width and x > 4:
            x, y = 4.0, y + 24
        outline = ' stroke="#d55e00" stroke-width="2"' if index == payload["selected"] else ""
        fill = token["fill"] or "none"
        body.append(
            f'<rect x="{x:.1f}" y="{y - 14:.1f}" width="{size:.1f}" height="19" fill="{fill}"{outline}/>'
        )
        body.append(svg_text(x + 1, y, text, f'fill="{token["ink"] or "#767676"}"'))
        x += size + 1
        if "\n" in token["text"]:
            x, y = 4.0, y + 24
    if len(payload["tokens"]) > MAX_DRAWN:
        y += 26
        body.append(svg_text(4, y, f"The first {MAX_DRAWN} of {len(payload['tokens']):,} tokens are drawn."))
    return svg_document(width, y + 14, payload["label"], body)
