"""One prompt through the model, as it is and with one thing changed."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import streamlit as st
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dashboards.shared.sources import LoadedModel
from hydra_lab.capture.in_memory import InMemoryCapture, capture_batch
from hydra_lab.interventions import AblateExpert, CutPath, ForceExperts, Intervention, intervened
from hydra_lab.locks import model_lock
from hydra_lab.metrics.text import NextTokens

MAX_BYTES = 1_000_000
MAX_TOKENS = 4096
NUM_CANDIDATES = 10
"""Next tokens that are kept per position."""


@dataclass(frozen=True)
class Change:
    """One intervention.

    Attributes:
        kind: "none", "ablate", "force" or "cut".
        layer: block of the expert, or the one block where the path is cut; None cuts it everywhere.
        expert: for "ablate" and "force".
        path: for "cut".
    """

    kind: str = "none"
    layer: int | None = None
    expert: int | None = None
    path: str | None = None

    @property
    def title(self) -> str:
        """Heading of the changed run."""
        if self.kind == "cut":
            return f"Without the {self.path} path in " + (
                "every block" if self.layer is None else f"block {self.layer}"
            )
        verb = {"ablate": "Without expert", "force": "Only expert"}[self.kind]
        return f"{verb} {self.expert} in block {self.layer}"

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """What to run the model with."""
        if self.kind == "none":
            return ()
        if self.kind == "cut":
            assert self.path is not None
            return (CutPath(path=self.path, block="*" if self.layer is None else self.layer),)
        assert self.layer is not None and self.expert is not None
        kind = {"ablate": AblateExpert, "force": ForceExperts}[self.kind]
        return (kind(block=self.layer, expert=self.expert),)


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


def trace(loaded: LoadedModel, ids: tuple[int, ...], change: Change) -> Trace:
    """Run `ids` through the model under `change`; the last few results are kept."""
    return _trace(loaded.weights_hash, ids, change, loaded)


@st.cache_data(max_entries=8, show_spinner="Running the model …")
def _trace(weights_hash: str, ids: tuple[int, ...], change: Change, _loaded: LoadedModel) -> Trace:
    model = _loaded.model
    input_ids = torch.tensor([ids])
    with model_lock(model), torch.no_grad():
        with intervened(model, *change.interventions):
            capture = capture_batch(model, input_ids)
            log_probability = _log_probabilities(model, input_ids)
        untouched = log_probability if change.kind == "none" else _log_probabilities(model, input_ids)
    probability, candidates = log_probability.exp().topk(
        min(NUM_CANDIDATES, log_probability.shape[-1]), dim=-1
    )
    return Trace(
        capture=capture,
        loss=capture["tokens"]["loss"].to_numpy()[0].astype(np.float64),
        candidates=candidates.numpy(),
        probability=probability.double().numpy(),
        entropy=-(log_probability.exp() * log_probability).sum(dim=-1).double().numpy(),
        divergence=(untouched.exp() * (untouched - log_probability))
        .sum(dim=-1)
        .clamp(min=0)
        .double()
        .numpy(),
    )


def _log_probabilities(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """[L, vocabulary] log-probabilities of the next token."""
    logits = model(input_ids=input_ids.to(model.device), use_cache=False).logits
    return F.log_softmax(logits[0].float(), dim=-1).cpu()
