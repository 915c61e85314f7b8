"""The README's Python example runs as it stands, on the model that ships."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(example.splitlines()) <= 10
    exec(compile(example, str(README), "exec"), {})
    assert capsys.readouterr().out.count("tensor") == 3
