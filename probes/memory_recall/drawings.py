"""The study's figures."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from hydra_lab import metrics
from hydra_lab.figures.grid import heat_map_grid
from hydra_lab.figures.theme import DIVERGING, SYMBOLS, Theme, colours, finish, hatching, text_colour
from hydra_lab.path_use import PathUse
from probes.memory_recall.analysis import FORM_NAMES, Evidence
from probes.memory_recall.measure import Floats
from probes.memory_recall.questions import FORMS, Question


def draw(
    evidence: Evidence, questions: Sequence[Question], use: PathUse, *, theme: Theme = "light"
) -> dict[str, go.Figure]:
    """Every figure of the study by name."""
    return {
        "accuracy": accuracy(evidence, use, theme=theme),
        "beta": beta(evidence, use, theme=theme),
        "deletion": deletion(evidence, questions, use, theme=theme),
    }


def accuracy(evidence: Evidence, use: PathUse, *, theme: Theme) -> go.Figure:
    """Answers by form, with and without the memory."""
    figure = go.Figure()
    states = {"as it is": evidence.whole, "memory cut": evidence.without}
    for index, (name, answers) in enumerate(states.items()):
        right = [answers[form].right.astype(float) for form in FORMS]
        figure.add_trace(
            go.Bar(
                x=[FORM_NAMES[form] for form in FORMS],
                y=[100 * float(each.mean()) for each in right],
                name=name,
                error_y={**_error_bars(right, scale=100), "color": text_colour(theme)},
                marker={"color": colours(2, theme)[index], "pattern": hatching(index, theme)},
                hovertemplate="%{x}, " + name + ": %{y:.1f}% right<extra></extra>",
            )
        )
    figure.update_yaxes(title_text="questions answered right (%)", range=[0, 108])
    figure.update_layout(barmode="group")
    return finish(
        figure,
        title="Are facts known, with and without the memory?",
        subtitle=f"n = {len(evidence.relations)} questions, each asked in every form; whole answers, greedy; "
        "bars: 95% bootstrap interval",
        theme=theme,
        path="memory",
        path_use=use,
        height=330,
    )


def beta(evidence: Evidence, use: PathUse, *, theme: Theme) -> go.Figure:
    """The gate by form, over the question and at the answer."""
    places = {"over the question": "beta_asked", "at the answer": "beta_answer"}
    figure = make_subplots(rows=1, cols=2, subplot_titles=list(places), horizontal_spacing=0.12)
    figure.update_annotations(font_size=13)
    for column, field in enumerate(places.values(), start=1):
        for y, layer in enumerate(evidence.layers):
            values = [getattr(evidence.whole[form], field)[y] for form in FORMS]
            figure.add_trace(
                go.Scatter(
                    x=[FORM_NAMES[form] for form in FORMS],
                    y=[float(each.mean()) for each in values],
                    error_y=_error_bars(values),
                    mode="markers",
                    name=f"block {layer}",
                    showlegend=column == 1,
                    marker={
                        "color": colours(y + 1, theme)[y],
                        "symbol": SYMBOLS[y % len(SYMBOLS)],
                        "size": 11,
                    },
                    hovertemplate="%{x}: beta %{y:.4f}<extra></extra>",
                ),
                row=1,
                col=column,
            )
        figure.update_yaxes(rangemode="tozero", row=1, col=column)
    figure.update_yaxes(title_text="gate beta (0 to 1)", row=1, col=1)
    return finish(
        figure,
        title="Does the memory's gate open where the context lacks the answer?",
        subtitle=f"mean over n = {len(evidence.relations)} questions; bars: 95% bootstrap interval; "
        "note the two scales",
        theme=theme,
        path="memory",
        path_use=use,
        height=330,
    )


def deletion(evidence: Evidence, questions: Sequence[Question], use: PathUse, *, theme: Theme) -> go.Figure:
    """What masking each question's addresses costs every question."""
    drop = evidence.deletion.drop
    size = len(drop)
    order = np.argsort(evidence.relations[:size], kind="stable")
    labels = [questions[index].text for index in order]
    shown = drop[np.ix_(order, order)]
    largest = max(float(np.quantile(np.abs(np.diagonal(drop)), 0.9)), 1e-6)
    figure, height = heat_map_grid(
        np.clip(shown, -largest, largest)[None],
        titles=[""],
        x=list(range(size)),
        y=list(range(size)),
        x_title="fact that is asked (by relation)",
        y_title="fact whose addresses are masked",
        colour_title="nats, cut<br>off at the<br>ends",
        colour_range=(-largest, largest),
        colour_scale=DIVERGING,
        hover="asked %{x}, masked %{y}: the log-probability of the answer falls by %{customdata:.2f} nats",
        hover_values=shown[None],
        cell_height=10,
    )
    ticks = {"tickmode": "array", "tickvals": list(range(size)), "ticktext": labels, "tickfont": {"size": 8}}
    figure.update_yaxes(autorange="reversed", **ticks)
    figure.update_xaxes(showticklabels=False, ticks="")
    own, elsewhere = float(np.diagonal(drop).mean()), float(drop[~np.eye(size, dtype=bool)].mean())
    return finish(
        figure,
        title="Does masking a question's addresses remove its own fact?",
        subtitle=f"n = {size} facts; mean on the diagonal {own:.3f} nats, off it {round(elsewhere, 3) + 0.0:.3f}",
        theme=theme,
        path="memory",
        path_use=use,
        height=height + 60,
    )


def _error_bars(values: Sequence[Floats], *, scale: float = 1.0) -> dict[str, object]:
    means = [float(each.mean()) for each in values]
    intervals = [metrics.mean_interval(each) for each in values]
    return {
        "type": "data",
        "symmetric": False,
        "array": [scale * (high - mean) for mean, (_, high) in zip(means, intervals, strict=True)],
        "arrayminus": [scale * (mean - low) for mean, (low, _) in zip(means, intervals, strict=True)],
    }
