"""Figures of what changed: the loss by domain, two captures, and what dense attention would have seen."""

import re
from dataclasses import replace
from typing import Any, cast

import numpy as np
import plotly.graph_objects as go
import pytest

from hydra_lab import figures, metrics
from hydra_lab.attribution import DenseAttention
from hydra_lab.capture.comparison import Change, Comparison
from hydra_lab.figures.theme import Theme


def title_of(figure: Any) -> str:
    return re.sub("<[^>]+>", " ", figure.to_dict()["layout"]["title"]["text"])


def comparison() -> Comparison:
    nothing = dict.fromkeys(
        (
            "first_expert",
            "addresses",
            "memory_gate",
            "selected_blocks",
            "read_gate",
            "write_gate",
            "state_norm",
        )
    )
    return Comparison(
        first=cast(Any, None),
        second=cast(Any, None),
        domains=("code", "prose"),
        num_samples=np.array([3, 4]),
        num_tokens=np.array([300, 400]),
        loss=np.array([1.0, 2.0]),
        loss_change=np.array([0.25, -0.5]),
        expert_set=Change((0, 2), np.array([[0.1, 0.2], [0.3, np.nan]]), np.array([[5, 5], [5, 0]])),
        path_share={"moe": Change((0, 1), np.array([[-0.4, 0.1], [np.nan] * 2]), np.array([[3, 4], [0, 0]]))},
        **nothing,
    )


def dense(length: int) -> DenseAttention:
    blocks = -(-length // 16)
    wanted = np.zeros((1, length, blocks))
    wanted[0, :, 0] = 1
    shown = wanted * 0.75
    return DenseAttention(5, 16, wanted, shown, np.array([length]))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_they_name_axes_sample_and_theme(theme: Theme) -> None:
    made = (
        figures.loss_change(comparison(), theme=theme),
        figures.decision_changes(comparison(), theme=theme),
        figures.loss_difference(("code",), [np.array([0.1, 0.3])], theme=theme),
        figures.dense_attention(dense(40), theme=theme),
    )
    for figure in made:
        layout = figure.to_dict()["layout"]
        assert re.search(r"\d+ (token|sample)", title_of(figure))
        assert layout["template"]["layout"]["paper_bgcolor"] == ("#ffffff" if theme == "light" else "#0e1117")
        assert any(axis.title.text for axis in cast(go.Figure, figure).select_xaxes())


def test_the_change_of_the_loss_is_signed_second_minus_first() -> None:
    bars = figures.loss_change(comparison()).data[0]
    assert bars.y.tolist() == [0.25, -0.5]
    assert "700 tokens of 7 samples" in title_of(figures.loss_change(comparison()))


def test_every_measured_decision_has_its_row_and_zero_is_the_middle_of_the_colours() -> None:
    cells = figures.decision_changes(comparison()).data[0]
    assert list(cells.y) == [
        "chunks with other experts, block 0",
        "chunks with other experts, block 2",
        "moe share of the update, change, block 0",
    ]
    assert np.array_equal(cells.z, [[0.1, 0.2], [0.3, np.nan], [-0.4, 0.1]], equal_nan=True)
    assert (cells.zmin, cells.zmax) == (-0.4, 0.4)
    assert cells.text[1][1] == ""


def test_captures_that_share_no_decision_still_draw() -> None:
    bare = replace(comparison(), expert_set=None, path_share={})
    assert len(figures.decision_changes(bare).data[0].y or ()) == 0


def test_the_interval_of_the_change_by_domain() -> None:
    rng = np.random.default_rng(0)
    samples = [rng.normal(1, 0.1, 400), np.array([0.5])]
    bars = figures.loss_difference(("many", "one"), samples).data[0]
    assert np.allclose(bars.y, [samples[0].mean(), 0.5])
    low, high = metrics.mean_interval(samples[0])
    assert bars.error_y.array[0] == pytest.approx(high - bars.y[0])
    assert bars.error_y.arrayminus[0] == pytest.approx(bars.y[0] - low)
    assert np.isnan(bars.error_y.array[1]), "one sample has no interval"


def test_what_dense_attention_wanted_and_was_not_shown() -> None:
    wanted, missed = figures.dense_attention(dense(40)).data
    assert np.allclose(np.array(wanted.z)[0], 100)
    assert np.allclose(np.array(missed.z)[0], 25)


def test_long_texts_are_thinned_to_512_columns() -> None:
    wanted = figures.dense_attention(dense(2_000)).data[0]
    assert np.array(wanted.z).shape[1] <= 512
