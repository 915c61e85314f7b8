"""One training text and which of its characters are worth learning."""

from collections.abc import Iterable
from dataclasses import dataclass

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"

Piece = tuple[str, bool]
"""A stretch of text and whether the training loss counts it."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text with the stretches that the training loss counts.

    Attributes:
        text: the whole text, without the end-of-text mark that packing adds.
        spans: half-open character ranges [start, end) whose tokens are supervised, in order and disjoint; `None`
            means that everything is supervised, the end-of-text mark too (natural text).
        form: the variant inside the domain, such as "closed" or "open" for facts; empty where there is one only.
    """

    text: str
    spans: tuple[tuple[int, int], ...] | None = None
    form: str = ""

    @classmethod
    def from_pieces(cls, pieces: Iterable[Piece], form: str = "") -> "Document":
        """Joins pieces into a document; neighbouring supervised pieces become one span."""
        texts: list[str] = []
        spans: list[tuple[int, int]] = []
        position = 0
        for text, supervised in pieces:
            end = position + len(text)
            texts.append(text)
            if supervised and text:
                if spans and spans[-1][1] == position:
                    spans[-1] = (spans[-1][0], end)
                else:
                    spans.append((position, end))
            position = end
        return cls(text="".join(texts), spans=tuple(spans), form=form)
