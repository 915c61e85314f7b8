"""Payloads, pictures and selections of the widgets, without a browser."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from hydra_lab.accounting import flops_per_token, parameter_table, state_bytes
from hydra_lab.config import HydraConfig
from hydra_lab.figures.theme import quantity
from hydra_lab.metrics.routing import RoutingMap
from hydra_lab.taps import PATHS
from hydra_lab.widgets import (
    BlockDiagram,
    CostDiagram,
    RoutingLanes,
    TokenStrip,
    chunk_margins,
    cost_diagram_payload,
    module_text,
    token_strip_payload,
    visible,
)
from hydra_lab.widgets.base import MAX_DRAWN
from hydra_lab.widgets.colouring import contrast, ink, value_colours

ODD = ["</script>", "<b>", "\0", "שלום", "\u202e", "🙂", "\n", "\x1b", "&\"'"]


def lanes() -> RoutingLanes:
    experts = np.array([[[0, 1], [2, 0], [1, 2]], [[3, 1], [3, 0], [0, 3]]])
    routing = RoutingMap((0, 2), experts, np.full(experts.shape, 0.5), 4, 16, 40)
    return RoutingLanes(routing, ["a", "</script>", "\0"], margin=np.ones((2, 3)))


def diagram() -> BlockDiagram:
    gates = {(0, "ssm"): 1.0, (0, "moe"): 0.1, (1, "ssm"): 0.9}
    return BlockDiagram([0, 1], ["ssm", "moe"], [[0.99, 0.01], [1.0, np.nan]], gates=gates)


def strip() -> TokenStrip:
    return TokenStrip(ODD, np.arange(len(ODD)), label="loss, nats", chunk_size=4)


@pytest.mark.parametrize("make", (strip, lanes, diagram))
def test_a_picture_is_well_formed_and_the_payload_is_json(make: Callable[[], Any]) -> None:
    widget = make()
    bundle = widget._repr_mimebundle_()[0]
    root = ElementTree.fromstring(bundle["image/svg+xml"])
    assert root.tag.endswith("svg") and not root.findall(".//{*}script") and not root.findall(".//{*}b")
    assert json.loads(json.dumps(widget.payload, allow_nan=False)) == widget.payload


def test_text_is_shown_and_never_turns_its_neighbours() -> None:
    shown = [token["text"] for token in strip().payload["tokens"]]
    assert shown == ["</script>", "<b>", "␀", "שלום", "⟨U+202E⟩", "🙂", "⏎\n", "␛", "&\"'"]
    assert visible("a b\n") == "a␣b⏎"


def test_a_selection_goes_to_the_picture_and_is_checked() -> None:
    widget = strip()
    seen: list[object] = []
    widget.observe(lambda change: seen.append(change["new"]), "selected")
    widget.selected = 3
    assert seen == [3] and "#d55e00" in widget.to_svg()
    widget.selected = None
    with pytest.raises(ValueError, match="selected is 9; there are 9 tokens"):
        widget.selected = 9
    chart = diagram()
    chart.selected = [0, "moe"]
    assert chart.selected == [0, "moe"]
    with pytest.raises(ValueError, match="nothing drawn"):
        chart.selected = [1, "moe"]


def test_ink_reads_on_every_colour() -> None:
    scales = [
        value_colours(np.linspace(-1, 1, 101), (-1.0, 1.0), diverging=diverging, theme=theme)
        for diverging in (True, False)
        for theme in ("light", "dark")
    ]
    assert min(contrast(c, ink(c)) for scale in scales for c in scale if c is not None) >= 4.5


def test_a_long_text_is_cut_with_a_sentence() -> None:
    widget = TokenStrip(["a"] * 4096, np.zeros(4096), label="loss, nats")
    assert len(widget.payload["tokens"]) == 4096
    assert f"The first {MAX_DRAWN} of 4,096 tokens are drawn." in widget.to_svg()


def test_what_has_no_value_has_no_colour() -> None:
    payload = token_strip_payload(["a", "b"], [np.nan, 1.0], label="loss, nats")
    assert payload["tokens"][0]["fill"] is None and payload["tokens"][1]["fill"] is not None
    payload = token_strip_payload(["a", "b"], [-1, 0], label="expert", categories=["0"])
    assert payload["tokens"][0]["fill"] is None and len(payload["legend"]["keys"]) == 1
    with pytest.raises(ValueError, match="a category"):
        token_strip_payload(["a"], [1], label="expert", categories=["0"])
    with pytest.raises(ValueError, match="shape"):
        token_strip_payload(["a"], [1, 2], label="loss")


def test_an_idle_path_is_marked_and_a_missing_one_is_not_drawn() -> None:
    ssm, moe = diagram().payload["rows"]
    assert len(ssm) == 2 and len(moe) == 1
    assert moe[0]["shapes"][3]["text"] == "g 0.10, idle" and ssm[0]["shapes"][3]["text"] == "g 1.00"


def test_a_diagram_of_costs_shows_every_path_and_what_lies_outside() -> None:
    config = HydraConfig(
        num_hidden_layers=2, attention_every=2, moe_layers=[0], memory_layers=[], workspace_layers=[1]
    )
    table = parameter_table(config)
    payload = CostDiagram(table).payload
    drawn = {tuple(item["value"]): dict(item["details"]) for row in payload["rows"] for item in row}
    paths = {(row.block, row.component): f"{row.total:,}" for row in table.rows if row.component in PATHS}
    assert {where: details["parameters, all"] for where, details in drawn.items()} == paths
    assert f"embedding {quantity(config.vocab_size * config.hidden_size, '')}" in payload["note"]
    compute = cost_diagram_payload(flops_per_token(config, 1024))
    state = cost_diagram_payload(state_bytes(config, 1024), selected=(0, "ssm"))
    assert "head" in compute["note"] and "1,024 tokens" in compute["note"] and "Outside" not in state["note"]
    widths = [float(item["shapes"][1]["attributes"]["stroke-width"]) for row in state["rows"] for item in row]
    assert max(widths) == 14 and state["selected"] == [0, "ssm"]


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [(0, "", "0"), (999, "", "999"), (999.9, "", "1 k"), (1_234_567, "FLOP", "1.23 MFLOP"), (123_456, "", "123 k"),
     (1536, "B", "1.5 KiB"), (3 * 1024**2, "B", "3 MiB"), (1e16, "", "10000 T")],
)  # fmt: skip
def test_quantities_have_three_digits(number: float, unit: str, text: str) -> None:
    assert quantity(number, unit) == text


def test_the_margin_is_the_last_chosen_less_the_best_left_out() -> None:
    logits, experts = np.array([[[3.0, 1.0, 2.5, 0.0]]]), np.array([[[0, 2]]])
    assert chunk_margins(logits, experts) == 1.5
    assert np.isnan(chunk_margins(logits, np.array([[[0, 1, 2, 3]]]))).all()


@pytest.mark.parametrize("name", ("token_strip", "scene"))
def test_both_hosts_get_the_same_drawing(name: str) -> None:
    one, other = module_text(name, "anywidget"), module_text(name, "streamlit")
    drawing = files("hydra_lab.widgets").joinpath("static", f"{name}.js").read_text("utf-8")
    assert drawing in one and drawing in other
    assert one.count("export default") == other.count("export default") == 1


def test_importing_the_library_leaves_the_widgets_out() -> None:
    code = "import sys, hydra_lab; assert not {'hydra_lab.widgets', 'anywidget'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
