"""Tokens as text that can be seen."""

from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
_CONTROLS = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "␡", 0x0D: "␍"}
_BIDIRECTIONAL = {code: f"⟨U+{code:04X}⟩" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_SHOWN = _CONTROLS | _BIDIRECTIONAL | {0x0A: "⏎\n", 0x09: "⇥\t"}


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; a token that holds part of a character shows its bytes in hexadecimal."""
    texts: list[str] = []
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        if all(character in _BYTE_OF for character in token):
            raw = bytes(_BYTE_OF[character] for character in token)
            try:
                texts.append(raw.decode("utf-8"))
            except UnicodeDecodeError:
                texts.append("⟨" + raw.hex(" ").upper() + "⟩")
        else:
            texts.append(token)  # a special token, which stands for itself
    return texts


def shown(text: str) -> str:
    """A token's text as a strip shows it: white space kept, control characters as pictures, direction overrides
    named (they would turn the tokens around them)."""
    return text.translate(_SHOWN)


def visible(text: str) -> str:
    """A token's text on one line, white space shown."""
    return text.translate(_SHOWN | {0x20: "␣", 0x0A: "⏎"})
