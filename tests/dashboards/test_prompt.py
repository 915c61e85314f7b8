"""The prompt page: odd texts, each change beside the untouched run, and what a link carries."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from streamlit.testing.v1 import AppTest

from dashboards.shared.prompt import MAX_BYTES, MAX_TOKENS, Change, decode_file, encode
from dashboards.shared.tokens import expert_spans, magnitude_spans, token_texts, visible
from hydra_lab import load
from hydra_lab.interventions import intervened
from tests.dashboards.conftest import byte_tokenizer

OpenApp = Callable[..., AppTest]


def spans(app: AppTest) -> list[str]:
    """The boxes of coloured tokens."""
    bodies = [str(element.proto.body) for element in app.get("html")]
    return [body for body in bodies if '<div class="tokens"' in body]


ODD_TEXTS = {
    "one token": "a",
    "long": "word " * 60,
    "nul": "nul \0 byte",
    "right to left": "שלום עולם\u202e",
    "emoji": "🙂👩‍🚀 emoji",
    "markup": '<script>alert(1)</script> & "quotes"',
    "white space": "\n\t \r\n",
}
IMPOSSIBLE_TEXTS = {
    "empty": "",
    f"{MAX_TOKENS + 1:,} tokens": "a" * (MAX_TOKENS + 1),
    f"{MAX_BYTES + 1:,} bytes": "a" * (MAX_BYTES + 1),
}


def test_odd_texts_run(open_app: OpenApp) -> None:
    app = open_app("prompt")
    for name, text in ODD_TEXTS.items():
        app.text_area(key="prompt").set_value(text).run()
        assert not app.exception and not app.error, name
        assert len(spans(app)) == 1, name
        assert "<script" not in spans(app)[0]


def test_what_cannot_run_gets_one_sentence(open_app: OpenApp) -> None:
    app = open_app("prompt")
    for reason, text in IMPOSSIBLE_TEXTS.items():
        app.text_area(key="prompt").set_value(text).run()
        assert not app.exception
        assert len(app.error) == 1 and reason in app.error[0].value
        assert not spans(app)


def test_bad_input_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"notes\.txt is not UTF-8 text \(byte 0xff at 3\): save it as UTF-8"
    ):
        decode_file("notes.txt", b"abc\xff")
    with pytest.raises(ValueError, match="lone surrogate"):
        encode(byte_tokenizer(), "a\ud800")
    assert decode_file("notes.txt", "\ufeffé".encode()) == "é"


@pytest.mark.parametrize("change", ["ablate an expert", "force an expert", "cut a path"])
def test_a_change_stands_beside_the_untouched_run(open_app: OpenApp, change: str) -> None:
    app = open_app("prompt")
    app.selectbox(key="change").set_value(change).run()
    for details in ("Next token", "Routing", "Memory", "Workspace", "State"):
        app.segmented_control(key="details").set_value(details).run()
        assert not app.exception and not app.error, details
        assert len(spans(app)) == 2
        figures = [json.loads(element.proto.spec) for element in app.get("plotly_chart")]
        assert len(figures) >= 2 and len(figures) % 2 == 0


def test_forcing_an_expert_shows_it_in_every_chunk(open_app: OpenApp) -> None:
    app = open_app("prompt")
    app.selectbox(key="change").set_value("force an expert").run()
    app.selectbox(key="expert").set_value(2).run()
    untouched, forced = spans(app)
    assert 'class="chunk" title="chunk 0">2</span>' in forced
    assert forced.count(">2</span>") > untouched.count(">2</span>")
    assert "Only expert 2 in block 0" in [each.value.strip("*") for each in app.markdown]


def test_the_loss_of_a_change_is_the_models_own(open_app: OpenApp, model_dir: Path) -> None:
    app = open_app("prompt")
    app.text_area(key="prompt").set_value("The king is come to town, and so is the queen.").run()
    app.selectbox(key="change").set_value("cut a path").run()
    app.selectbox(key="path").set_value("ssm").run()
    shown = {each.label: each.value for each in app.metric}
    model, tokenizer = load(model_dir)
    ids = torch.tensor([encode(tokenizer, "The king is come to town, and so is the queen.")])
    with torch.no_grad(), model.cut("ssm"):
        loss = model(input_ids=ids, labels=ids).language_loss
    assert float(shown["loss with the change"]) == pytest.approx(
        float(loss), abs=6e-4
    )  # three decimals are shown


def test_a_model_is_as_it_was_after_every_change(model_dir: Path) -> None:
    model, _ = load(model_dir)
    ids = torch.arange(1, 91)[None] % 89 + 1  # long enough for every expert to be chosen somewhere
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for change in (Change("ablate", 0, 1), Change("force", 2, 1), Change("cut", path="ssm"), Change()):
            with intervened(model, *change.interventions):
                during = model(input_ids=ids).logits
            assert torch.equal(model(input_ids=ids).logits, before)
            assert torch.equal(during, before) == (change.kind == "none")


def test_a_link_opens_the_same_view(open_app: OpenApp) -> None:
    app = open_app("prompt", prompt="linked text")
    assert app.text_area(key="prompt").value == "linked text"
    app.text_area(key="prompt").set_value("other").run()
    assert app.query_params["prompt"] in ("other", ["other"])


def test_tokens_show_what_they_hold() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("é a\n")["input_ids"]
    assert token_texts(tokenizer, ids) == ["⟨C3⟩", "⟨A9⟩", " ", "a", "\n"]
    assert visible(" a\n") == "␣a⏎"
    html = expert_spans(["<", "b"], [[1, 0]], 3, 8, "light", 1)
    assert "&lt;" in html and 'title="chunk 0">1+0<' in html and html.count("token chosen") == 1
    plain = magnitude_spans(["a", "b"], np.array([np.nan, 1.0]), (0.0, 1.0), "gate")
    assert "no gate" in plain and "gate 1.000" in plain
