"""The README's Python examples run as they stand, one after the other, on the model that ships."""

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_python_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 2
    names: dict[str, Any] = {}
    for example in examples:
        assert len(example.splitlines()) <= 10
        exec(compile(example, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert printed.count("tensor") == 3 and printed.rstrip().endswith("A: Rome")
    assert names["edit"].achieved
