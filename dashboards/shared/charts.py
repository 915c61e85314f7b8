"""Drawing figures in the page: the page's own theme, and titles that wrap on a narrow screen."""

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import plotly.graph_objects as go
import streamlit as st

from dashboards.shared.selection import pick
from hydra_lab import figures
from hydra_lab.figures.theme import Theme

_STYLE = """
<style>
[class*="st-key-heading-"] { flex-wrap: nowrap !important; }
.figure-title { font-size: 1.02rem; font-weight: 600; line-height: 1.3; margin-bottom: .15rem; }
.figure-note { font-size: .8rem; line-height: 1.4; opacity: .85; }
@media (min-width: 40rem) { .st-key-introduction { flex-wrap: nowrap !important; } }
[data-testid="stPageLink"] p { white-space: normal; }
[class*="st-key-wide-"] { overflow-x: auto; }
[class*="st-key-wide-"] > .stElementContainer:has(.stPlotlyChart) { min-width: 56rem; }
@media (max-width: 40rem) {
  [class*="st-key-labelled-"] { overflow-x: auto; }
  [class*="st-key-labelled-"] > .stElementContainer:has(.stPlotlyChart) { min-width: 34rem; }
}
.stMainBlockContainer { padding-top: 3rem; padding-bottom: 3rem; }
</style>
"""

_LONG_NAME = 16  # characters
_GO = "page to go to"


def style() -> None:
    """The page's few own styles."""
    st.html(_STYLE)


def theme() -> Theme:
    """The theme that the browser shows."""
    return "dark" if st.context.theme.type == "dark" else "light"


def chart(
    figure: go.Figure,
    key: str,
    *,
    picks: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
    show_page: str | None = None,
) -> None:
    """Draw `figure` with its title and notes as text above it, where they wrap, and a button that exports its numbers.
    The button on the figure itself saves it as PNG.

    Args:
        key: of the element, unique on the page, and the name of the exported files.
        picks: from a point that a visitor clicks (plotly's `x`, `y`, `customdata`, ...) to what is picked by it
            (`dashboards.shared.selection.pick`). Give every pick an ordinary widget too.
        show_page: page to go to when a point is clicked.
    """
    layout = cast(Any, figure.layout)
    title, _, notes = layout.title.text.partition("<br>")
    with st.container(horizontal=True, vertical_alignment="top", gap="small", key=f"heading-{key}"):
        st.html(
            f'<div class="figure-title">{title}</div><div class="figure-note">{notes}</div>', width="stretch"
        )
        st.download_button(
            "CSV", lambda: figures.to_csv(figure), file_name=f"{key}.csv", mime="text/csv", key=f"csv-{key}",
            on_click="ignore", type="tertiary", icon=":material/download:", help="The figure's numbers as a table.",
        )  # fmt: skip
    top, kept = layout.margin.t or 0, 36 if layout.annotations or layout.legend.yanchor == "bottom" else 14
    figure.update_layout(title=None, margin_t=kept, modebar={"orientation": "v"})
    if layout.legend.orientation != "h" and layout.legend.y is None:
        figure.update_layout(legend_y=0.92)  # clear of the button that saves the figure
    if layout.height is not None:
        figure.update_layout(height=layout.height - top + kept)
    options: dict[str, Any] = {}
    if picks is not None:
        options = {"on_select": lambda: _take(key, picks, show_page), "selection_mode": "points"}
    with st.container(key=f"{_shape(figure)}-{key}"):
        st.plotly_chart(
            figure,
            theme=None,
            key=key,
            config={
                "displaylogo": False,
                "displayModeBar": True,
                "modeBarButtons": [["toImage"]],
                "toImageButtonOptions": {"format": "png", "filename": key, "scale": 2},
            },
            alt=re.sub("<[^>]*>", "", title),
            **options,
        )
    if st.session_state.pop(_GO, None):
        st.switch_page(cast(str, show_page))


def _take(key: str, picks: Callable[[dict[str, Any]], Mapping[str, Any]], show_page: str | None) -> None:
    points = st.session_state[key].selection.points
    if points:
        pick(**picks(points[0]))
        st.session_state[_GO] = show_page is not None


def _shape(figure: go.Figure) -> str:
    """`wide` for plots beside each other, which keep a readable width and are scrolled sideways where there is less;
    `labelled` for heat maps with long names of rows, likewise on a phone; else `figure`."""
    if len({cast(Any, axis).domain for axis in figure.select_xaxes()}) > 1:
        return "wide"
    heat_maps = [trace for trace in figure.select_traces({"type": "heatmap"}) if trace.y is not None]
    names = [str(name) for trace in heat_maps for name in trace.y]
    return "labelled" if max(map(len, names), default=0) > _LONG_NAME else "figure"
