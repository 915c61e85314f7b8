import pytest

from hydra_lab.course import predict


def test_nothing_is_chosen_beforehand_and_the_options_are_printed_without_a_notebook(capsys):
    prediction = predict("Will it rain?", ["yes", "no"])
    assert prediction.chosen is None
    assert capsys.readouterr().out == "Predict: Will it rain?\n  ( ) yes\n  ( ) no\n"


@pytest.mark.parametrize(
    "chosen, verdict",
    [
        (None, "You made no prediction. The answer is: no. Dry all day."),
        ("no", "Right. The answer is: no. Dry all day."),
        ("yes", "Not so. You predicted: yes. The answer is: no. Dry all day."),
    ],
)
def test_reveal_says_whether_the_prediction_was_right_and_why(chosen, verdict, capsys):
    prediction = predict("Will it rain?", ["yes", "no"])
    if chosen is not None:
        prediction.chosen = chosen
    capsys.readouterr()
    prediction.reveal("no", "Dry all day.")
    assert capsys.readouterr().out == verdict + "\n"


def test_an_answer_or_a_choice_outside_the_options_is_refused():
    prediction = predict("Will it rain?", ["yes", "no"])
    with pytest.raises(ValueError, match="'maybe' is none of"):
        prediction.reveal("maybe", "")
    with pytest.raises(ValueError, match="'maybe' is none of"):
        prediction.chosen = "maybe"


@pytest.mark.parametrize("options", [["only"], ["same", "same"]])
def test_a_prediction_needs_two_different_options(options):
    with pytest.raises(ValueError, match="two or more different options"):
        predict("Which?", options)


def test_the_radio_buttons_change_the_choice():
    prediction = predict("Will it rain?", ["yes", "no"])
    prediction.widget.children[1].index = 1
    assert prediction.chosen == "no"
