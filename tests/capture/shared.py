"""A small text, a tokenizer of bytes, and what it means that two captures are identical."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydra_lab.capture import Capture, capture_files, engine

LENGTH = 20  # two whole chunks of 8 and a half one
COMMIT = 4  # samples


class ByteTokenizer:
    """Bytes folded into the nano vocabulary."""

    name_or_path = "bytes"

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [byte % 96 + 1 for byte in text.encode()]}

    def get_vocab(self) -> dict[str, int]:
        return {str(index): index for index in range(97)}


def write_texts(path: Path) -> Path:
    """Twelve windows: 5 whole ones and one of 9 tokens in one domain; 4 short lines and one of two windows in two
    others."""
    (path / "prose.txt").write_text("".join(f"The {n}th sentence.\n" for n in range(7))[:109])
    lines = [{"text": word * 3, "domain": domain} for word, domain in zip("abcd", "xyxy", strict=True)]
    lines.append({"text": "a line longer than one window", "domain": "x"})
    (path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(
    model: Any,
    texts: Path,
    out: Path,
    *,
    tokenizer: Any = None,
    commit: int = COMMIT,
    **options: Any,
) -> Capture:
    """Capture the texts in commits of `commit` samples."""
    options = {"sequence_length": LENGTH, "progress": False} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "COMMIT_TOKENS", commit * LENGTH)
        files = [texts / "prose.txt", texts / "mixed.jsonl"]
        return capture_files(model, tokenizer or ByteTokenizer(), files, out, **options)


def arrays(capture: Capture) -> dict[str, np.ndarray]:
    """All raw arrays, and those of the summary where there is one."""
    found = {
        f"{group}.{name}": capture[group][name].values
        for group in capture
        for name in capture[group].data_vars
    }
    if "summary" in capture.attributes["signals"] and capture.num_samples:
        for group, inner in capture.summary.items():
            found |= {f"summary.{group}.{name}": array for name, array in inner.items()}
    return found


def assert_identical(first: Capture, second: Capture) -> None:
    """Equal attributes, and arrays equal to the bit."""
    for name in first.attributes.keys() | second.attributes.keys():
        assert first.attributes.get(name) == second.attributes.get(name), name
    ours, theirs = arrays(first), arrays(second)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
