"""A tiny model with sample texts, as a directory, and the app over it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from streamlit.testing.v1 import AppTest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hydra_lab.config import HydraConfig
from hydra_lab.modeling import HydraForCausalLM
from tests.helpers import enliven

APP = Path(__file__).resolve().parents[2] / "dashboards" / "app.py"
TEXTS = {
    "code": "def mean(values):\n    return sum(values)\n" * 4,
    "prose": "The king is come to town. <b>Who?</b>\n" * 5,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


def write_model(directory: Path, *, samples: bool = True, **fields: object) -> Path:
    """A nano model with workspace and memory, and two sample texts."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    options = {"vocab_size": len(tokenizer), **fields}
    model = HydraForCausalLM(HydraConfig.from_preset("nano", **options))
    enliven(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if samples:
        lines = [json.dumps({"text": text, "domain": domain}) for domain, text in TEXTS.items()]
        (directory / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache directory, for all tests: the sample capture is made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def open_app(monkeypatch: pytest.MonkeyPatch, model_dir: Path, cache_home: Path) -> Callable[..., AppTest]:
    """`open_app(page, *arguments)`: the app after its first run, on `page`, with its background work done."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the kernels' tests set it when they are collected

    def open_app(page: str, *arguments: str | Path, **query: str) -> AppTest:
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
        monkeypatch.setattr(sys, "argv", [str(APP), *map(str, arguments or [model_dir])])
        app = AppTest.from_file(str(APP), default_timeout=120)
        for name, value in query.items():
            app.query_params[name] = value
        app.run()
        if page != "start":
            app.switch_page(f"app_pages/{page}.py").run()
        finish_background_work()
        return app.run()

    return open_app


def finish_background_work() -> None:
    """Wait for the threads that make sample captures."""
    import threading

    for thread in threading.enumerate():
        if thread.name.startswith("Sample texts of "):
            thread.join()
