"""Predict before you run: radio buttons with nothing chosen beforehand, and an answer that comes from a measurement."""

from collections.abc import Sequence
from html import escape

from hydra_lab.course.reading import show_bundle, show_text


class Prediction:
    """What a reader expects of an experiment that comes next.

    Attributes:
        question, options: as given to `predict`.
        chosen: the option that the reader chose so far, None before that. Assigning chooses it.
    """

    def __init__(self, question: str, options: Sequence[str]) -> None:
        import ipywidgets

        if len(options) < 2 or len(set(options)) != len(options):
            raise ValueError(f"a prediction needs two or more different options, not {list(options)}")
        self.question = question
        self.options = tuple(options)
        self._buttons = ipywidgets.RadioButtons(
            options=self.options, index=None, layout=ipywidgets.Layout(width="max-content", max_width="100%")
        )
        self.widget = ipywidgets.VBox([ipywidgets.HTML(f"<b>Predict:</b> {escape(question)}"), self._buttons])

    @property
    def chosen(self) -> str | None:
        return self._buttons.value

    @chosen.setter
    def chosen(self, option: str) -> None:
        if option not in self.options:
            raise ValueError(f"{option!r} is none of the options {list(self.options)}")
        self._buttons.value = option

    def __repr__(self) -> str:
        return f"Prediction({self.question!r}, options={list(self.options)}, chosen={self.chosen!r})"

    def reveal(self, answer: str, why: str) -> None:
        """Show the `answer` (one of the options, as measured), whether the prediction was right, and `why`."""
        if answer not in self.options:
            raise ValueError(f"the answer {answer!r} is none of the options {list(self.options)}")
        if self.chosen is None:
            verdict, mine = "You made no prediction", ""
        elif self.chosen == answer:
            verdict, mine = "Right", ""
        else:
            verdict, mine = "Not so", f" You predicted: {self.chosen}."
        show_text(
            f"**{verdict}.**{mine} The answer is: **{answer}**. {why}",
            f"{verdict}.{mine} The answer is: {answer}. {why}",
        )


def predict(question: str, options: Sequence[str]) -> Prediction:
    """Ask for a prediction with radio buttons, none of them chosen. Call `.reveal` on it after the experiment.

    Raises:
        ValueError: fewer than two options, or one of them twice.
    """
    prediction = Prediction(question, options)
    lines = [f"Predict: {question}", *(f"  ( ) {option}" for option in prediction.options)]
    show_bundle({**(prediction.widget._repr_mimebundle_() or {}), "text/plain": "\n".join(lines)})
    return prediction
