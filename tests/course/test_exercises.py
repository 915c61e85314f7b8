import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

from hydra_lab.course import NotYet, check, check_close, passed


def test_check_raises_the_hint_and_nothing_when_it_holds():
    check(True, "unused")
    check(torch.tensor(True), "unused")
    with pytest.raises(NotYet, match="one chunk late"):
        check(np.bool_(False), "one chunk late")


def test_close_takes_tensors_arrays_and_numbers():
    check_close(torch.ones(2, dtype=torch.bfloat16), np.ones(2), "")
    check_close([1.0, 2.0], torch.tensor([1.0, 2.0 + 1e-7]), "")
    check_close(3, 3.0, "")
    check_close(torch.ones(1, requires_grad=True), torch.ones(1), "")


@pytest.mark.parametrize(
    "actual, message",
    [
        (torch.zeros(2, 3), r"shape is \[2, 3\]; it should be \[3, 2\]"),
        (None, "None .does the function return"),
        (torch.tensor([[0.0, 1], [2, 7], [9, 5]]), r"at index \[1, 1\]: 7 instead of 3. 2 of 6"),
        (torch.full((3, 2), torch.nan), r"at index \[0, 0\]: nan instead of 0. 6 of 6"),
        ("text", "but it is a str"),
    ],
)
def test_close_says_after_the_hint_what_differs(actual, message):
    expected = torch.arange(6.0).reshape(3, 2)
    with pytest.raises(NotYet, match=rf"(?s)your hint\n.*{message}"):
        check_close(actual, expected, "your hint")


def test_close_obeys_its_tolerances():
    check_close(1.05, 1.0, "", rtol=0.1)
    with pytest.raises(NotYet, match=r"first difference: 1\.05 instead of 1"):
        check_close(1.05, 1.0, "", rtol=0.01)


def test_a_notebook_shows_the_hint_without_a_traceback(capsys):
    shell = InteractiveShell()
    shell.run_cell("from hydra_lab.course import check\ncheck(1 > 2, 'Is the sign right?')")
    shown = capsys.readouterr().out
    assert "Not yet." in shown and "Is the sign right?" in shown
    assert "Traceback" not in shown and "check(" not in shown


def test_passed_names_the_exercise(capsys):
    passed("4.2")
    assert capsys.readouterr().out == "Exercise 4.2 is right.\n"
