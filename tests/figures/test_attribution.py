"""Figures of attribution: labelled axes, sample size, both themes, and the numbers of their results."""

import re
import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from hydra_lab import figures
from tests.figures.attribution_samples import OF_ONE_PATH, makers
from tests.figures.samples import path_use


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return makers()


def title_of(figure: go.Figure) -> str:
    return re.sub(r"<[^>]+>", " ", figure.to_dict()["layout"]["title"]["text"])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_figure_follows_the_rules(made: dict[str, Any], theme: str) -> None:
    for name, make in made.items():
        of_path = name.startswith(OF_ONE_PATH)
        figure = make(theme=theme, **({"path_use": path_use()} if of_path else {}))
        layout = figure.to_dict()["layout"]
        axes = {key: value for key, value in layout.items() if re.fullmatch(r"[xy]axis\d*", key)}
        assert any(axis.get("title", {}).get("text") for key, axis in axes.items() if key.startswith("x")), (
            name
        )
        title = title_of(figure)
        assert re.search(r"\d[\d,]* (sample|token|chunk)", title), title  # the sample size
        assert layout["template"]["layout"]["paper_bgcolor"] == ("#ffffff" if theme == "light" else "#0e1117")
        if of_path:
            assert "nats/token" in title
            assert "not measured" in title_of(make(theme=theme))
        figure.to_json()


def result_of(make: Any) -> Any:
    assert isinstance(make, partial)
    return make.args[0]


def test_figures_show_the_numbers_of_their_results(made: dict[str, Any]) -> None:
    lens = made["logit_lens"]().data[0].to_plotly_json()
    result = result_of(made["logit_lens"])
    np.testing.assert_allclose(lens["z"], result.kl[:, 0, : len(lens["x"])])
    shown = len(lens["x"])
    assert [text.startswith("✓ ") for text in lens["text"][-1]] == (
        result.actual_rank[-1, 0, :shown] == 1
    ).tolist()

    parts, bars = result_of(made["direct_logit_attribution"]), made["direct_logit_attribution"]().data
    total = sum(float(np.sum(bar.x)) for bar in bars)
    assert total == pytest.approx(float(parts.logit[0, -1]), abs=1e-3)

    patched, heat = result_of(made["activation_patching"]), made["activation_patching"]().data[0]
    np.testing.assert_allclose(heat.z, 100 * patched.recovery())
    assert heat.zmin == -heat.zmax  # white stands at the corrupted run
    edges = made["path_patching"]().data[0]
    np.testing.assert_allclose(edges.z, 100 * result_of(made["path_patching"]).recovery())
    gradients = result_of(made["decision_gradients"])
    effect = gradients.effect("layers.3.memory.lookup.weights")[0]
    np.testing.assert_allclose(made["decision_gradients"]().data[0].z, effect.reshape(len(effect), -1).T)
    edit = result_of(made["edit_fact"])
    np.testing.assert_allclose(made["edit_fact"]().data[0].z, edit.reads.T)


def test_bad_arguments_are_named(made: dict[str, Any]) -> None:
    lens, label = made["logit_lens"].args
    with pytest.raises(ValueError, match="sample 1 is not among the 1 of the result"):
        figures.logit_lens(lens, label, sample=1)
    with pytest.raises(
        ValueError, match=r"positions range\(0, 99\) are not among the \d+ tokens of sample 0"
    ):
        figures.logit_lens(lens, label, positions=range(99))
    with pytest.raises(ValueError, match="2 labels for"):
        figures.ssm_attention(result_of(made["ssm_attention"]), ["a", "b"])
    with pytest.raises(ValueError, match=r"no gradient 'x'; there are layers.0.moe.routing.logits"):
        figures.decision_gradients(result_of(made["decision_gradients"]), "x")
    with pytest.raises(ValueError, match="1 labels for"):
        figures.activation_patching(result_of(made["activation_patching"]), ["a"])


def test_figures_import_no_torch() -> None:
    code = "import sys, hydra_lab.figures.attribution; print('hydra_lab.attribution' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
