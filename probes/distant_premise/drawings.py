"""The study's figures."""

from collections.abc import Callable

import numpy as np
import plotly.graph_objects as go

from hydra_lab.figures.theme import SYMBOLS, Theme, colours, counted, finish, muted_colour, text_colour
from hydra_lab.metrics import mean_interval
from probes.distant_premise.analysis import chance_of_selection, hits, is_right, is_selectable
from probes.distant_premise.measure import Answers, Floats, Ints


def draw(answers: list[Answers], asked: Ints, *, theme: Theme = "light") -> dict[str, go.Figure]:
    """Every figure of the study by name."""
    return {
        "accuracy": accuracy(answers, asked, theme=theme),
        "selection": selection(answers, asked, theme=theme),
    }


def accuracy(answers: list[Answers], asked: Ints, *, theme: Theme = "light") -> go.Figure:
    """Share of right answers by distance, as the model is and under each intervention."""
    names = list(answers[0].score_under)
    figure = go.Figure()
    _add_line(
        figure,
        answers,
        lambda each: is_right(each.score, asked).mean(axis=1),
        name="as it is",
        colour=text_colour(theme),
        symbol="circle",
        width=3.0,
    )
    for number, (name, colour) in enumerate(zip(names, colours(len(names), theme), strict=True)):
        _add_line(
            figure,
            answers,
            lambda each, name=name: is_right(each.score_under[name], asked).mean(axis=1),
            name=name,
            colour=colour,
            symbol=SYMBOLS[number + 1],
            width=1.6,
        )
    chance = 1 / answers[0].score.shape[-1]
    _add_reference(figure, answers, [chance] * len(answers), "blind choice", theme)
    _finish_axes(figure, answers, "right answers (share of questions)")
    num_problems, num_questions = answers[0].is_exact.shape
    return finish(
        figure,
        title="Answers by distance of the premise",
        subtitle=f"mean over {counted(num_problems, 'problem')} with {counted(num_questions, 'question')} "
        f"each, bars 95% over problems; a choice among the {answers[0].score.shape[-1]} values of a problem",
        theme=theme,
        height=400,
    )


def selection(answers: list[Answers], asked: Ints, *, theme: Theme = "light") -> go.Figure:
    """Share of questions whose last token selects the block of the asked pair, and of another pair."""
    shown = [each for each in answers if is_selectable(each)]
    figure = go.Figure()
    layers = answers[0].layers
    own = np.eye(len(asked), dtype=bool)
    for y, (layer, colour) in enumerate(zip(layers, colours(len(layers), theme), strict=True)):
        for name, pairs, dash, symbol in (
            ("the asked pair", own, "solid", SYMBOLS[y]),
            ("another pair", ~own, "dot", SYMBOLS[y] + "-open"),
        ):
            _add_line(
                figure,
                shown,
                lambda each, y=y, pairs=pairs: hits(each, y)[:, pairs].mean(axis=1),
                name=f"block {layer}: {name}",
                colour=colour,
                symbol=symbol,
                width=1.8,
                dash=dash,
            )
    num_heads = answers[0].selected.shape[3]
    at_random = [1 - (1 - chance_of_selection(each)) ** num_heads for each in shown]
    _add_reference(figure, shown, at_random, "at random among the candidates", theme)
    _finish_axes(figure, answers, "premise's block selected<br>by a head (share of questions)")
    num_problems, num_questions = answers[0].is_exact.shape
    return finish(
        figure,
        title="What the attention selects when it is asked",
        subtitle=f"selection of the question's last token; mean over {counted(num_problems, 'problem')} with "
        f"{counted(num_questions, 'question')} each,<br>bars 95% over problems; what the attention is worth: see "
        "the answers without it",
        theme=theme,
        height=380,
    )


def _add_line(
    figure: go.Figure,
    answers: list[Answers],
    share: Callable[[Answers], Floats],
    *,
    name: str,
    colour: str,
    symbol: str,
    width: float,
    dash: str = "solid",
) -> None:
    values = [share(each) for each in answers]
    mean = np.array([each.mean() for each in values])
    low, high = np.array([mean_interval(each) for each in values]).reshape(-1, 2).T
    figure.add_trace(
        go.Scatter(
            x=[each.distance for each in answers],
            y=mean,
            mode="lines+markers",
            name=name,
            line={"color": colour, "width": width, "dash": dash},
            marker={"color": colour, "symbol": symbol, "size": 9},
            error_y={
                "type": "data",
                "array": np.maximum(high - mean, 0),
                "arrayminus": np.maximum(mean - low, 0),
                "thickness": 1.2,
            },
            hovertemplate=f"{name}, %{{x}} tokens: %{{y:.1%}}<extra></extra>",
        )
    )


def _add_reference(
    figure: go.Figure, answers: list[Answers], share: list[float], name: str, theme: Theme
) -> None:
    figure.add_trace(
        go.Scatter(
            x=[each.distance for each in answers],
            y=share,
            mode="lines",
            name=name,
            line={"color": muted_colour(theme), "dash": "dash"},
            hovertemplate=f"{name}, %{{x}} tokens: %{{y:.1%}}<extra></extra>",
        )
    )


def _finish_axes(figure: go.Figure, answers: list[Answers], title: str) -> None:
    distances = [each.distance for each in answers]
    figure.update_xaxes(
        title_text="filler between premise and question (tokens, log scale)",
        type="log",
        tickvals=distances,
        ticktext=[f"{each:,}" for each in distances],
    )
    figure.update_yaxes(title_text=title, range=[-0.03, 1.05], tickformat=".0%")
