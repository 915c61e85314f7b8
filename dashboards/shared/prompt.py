"""One prompt through the model, as it is and with interventions."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import streamlit as st
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dashboards.shared.changes import changes_in_force
from dashboards.shared.selection import linked, pick, picked
from dashboards.shared.sources import LoadedModel
from hydra_lab.capture.in_memory import InMemoryCapture, capture_batch
from hydra_lab.data.sample_texts import read_sample_texts
from hydra_lab.interventions import Intervention, intervened
from hydra_lab.locks import model_lock
from hydra_lab.metrics.text import NextTokens
from hydra_lab.widgets.text import token_texts

MAX_BYTES = 1_000_000
MAX_TOKENS = 4096
NUM_CANDIDATES = 10
"""Next tokens that are kept per position."""

EXAMPLE_TOKENS = 200
FIRST_PROMPT = """def mean(values):
    return sum(values) / len(values)

42+17: 2+7=9 4+1=5 =59

KING. What news? The army of the north is come.

country of Osaka: Japan
country of Lyon:"""


@dataclass(frozen=True, eq=False)
class Trace:
    """What the model did with one prompt of L tokens.

    Attributes:
        capture: its decisions (one sample).
        loss: [L] nats of each token given the earlier ones; NaN for the first.
        candidates: [L, V] likeliest next tokens after each token, likeliest first.
        probability: [L, V] their probabilities.
        entropy: [L] of the whole distribution, nats.
        divergence: [L] KL divergence from the untouched run's next-token distribution to this one's, nats; zero in
            the untouched run.

    Shared by all visitors: read it, do not write into it.
    """

    capture: InMemoryCapture
    loss: NDArray[np.float64]
    candidates: NDArray[np.int64]
    probability: NDArray[np.float64]
    entropy: NDArray[np.float64]
    divergence: NDArray[np.float64]

    @property
    def mean_loss(self) -> float:
        """Mean loss per predicted token, nats; NaN for a prompt of one token."""
        return float(self.loss[1:].mean()) if len(self.loss) > 1 else float("nan")

    def next_tokens(self, position: int, ids: tuple[int, ...]) -> NextTokens:
        """The guesses after the token at `position`."""
        following = ids[position + 1] if position + 1 < len(ids) else None
        return NextTokens(
            position=position,
            tokens=self.candidates[position],
            probability=self.probability[position],
            entropy=float(self.entropy[position]),
            actual=following,
            actual_probability=float("nan") if following is None else float(np.exp(-self.loss[position + 1])),
        )


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of a prompt.

    Raises:
        ValueError: the prompt is empty, too long, or not valid Unicode; one sentence that says what to do.
    """
    if not text:
        raise ValueError("The prompt is empty: type some text.")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise ValueError(
            "The prompt holds half a character (a lone surrogate): delete it and type on."
        ) from None
    if size > MAX_BYTES:
        raise ValueError(
            f"The prompt has {size:,} bytes and at most {MAX_BYTES:,} fit: shorten it, or use `hydra-lab capture`."
        )
    ids = tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) > MAX_TOKENS:
        raise ValueError(
            f"The prompt has {len(ids):,} tokens and at most {MAX_TOKENS:,} fit: shorten it, "
            "or use `hydra-lab capture`."
        )
    return ids


def decode_file(name: str, content: bytes) -> str:
    """Text of an uploaded file.

    Raises:
        ValueError: it is too large or not UTF-8.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"{name} has {len(content):,} bytes and at most {MAX_BYTES:,} fit: cut it, or use `hydra-lab capture`."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text (byte {content[error.start]:#04x} at {error.start:,}): save it as UTF-8."
        ) from None


def trace(loaded: LoadedModel, ids: tuple[int, ...], changes: tuple[Intervention, ...] = ()) -> Trace:
    """Run `ids` through the model under `changes`; the last few results are kept.

    Raises:
        ValueError: the model cannot take a change.
    """
    return _trace(loaded.weights_hash, ids, "; ".join(map(str, changes)), changes, loaded)


@st.cache_resource(max_entries=16, show_spinner="Running the model …")
def _trace(
    weights_hash: str,
    ids: tuple[int, ...],
    changes_text: str,
    _changes: tuple[Intervention, ...],
    _loaded: LoadedModel,
) -> Trace:
    model = _loaded.model
    input_ids = torch.tensor([ids], device=model.device)
    with model_lock(model), torch.no_grad():
        with intervened(model, *_changes):
            capture = capture_batch(model, input_ids, keep_logits=True)
        log_probability = _log_softmax(capture.logits)
        capture.logits = None  # a large vocabulary's would fill the cache
        untouched = (
            _log_softmax(model(input_ids=input_ids, use_cache=False).logits) if _changes else log_probability
        )
    probability, candidates = log_probability.exp().topk(
        min(NUM_CANDIDATES, log_probability.shape[-1]), dim=-1
    )
    divergence = (untouched.exp() * (untouched - log_probability)).sum(dim=-1).clamp(min=0)
    return Trace(
        capture=capture,
        loss=capture["tokens"]["loss"].to_numpy()[0].astype(np.float64),
        candidates=candidates.numpy(),
        probability=probability.double().numpy(),
        entropy=-(log_probability.exp() * log_probability).sum(dim=-1).double().numpy(),
        divergence=divergence.double().numpy(),
    )


def _log_softmax(logits: torch.Tensor | None) -> torch.Tensor:
    """[L, vocabulary] log-probabilities of the next token, of the only row of `logits`."""
    assert logits is not None
    return F.log_softmax(logits[0].float(), dim=-1).cpu()


def ask_for_prompt(loaded: LoadedModel, *, height: int = 130) -> str:
    """The prompt, which all pages share: typed, an example, or a file."""
    examples = {domain: texts[0] for domain, texts in read_sample_texts(loaded.directory).items()}

    def use_example() -> None:
        domain = st.session_state["example"]
        if domain is not None:
            ids = encode(loaded.tokenizer, examples[domain])[:EXAMPLE_TOKENS]
            pick(prompt="".join(token_texts(loaded.tokenizer, ids)))

    text = st.text_area(
        "Prompt", key=linked("prompt", None, FIRST_PROMPT), height=height,
        help="Ctrl+Enter, or a click elsewhere, runs it.",
    )  # fmt: skip
    left, right = st.columns([4, 1], vertical_alignment="bottom")
    with left:
        if examples:
            st.pills("Held-out examples", list(examples), key="example", on_change=use_example)
    with right, st.popover("From a file", width="stretch"):
        uploaded = st.file_uploader("A UTF-8 text file; it takes the place of the prompt", key="file")
        st.button("Use it", key="use-file", disabled=uploaded is None, on_click=_use_file)
    if problem := st.session_state.pop("prompt problem", None):
        st.error(problem, icon=":material/error:")
    return text


def _use_file() -> None:
    uploaded = st.session_state["file"]
    try:
        pick(prompt=decode_file(uploaded.name, uploaded.getvalue()))
    except ValueError as error:
        st.session_state["prompt problem"] = str(error)


def prompt_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """Token ids of the prompt that all pages share, on a page that does not ask for it.

    Raises:
        ValueError: see `encode`.
    """
    return encode(loaded.tokenizer, str(picked("prompt", FIRST_PROMPT)))


def describe_prompt(loaded: LoadedModel, ids: tuple[int, ...]) -> None:
    """One line under a heading: which text through which model the figures are drawn from."""
    changes = changes_in_force()
    state = f"with {', '.join(f'`{str(each)[:80]}`' for each in changes)}" if changes else "as it is"
    st.caption(f"Your prompt, {len(ids):,} tokens, through {loaded.name} {state}")
