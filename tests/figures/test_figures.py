"""Every figure: labelled axes, sample size, path use, both themes, and the numbers of its result."""

import json
import re
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io
import pytest
from plotly.colors import get_colorscale

from hydra_lab import figures, metrics
from hydra_lab.figures.theme import DIVERGING, MAGNITUDE, Theme, diverging, finish, log_ticks, paper_colour
from hydra_lab.widgets.colouring import contrast

_spec = spec_from_file_location("figure_samples", Path(__file__).with_name("samples.py"))
assert _spec is not None and _spec.loader is not None
samples = module_from_spec(_spec)
_spec.loader.exec_module(samples)
MAKERS = samples.makers()
USE = samples.path_use()


def title_of(figure: go.Figure) -> str:
    return re.sub(r"<[^>]+>", " ", figure.to_dict()["layout"]["title"]["text"])


def traces(figure: Any) -> list[dict[str, Any]]:
    return [trace.to_plotly_json() for trace in figure.data]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_figure_follows_the_rules(name: str, theme: str) -> None:
    figure = MAKERS[name](theme=theme, path_use=USE)
    layout = figure.to_dict()["layout"]
    axes = {key: value for key, value in layout.items() if re.fullmatch(r"[xy]axis\d*", key)}
    assert any(axis.get("title", {}).get("text") for key, axis in axes.items() if key.startswith("x"))
    title = title_of(figure)
    assert re.search(r"\d[\d,]* (sample|scored token|token|chunk)", title), title  # the sample size
    paper = layout["template"]["layout"]["paper_bgcolor"]
    assert paper == ("#ffffff" if theme == "light" else "#0e1117")
    assert "updatemenus" not in layout and not figure.frames  # nothing plays by itself
    other_theme = diverging("dark" if theme == "light" else "light")[5]  # the colour of zero
    assert other_theme not in figure.to_json()
    if name not in ("path_use", "loss_by_domain"):  # they show no decisions of a path
        assert "nats/token" in title  # the path's use stands in the figure
        assert "not measured" in title_of(MAKERS[name](theme=theme))
    figure.to_json()


def test_an_idle_path_is_called_idle() -> None:
    assert "IDLE PATH" in title_of(MAKERS["memory_use"](path_use=USE))
    assert "IDLE PATH" not in title_of(MAKERS["slot_reads"](path_use=USE))
    load = MAKERS["expert_load"](path_use=USE)
    assert [("idle" in label) for label in traces(load)[0]["y"]] == [False, False, True]


def test_the_default_template_does_not_matter() -> None:
    before = MAKERS["expert_load"]().to_json()
    kept = plotly.io.templates.default
    try:
        plotly.io.templates.default = "ggplot2"
        assert MAKERS["expert_load"]().to_json() == before
    finally:
        plotly.io.templates.default = kept


def test_figures_show_the_numbers_of_their_results() -> None:
    load = metrics.expert_load(samples.routing())
    heat = traces(figures.expert_load(load))[0]
    np.testing.assert_allclose(heat["z"], 100 * load.share)
    assert heat["text"][1][7] == "dead"
    use = traces(figures.path_use(USE))
    assert use[2]["name"] == "moe" and use[4]["name"] == "memory (idle)"
    np.testing.assert_allclose(use[2]["x"], [45, 28, 2])
    assert list(use[2]["y"]) == ["block 0", "block 2", "block 4"]
    assert use[-1]["text"][4][0] == "0.00"
    life = metrics.half_life(samples.states())
    np.testing.assert_allclose(traces(figures.half_life(life))[0]["y"], life.half_life)


def test_figures_of_the_router_show_the_numbers_of_their_results() -> None:
    record = samples.routing()
    margin = metrics.routing_margin(record)
    figure = figures.routing_margin(margin)
    medians = [trace for trace in traces(figure) if trace.get("mode") == "markers"]
    np.testing.assert_allclose(medians[3]["x"], margin.quantiles[:, 3, 2])
    assert medians[3]["name"] == "arithmetic (n=96)" and "near ties (below 0.125" in title_of(figure)
    sparsity = metrics.expert_sparsity(record)
    shown = traces(figures.expert_sparsity(sparsity))
    np.testing.assert_allclose(shown[2]["y"], 100 * sparsity.sparsity[1])
    assert "token-level sparsity (TLS), 75%" in title_of(figures.expert_sparsity(sparsity))
    saturation = metrics.router_saturation(samples.earlier_routings(), record)
    np.testing.assert_allclose(
        traces(figures.router_saturation(saturation))[0]["y"], 100 * saturation.saturation[:, 0]
    )
    special = metrics.specialization(metrics.expert_by_domain(record))
    heat = traces(figures.specialization(special))[0]
    np.testing.assert_allclose(heat["z"], special.score)
    assert heat["text"][0][2].endswith("<br>prose") and heat["text"][1][7] == "<br>never chosen"


def test_figures_of_the_memory_show_the_numbers_of_their_results() -> None:
    lookups = samples.lookups()
    use = metrics.memory_use_by_domain(lookups)
    shown = traces(figures.memory_use_by_domain(use))
    np.testing.assert_allclose(shown[0]["x"], [100 * each.used_share for each in use.use])
    np.testing.assert_allclose(shown[6]["x"], [each.gini_of_reads for each in use.use])
    dead = metrics.dead_addresses(lookups, max_size=64)
    heat = traces(figures.dead_addresses(dead))[0]
    np.testing.assert_allclose(heat["z"], 100 * dead.map)
    assert "one cell is 2 x 2 rows" in title_of(figures.dead_addresses(dead))
    facts = [capital for capital in samples.CAPITALS for _ in range(3)]
    overlap = metrics.address_overlap(samples.prompts(), facts, num_resamplings=9)
    jaccard, weighted = traces(figures.address_overlap(overlap))
    assert jaccard["y"][0] == "Bern #9"  # sorted by fact
    assert jaccard["z"][0][1] == overlap.jaccard[9, 10] and weighted["z"][0][1] == overlap.weighted[9, 10]


def test_contexts_are_shown_as_text_not_as_markup() -> None:
    result = samples.contexts()
    labels = traces(figures.top_contexts(result, ["a <b> c\n", "b", "c", "d", "e"]))[0]["y"]
    assert labels[0] == "a &lt;b> c⏎<br>sample 7, token 0"
    with pytest.raises(ValueError, match="1 texts for 5 contexts"):
        figures.top_contexts(result, ["x"])


def test_a_large_memory_map_is_small_in_a_browser() -> None:
    rng = np.random.default_rng(0)
    level = rng.integers(0, 256, size=(512, 512)).astype(np.uint8)
    figure = figures.memory_map(metrics.MemoryMap(0, level, 1e5, (2, 2), (1024, 1024), 1000, 10))
    assert len(str(figure.to_json())) < 500_000
    assert "one cell sums 2 x 2 rows" in title_of(figure)


def test_infinite_half_lives_are_counted_instead_of_drawn() -> None:
    result = metrics.HalfLife(0, np.array([3.0, np.inf]), np.array([[2.0, 5.0], [np.inf, np.inf]]), 10, 1)
    figure = figures.half_life(result)
    assert list(traces(figure)[0]["x"]) == [0] and "1 head that never decays not drawn" in title_of(figure)


def test_logarithmic_axes_have_round_ticks() -> None:
    assert log_ticks(3, 3000) == [3, 10, 30, 100, 300, 1000, 3000]
    assert log_ticks(0.9, 9.1) == [1, 2, 5]  # 1 and 3 alone would be few
    assert log_ticks(2.1, 5.2) == [3, 4, 5]
    assert log_ticks(1.23, 1.41) == [1.23, 1.41]


def test_figures_of_the_state_show_the_numbers_of_their_results() -> None:
    growth = metrics.norm_growth(samples.states())
    slopes, *lines = traces(figures.norm_growth(growth))
    np.testing.assert_allclose(slopes["y"], growth.slope)
    np.testing.assert_allclose([line["y"] for line in lines], growth.mean.T)
    saturation = metrics.state_saturation(samples.states())
    drawn = {trace["name"]: list(trace["x"]) for trace in traces(figures.state_saturation(saturation))}
    assert drawn["saturated (3)"] == [0, 1, 2] and drawn["still growing (3)"] == [3, 4, 5]
    lag = metrics.read_lag(samples.workspace())
    heat = traces(figures.read_lag(lag))[0]
    np.testing.assert_allclose(heat["z"][2:], 100 * lag.share)
    np.testing.assert_allclose(np.sum(heat["z"], axis=1), 100)
    assert list(heat["x"]) == ["1", "2 to 3", "4 to 7", "8 to 15", "start"]


def test_figures_of_attention_show_the_numbers_of_their_results() -> None:
    mass = metrics.mass_by_kind(samples.mass())
    bars = [trace for trace in traces(figures.mass_by_kind(mass)) if trace["type"] == "bar"]
    assert [bar["name"] for bar in bars] == list(metrics.KINDS)
    np.testing.assert_allclose([bar["x"][0] for bar in bars], 100 * mass.keys)
    np.testing.assert_allclose([bar["x"][5] for bar in bars], 100 * mass.by_head[1, 0])
    hits = metrics.hit_rate(samples.targets())
    first = traces(figures.hit_rate(hits))[0]
    eligible = hits.num_eligible > 0
    np.testing.assert_allclose(first["y"], 100 * hits.hit_by_distance[0, eligible])
    assert all(f"n={n}" in label for n, label in zip(hits.num_eligible[eligible], first["x"], strict=True))


def test_a_hit_rate_without_queries_that_need_selection_says_so() -> None:
    selection = samples.selections()
    near = metrics.TargetRecord(selection, np.array([0, 1]), np.array([40, 700]), np.array([30, 690]))
    figure = figures.hit_rate(metrics.hit_rate(near))
    assert "over the 0 of 2 queries" in title_of(figure)
    assert traces(figure)[0]["name"] == "head 0 selects it: no such query"


def test_tokens_are_shown_as_text_not_as_markup() -> None:
    record = samples.lookups((4, 4))
    top = metrics.top_tokens(record, int(np.argmax(record.mass())), 2)
    labels = traces(figures.top_tokens(top, ["<b>\n", " a&"]))[0]["y"]
    assert labels[0].startswith("&lt;b>⏎") and labels[1].startswith("␣a&amp;")
    with pytest.raises(ValueError, match="1 labels for 2 tokens"):
        figures.top_tokens(top, ["x"])


def test_what_is_far_from_zero_stands_out_from_the_paper() -> None:
    for theme in ("light", "dark"):
        contrasts = np.array([contrast(colour, paper_colour(theme)) for colour in diverging(theme)])
        assert (np.diff(contrasts[:6]) < 0).all() and (np.diff(contrasts[5:]) > 0).all()
        assert contrasts[5] < 1.3 and min(contrasts[0], contrasts[-1]) > 9


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_signed_map_has_the_colours_of_its_theme(theme: Theme) -> None:
    signed = go.Figure(
        [go.Heatmap(z=[[-1, 1]], colorscale=DIVERGING), go.Heatmap(z=[[1]], colorscale=MAGNITUDE)]
    )
    finish(signed, title="signed", subtitle="", theme=theme)
    shared = MAKERS["co_activation"](theme=theme).to_dict()["layout"]["coloraxis"]["colorscale"]
    own, magnitude = (trace["colorscale"] for trace in traces(signed))
    assert [[colour for _, colour in scale] for scale in (shared, own)] == [diverging(theme)] * 2
    assert [colour for _, colour in magnitude] == [colour for _, colour in get_colorscale(MAGNITUDE)]


def test_unknown_theme() -> None:
    with pytest.raises(ValueError, match="theme 'sepia' is not one of light, dark"):
        figures.template("sepia")  # pyright: ignore[reportArgumentType]


def test_html_needs_no_network(tmp_path: Path) -> None:
    paths = figures.write_html({"load": MAKERS["expert_load"]()}, tmp_path)
    text = paths["load"].read_text(encoding="utf-8")
    assert 'src="plotly.min.js"' in text and (tmp_path / "plotly.min.js").is_file()
    assert not re.search(r'src="https?:', text)
    assert json.dumps("Expert load")[1:-1] in text


def test_png_files_are_drawn_where_there_is_a_browser(tmp_path: Path) -> None:
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))):
        pytest.skip("no Chromium on this machine to draw PNG files with")
    made = figures.write_png({"load": MAKERS["expert_load"]()}, tmp_path, width=600, scale=1.0)
    assert made["load"].read_bytes().startswith(b"\x89PNG")


def test_without_a_browser_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-such-browser"))
    with pytest.raises(figures.NoBrowserError, match="BROWSER_PATH"):
        figures.write_png({"load": MAKERS["expert_load"]()}, tmp_path)
    assert not list(tmp_path.glob("*.png"))
