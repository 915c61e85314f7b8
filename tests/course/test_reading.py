import functools

import pytest

from hydra_lab.course import quick, show_source
from hydra_lab.ops.ssd.reference import ssd


def test_the_source_on_show_is_the_library_s_own(capsys):
    show_source(ssd)
    shown = capsys.readouterr().out
    assert shown.startswith("# hydra_lab/ops/ssd/reference.py, line ")
    assert "def ssd(" in shown


def test_a_wrapped_function_shows_what_it_wraps(capsys):
    show_source(functools.wraps(ssd)(lambda: None))
    assert "def ssd(" in capsys.readouterr().out


def test_what_has_no_source_is_refused():
    with pytest.raises(TypeError):
        show_source(3)


@pytest.mark.parametrize("value, expected", [(None, False), ("", False), ("0", False), ("1", True)])
def test_quick_is_read_from_the_environment(value, expected, monkeypatch):
    monkeypatch.delenv("HYDRA_LAB_QUICK", raising=False)
    if value is not None:
        monkeypatch.setenv("HYDRA_LAB_QUICK", value)
    assert quick() is expected
