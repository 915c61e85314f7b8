"""Edit a fact: write value rows of the product-key memory so that one prompt is answered otherwise, and see what else
changes.

Shape suffixes: B rows, L positions, H heads, K entries of the top-k, R edited rows, V value width, A tokens
of the answer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hydra_lab.attribution.rows import floats, ints
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.nn.memory import MemoryPath
from hydra_lab.taps import Lookup

BATCH_SIZE = 16
"""Sequences per forward pass of `specificity`."""


@dataclass(frozen=True, eq=False)
class FactEdit:
    """New value rows of a memory, and what they do to the prompt that they were made for.

    Axes: R edited rows, V value width.

    Attributes:
        prompt, answer: what was asked, and what is to follow.
        previous_answer: what the model said before: its likeliest tokens, as many as the answer has.
        layer: index of the block whose memory is edited.
        addresses: [R] rows, most read first.
        values: [R, V] their new content.
        previous_values: [R, V] what they held.
        read_weight: [R] weight with which the tokens that predict the answer read each row, summed over them and the
            heads.
        beta: the memory's gate, mean over those tokens.
        probability, previous_probability: of the whole answer after the prompt, with the edit and before it.
        achieved: whether every token of the answer is the likeliest with the edit.
        num_steps: steps that the optimiser took.
    """

    prompt: str
    answer: str
    previous_answer: str
    layer: int
    addresses: NDArray[np.int64]
    values: NDArray[np.float32]
    previous_values: NDArray[np.float32]
    read_weight: NDArray[np.float32]
    beta: float
    probability: float
    previous_probability: float
    achieved: bool
    num_steps: int

    @contextmanager
    def applied(self, model: HydraForCausalLM) -> Iterator[None]:
        """Within the context, `model` holds the new rows. A thread that shares it with others holds its lock."""
        table = model.model.blocks[self.layer].memory.values.data
        rows = torch.from_numpy(self.addresses).to(table.device)
        kept = table[rows].clone()
        table[rows] = torch.from_numpy(self.values).to(table)
        try:
            yield
        finally:
            table[rows] = kept


@dataclass(frozen=True)
class FactSpecificity:
    """What an edit changes besides the prompt that it was made for.

    Attributes:
        generality: share of the other phrasings that are answered as edited; NaN where none was given.
        num_phrasings: how many there were.
        num_others: other facts that were asked.
        others_right: how many of them were answered right before the edit.
        others_kept: how many of those still are.
        others_changed: of all of them, those whose likeliest next token is another.
        kl: mean over the tokens of the texts of the KL divergence of the next-token distribution with the edit from the
            one before it, nats; NaN where no text was given.
        num_tokens: tokens of the texts.
        num_readers: tokens of the texts that read at least one edited row.
        read_share: mean over the tokens of the texts of the share of their read weight that fell on edited rows, 0..1.
    """

    generality: float
    num_phrasings: int
    num_others: int
    others_right: int
    others_kept: int
    others_changed: int
    kl: float
    num_tokens: int
    num_readers: int
    read_share: float


def edit_fact(
    model: HydraForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    answer: str,
    *,
    layer: int | None = None,
    num_rows: int = 8,
    steps: int = 100,
    learning_rate: float = 0.1,
    penalty: float = 0.01,
    confidence: float = 0.6,
) -> FactEdit:
    """Find new value rows with which `answer` is the likeliest continuation of `prompt`. The model stays as it is.

        edit = edit_fact(model, tokenizer, "Q: capital of France? A:", " Rome")
        with edit.applied(model):
            ...

    The rows are those that the tokens which predict the answer read most. Adam changes them, and nothing else, to lower
    the answer's negative log-likelihood plus `penalty` times the mean squared relative change of a row.

    Args:
        prompt: ends where the answer begins.
        answer: with its leading space, as the model would write it.
        layer: block whose memory is edited; None for the first that has one.
        num_rows: rows to edit for each token of the answer.
        steps: most steps of the optimiser.
        learning_rate: in units of the root mean square of the table's values.
        penalty: weight of the change.
        confidence: stop when every token of the answer has this probability.

    Raises:
        ValueError: the model has no memory (in that block), or prompt or answer hold no token.
    """
    layer, path = _memory(model, layer)
    prompt_ids, answer_ids = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer))
    if not prompt_ids or not answer_ids:
        raise ValueError(f"prompt and answer need at least one token each, got {prompt!r} and {answer!r}")
    ids = torch.tensor([prompt_ids + answer_ids[:-1]], device=model.device)
    target_A = torch.tensor(answer_ids, device=model.device)
    with model_lock(model), _weights_frozen(model):
        with _lookups(path) as seen, torch.no_grad():
            before_AV = _predictions(model, ids, len(answer_ids))
        lookup = _last(seen[0], len(answer_ids))
        addresses_R, read_R = _most_read(lookup, num_rows)
        search = _Search(path, addresses_R)
        previous = before_AV.gather(1, target_A[:, None]).sum().exp()
        optimizer = torch.optim.Adam([search.change], lr=learning_rate)
        done = 0
        with search.added():
            for done in range(steps + 1):
                log_AV = _predictions(model, ids, len(answer_ids))
                log_A = log_AV.gather(1, target_A[:, None])[:, 0]
                if done == steps or bool((log_A.exp() >= confidence).all()):
                    break
                loss = -log_A.mean() + penalty * search.relative_change()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return FactEdit(
        prompt=prompt,
        answer=answer,
        previous_answer=str(tokenizer.decode(before_AV.argmax(dim=-1).tolist())),
        layer=layer,
        addresses=ints(addresses_R),
        values=floats(search.values()),
        previous_values=floats(path.values[addresses_R]),
        read_weight=floats(read_R),
        beta=float(lookup.gate.mean()),
        probability=float(log_A.detach().sum().exp()),
        previous_probability=float(previous),
        achieved=bool((log_AV.argmax(dim=-1) == target_A).all()),
        num_steps=done,
    )


def specificity(
    model: HydraForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    edit: FactEdit,
    *,
    phrasings: Sequence[str] = (),
    others: Sequence[tuple[str, str]] = (),
    texts: Sequence[str] = (),
    num_tokens: int = 512,
) -> FactSpecificity:
    """What `edit` changes elsewhere.

    Args:
        phrasings: other prompts that the edited answer should follow.
        others: prompts of other facts with their answers.
        texts: held-out texts.
        num_tokens: most tokens of a text.
    """
    asked = [(phrasing, edit.answer) for phrasing in phrasings]
    sequences = [tokenizer.encode(text, add_special_tokens=False)[:num_tokens] for text in texts]
    with model_lock(model):
        before, first_before = _answers(model, tokenizer, others)
        with edit.applied(model):
            general, _ = _answers(model, tokenizer, asked)
            after, first_after = _answers(model, tokenizer, others)
        divergence, readers, share = _changes(model, edit, sequences)
    tokens = sum(map(len, sequences))
    return FactSpecificity(
        generality=float(general.mean()) if asked else float("nan"),
        num_phrasings=len(asked),
        num_others=len(others),
        others_right=int(before.sum()),
        others_kept=int((before & after).sum()),
        others_changed=int((first_before != first_after).sum()),
        kl=divergence / tokens if tokens else float("nan"),
        num_tokens=tokens,
        num_readers=readers,
        read_share=share / tokens if tokens else float("nan"),
    )


class _Search:
    """The change of some rows of a memory, as a parameter that a path adds to what it reads."""

    def __init__(self, path: MemoryPath, addresses_R: Tensor) -> None:
        self.path, self.addresses_R = path, addresses_R
        self.previous_RV = path.values[addresses_R].detach().float()
        self.unit = float(path.values.detach().float().square().mean().sqrt())
        self.change = torch.zeros_like(self.previous_RV, requires_grad=True)

    def values(self) -> Tensor:
        """[R, V] the rows with their change."""
        return self.previous_RV + self.unit * self.change

    def relative_change(self) -> Tensor:
        """Mean over the rows of the squared length of the change, over that of an ordinary row."""
        return self.change.square().mean()

    @contextmanager
    def added(self) -> Iterator[None]:
        """Within the context, the path reads the changed rows: the read is linear in them, so their part is added."""

        def add(_module: Any, _args: Any, update_BLD: Tensor) -> Tensor:
            lookup = seen.pop()
            found_BLHKR = lookup.addresses[..., None] == self.addresses_R
            weight_BLR = (found_BLHKR * lookup.weights[..., None]).sum(dim=(2, 3))
            added_BLV = weight_BLR @ (self.unit * self.change)
            return update_BLD + self.path.out_proj(added_BLV.to(update_BLD.dtype)) * lookup.gate.to(
                update_BLD.dtype
            )

        with _lookups(self.path) as seen:
            handle = self.path.register_forward_hook(add)
            try:
                yield
            finally:
                handle.remove()


def _memory(model: HydraForCausalLM, layer: int | None) -> tuple[int, MemoryPath]:
    layers = model.config.layers_with("memory")
    if not layers:
        raise ValueError("this model has no memory to edit")
    layer = layers[0] if layer is None else layer
    if layer not in layers:
        raise ValueError(f"block {layer} has no memory; blocks {', '.join(map(str, layers))} have")
    return layer, model.model.blocks[layer].memory


@contextmanager
def _weights_frozen(model: HydraForCausalLM) -> Iterator[None]:
    """Within the context no weight asks for a gradient: the backward pass stops at the memory."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def _lookups(path: MemoryPath) -> Iterator[list[Lookup]]:
    """Within the context, every forward pass puts what the memory looked up into the list."""
    seen: list[Lookup] = []

    def keep(_module: Any, _args: Any, lookup: Lookup) -> None:
        seen.append(lookup)

    handle = path.lookup.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _predictions(model: HydraForCausalLM, ids: Tensor, size: int) -> Tensor:
    """[A, vocabulary] log-probabilities after the last `size` tokens of the only row."""
    return F.log_softmax(model(input_ids=ids, use_cache=False, logits_to_keep=size).logits[0].float(), dim=-1)


def _last(lookup: Lookup, size: int) -> Lookup:
    return Lookup(*(field[:, -size:] for field in lookup))


def _most_read(lookup: Lookup, num_rows: int) -> tuple[Tensor, Tensor]:
    """The rows that each of the tokens reads most, all together [R], and the weight that falls on each."""
    chosen: dict[int, None] = {}
    for addresses_HK, weights_HK in zip(lookup.addresses[0], lookup.weights[0], strict=True):
        rows, weight = _summed(addresses_HK, weights_HK)
        chosen |= dict.fromkeys(rows[weight.argsort(descending=True)[:num_rows]].tolist())
    rows, weight = _summed(lookup.addresses, lookup.weights)
    kept = torch.isin(rows, torch.tensor(list(chosen), device=rows.device))
    order = weight[kept].argsort(descending=True)
    return rows[kept][order], weight[kept][order]


def _summed(addresses: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct addresses, and the sum of the weights of each."""
    rows, index = addresses.flatten().unique(return_inverse=True)
    return rows, weights.new_zeros(len(rows)).index_add(0, index, weights.flatten())


def _batches(
    sequences: Sequence[Sequence[int]], device: torch.device
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Which sequences, their ids [B, L] padded on the right, and where a token is present [B, L]."""
    for first in range(0, len(sequences), BATCH_SIZE):
        which = slice(first, first + BATCH_SIZE)
        rows = [torch.tensor(sequence) for sequence in sequences[which]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        length = torch.tensor([len(row) for row in rows], device=device)
        yield which, ids, torch.arange(ids.shape[1], device=device) < length[:, None]


@torch.no_grad()
def _answers(
    model: HydraForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: Sequence[tuple[str, str]]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Whether each answer's tokens are all the likeliest after the prompt, and the likeliest first token."""
    encoded = [[tokenizer.encode(text, add_special_tokens=False) for text in pair] for pair in questions]
    right, first = np.zeros(len(encoded), dtype=bool), np.zeros(len(encoded), dtype=np.int64)
    row = 0
    for which, ids, present in _batches([prompt + answer for prompt, answer in encoded], model.device):
        likeliest_BL = model(input_ids=ids, attention_mask=present.long(), use_cache=False).logits.argmax(
            dim=-1
        )
        for (prompt, answer), likeliest in zip(encoded[which], likeliest_BL.tolist(), strict=True):
            said = likeliest[len(prompt) - 1 : len(prompt) + len(answer) - 1]
            right[row], first[row] = said == answer, said[0]
            row += 1
    return right, first


@torch.no_grad()
def _changes(
    model: HydraForCausalLM, edit: FactEdit, sequences: Sequence[Sequence[int]]
) -> tuple[float, int, float]:
    """Summed over all tokens: KL divergence, how many read an edited row, and the share of their reads."""
    path = model.model.blocks[edit.layer].memory
    edited = torch.from_numpy(edit.addresses).to(model.device)
    divergence, readers, share = 0.0, 0, 0.0
    for _, ids, present in _batches(sequences, model.device):
        inputs = {"input_ids": ids, "attention_mask": present.long(), "use_cache": False}
        with _lookups(path) as seen:
            before = F.log_softmax(model(**inputs).logits.float(), dim=-1)
        with edit.applied(model):
            after = F.log_softmax(model(**inputs).logits.float(), dim=-1)
        divergence += float((before.exp() * (before - after)).sum(dim=-1)[present].sum())
        hit_BLHK = torch.isin(seen[0].addresses, edited)
        readers += int(hit_BLHK.flatten(2).any(dim=-1)[present].sum())
        share += float((hit_BLHK * seen[0].weights).sum(dim=-1).mean(dim=-1)[present].sum())
    return divergence, readers, share
