"""The prompt page: odd texts, each change beside the untouched run, and what a link carries."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from streamlit.testing.v1 import AppTest

from dashboards.shared.prompt import MAX_BYTES, MAX_TOKENS, decode_file, encode
from hydra_lab import load
from hydra_lab.widgets.text import token_texts, visible
from tests.dashboards.conftest import byte_tokenizer

OpenApp = Callable[..., AppTest]


def strips(app: AppTest) -> list[dict[str, Any]]:
    """What the strips of coloured tokens draw."""
    found = [json.loads(element.proto.json) for element in app.get("bidi_component")]
    return [payload for payload in found if "tokens" in payload]


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
        (strip,) = strips(app)
        assert strip["tokens"], name


def test_what_cannot_run_gets_one_sentence(open_app: OpenApp) -> None:
    app = open_app("prompt")
    for reason, text in IMPOSSIBLE_TEXTS.items():
        app.text_area(key="prompt").set_value(text).run()
        assert not app.exception
        assert len(app.error) == 1 and reason in app.error[0].value
        assert not strips(app)


def test_bad_input_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"notes\.txt is not UTF-8 text \(byte 0xff at 3\): save it as UTF-8"
    ):
        decode_file("notes.txt", b"abc\xff")
    with pytest.raises(ValueError, match="lone surrogate"):
        encode(byte_tokenizer(), "a\ud800")
    assert decode_file("notes.txt", "\ufeffé".encode()) == "é"


CHANGES = ("moe[0].ablate(expert=1)", "moe[0].force(expert=2)", "ssm[*].cut()")


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_stands_beside_the_untouched_run(open_app: OpenApp, change: str) -> None:
    app = open_app("prompt", intervene=change)
    for details in ("Next token", "Routing", "Memory", "Workspace", "State"):
        app.segmented_control(key="details").set_value(details).run()
        assert not app.exception and not app.error, details
        assert len(strips(app)) == 2
        figures = [json.loads(element.proto.spec) for element in app.get("plotly_chart")]
        assert len(figures) >= 2 and len(figures) % 2 == 0


def test_forcing_an_expert_shows_it_in_every_chunk(open_app: OpenApp) -> None:
    untouched, forced = strips(open_app("prompt", intervene="moe[0].force(expert=2)"))
    assert {mark["label"] for mark in forced["marks"]} == {"2"}
    assert {mark["label"] for mark in untouched["marks"]} != {"2"}


def test_the_loss_of_a_change_is_the_models_own(open_app: OpenApp, model_dir: Path) -> None:
    text = "The king is come to town, and so is the queen."
    app = open_app("prompt", intervene="ssm[*].cut()", prompt=text)
    shown = {each.label: each.value for each in app.metric}
    model, tokenizer = load(model_dir)
    ids = torch.tensor([encode(tokenizer, text)])
    with torch.no_grad(), model.cut("ssm"):
        loss = model(input_ids=ids, labels=ids).language_loss
    assert float(shown["loss with the change"]) == pytest.approx(
        float(loss), abs=6e-4
    )  # three decimals are shown


def test_one_click_removes_an_intervention(open_app: OpenApp) -> None:
    app = open_app("prompt", intervene="; ".join(CHANGES))
    app.button(key="remove-change-1").click().run()
    assert app.query_params["intervene"] == f"{CHANGES[0]}; {CHANGES[2]}"
    app.button(key="remove-changes").click().run()
    assert "intervene" not in app.query_params and len(strips(app)) == 1


@pytest.mark.parametrize("change", ["moe[0].ablate(expert=99)", "moe[1].frobnicate()", "nonsense"])
def test_a_change_that_cannot_be_made_is_one_sentence(open_app: OpenApp, change: str) -> None:
    app = open_app("prompt", intervene=change)
    assert not app.exception and len(app.error) == 1
    assert "The intervention is not applied" in app.error[0].value
    app.button(key="remove-changes").click().run()
    assert not app.error and len(strips(app)) == 1


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
