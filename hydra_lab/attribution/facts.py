"""Edit a fact: write value rows of the product-key memory so that one prompt is answered otherwise, and see what else
changes.

In the shipped model (python -m tests.attribution.fact_editing: 20 known facts get the answer of another one, 16 rows
each) 19 edits are answered as asked and 12 in another phrasing too; of 85 other facts that it knows 99.7% stay, of the
20 nearest ones (same subject, names that begin alike) 97%; held-out text moves by 0.0005 nats a token. Such an edit
acts at the subject's name, where the gate is open; a fact whose prompt hardly opens it needs rows several times their
old length, and holds less often in another phrasing.

Shape suffixes: B rows, L positions, H heads, K entries of the top-k, R edited rows, V value width, A tokens of the
answer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hydra_lab.attribution.rows import floats, ints
from hydra_lab.interventions import EditValue, intervened
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.nn.memory import MemoryPath
from hydra_lab.taps import Lookup

BATCH_SIZE = 16
"""Sequences per forward pass of `specificity`."""


@dataclass(frozen=True, eq=False)
class FactEdit:
    """New value rows of a memory, and what they do to the prompt that they were made for.

    Axes: R edited rows, V value width, T tokens of the prompt.

    Attributes:
        prompt, answer: what was asked, and what is to follow.
        previous_answer: what the model said before, greedily, as many tokens as the answer has.
        layer: index of the block whose memory is edited.
        addresses: [R] rows, most read first.
        values: [R, V] their new content.
        previous_values: [R, V] what they held.
        tokens: [T] of the prompt.
        reads: [T, R] weight with which each of them reads each row, summed over the heads, times beta.
        beta: [T] the memory's gate.
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
    tokens: NDArray[np.int64]
    reads: NDArray[np.float32]
    beta: NDArray[np.float32]
    probability: float
    previous_probability: float
    achieved: bool
    num_steps: int

    def interventions(self) -> tuple[EditValue, ...]:
        """The edit in the vocabulary of `hydra_lab.interventions`, to combine with others or to write to a file."""
        pairs = zip(self.addresses.tolist(), self.values.tolist(), strict=True)
        return tuple(EditValue(block=self.layer, address=address, value=value) for address, value in pairs)

    @contextmanager
    def applied(self, model: HydraForCausalLM) -> Iterator[None]:
        """Within the context, `model` holds the new rows; afterwards it is what it was."""
        with intervened(model, *self.interventions()):
            yield


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
    num_rows: int = 16,
    steps: int = 100,
    learning_rate: float = 0.3,
    penalty: float = 0.001,
    confidence: float = 0.6,
) -> FactEdit:
    """Find new value rows with which `answer` is the likeliest continuation of `prompt`. The model stays as it is.

        edit = edit_fact(model, tokenizer, "Q: capital of France? A:", " Rome")
        with edit.applied(model):
            ...

    The rows are those that the tokens of the prompt read most, weight times gate: the gate is often open at the
    subject's name and nearly shut where the answer is predicted. Adam changes them, and nothing else, to lower the
    answer's negative log-likelihood plus `penalty` times the mean squared relative change of a row.

    Args:
        prompt: ends where the answer begins.
        answer: with its leading space, as the model would write it.
        layer: block whose memory is edited; None for the first that has one.
        num_rows: rows to edit, R.
        steps: most steps of the optimiser.
        learning_rate: in units of the root mean square of the table's values.
        penalty: weight of the change.
        confidence: stop when every token of the answer has this probability.

    Raises:
        ValueError: the model has no memory (in that block) or it is switched off, or prompt or answer hold no token.
    """
    layer, path = _memory(model, layer)
    prompt_ids, answer_ids = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer))
    if not prompt_ids or not answer_ids:
        raise ValueError(f"prompt and answer need at least one token each, got {prompt!r} and {answer!r}")
    ids = torch.tensor([prompt_ids + answer_ids[:-1]], device=model.device)
    target_A = torch.tensor(answer_ids, device=model.device)
    with model_lock(model), _weights_frozen(model), torch.enable_grad():
        with _lookups(path) as seen, torch.no_grad():
            before_AV = _predictions(model, ids, len(answer_ids))
        if not seen:
            raise ValueError(f"the memory of block {layer} is switched off (set_path_scale)")
        previous_answer = str(tokenizer.decode(_greedy(model, prompt_ids, len(answer_ids))))
        prompt_reads = Lookup(*(field[:, : len(prompt_ids)] for field in seen[0]))
        addresses_R, reads_TR = _most_read(prompt_reads, num_rows)
        search = _Search(path, addresses_R, reads_TR)
        optimizer = torch.optim.Adam([search.shift_TV], lr=learning_rate)
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
        previous_answer=previous_answer,
        layer=layer,
        addresses=ints(addresses_R),
        values=floats(search.previous_RV + search.change()),
        previous_values=floats(search.previous_RV),
        reads=floats(reads_TR),
        tokens=ints(ids[0, : len(prompt_ids)]),
        beta=floats(prompt_reads.gate[0, :, 0]),
        probability=float(log_A.detach().sum().exp()),
        previous_probability=float(before_AV.gather(1, target_A[:, None]).sum().exp()),
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
    """The change of some rows of a memory, as what a path adds to what it reads.

    The change is `reads^T shift`: a token's shift is shared out over the rows as the token reads them. Of all changes
    with the same effect on those tokens that is the smallest.
    """

    def __init__(self, path: MemoryPath, addresses_R: Tensor, reads_TR: Tensor) -> None:
        self.path, self.addresses_R = path, addresses_R
        self.previous_RV = path.values[addresses_R].detach().float()
        self.unit = float(path.values.detach().float().square().mean().sqrt())
        self.share_RT = reads_TR.T / torch.linalg.matrix_norm(reads_TR, 2).square()
        self.shift_TV = torch.zeros(
            len(reads_TR), self.previous_RV.shape[1], device=reads_TR.device, requires_grad=True
        )

    def change(self) -> Tensor:
        """[R, V] what is added to each row."""
        return self.unit * (self.share_RT @ self.shift_TV)

    def relative_change(self) -> Tensor:
        """Mean over the rows of the squared length of the change, over that of an ordinary row."""
        return (self.change() / self.unit).square().mean()

    @contextmanager
    def added(self) -> Iterator[None]:
        """Within the context, the path reads the changed rows: the read is linear in them, so their part is added."""

        def add(_module: Any, _args: Any, update_BLD: Tensor) -> Tensor:
            lookup = seen.pop()
            added_BLV = _weights_on(lookup, self.addresses_R) @ self.change()
            added_BLD = self.path.out_proj(added_BLV.to(update_BLD.dtype))
            return update_BLD + added_BLD * lookup.gate.to(update_BLD.dtype)

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


def _greedy(model: HydraForCausalLM, prompt: Sequence[int], size: int) -> list[int]:
    """The `size` tokens that the model goes on with."""
    ids = torch.tensor([list(prompt)], device=model.device)
    generate = cast(Any, model).generate
    return generate(ids, max_new_tokens=size, min_new_tokens=size, do_sample=False)[0, len(prompt) :].tolist()


def _most_read(lookup: Lookup, num_rows: int) -> tuple[Tensor, Tensor]:
    """The rows [R] that the only row of tokens reads most, weight times gate summed over heads and tokens, best first;
    and how much of each every token reads [T, R]."""
    scores = (lookup.weights * lookup.gate[..., None]).flatten()
    rows, index = lookup.addresses.flatten().unique(return_inverse=True)
    total = scores.new_zeros(len(rows)).index_add(0, index, scores)
    addresses_R = rows[total.argsort(descending=True)[:num_rows]]
    return addresses_R, (_weights_on(lookup, addresses_R) * lookup.gate)[0]


def _weights_on(lookup: Lookup, addresses_R: Tensor) -> Tensor:
    """[B, L, R] weight with which each token reads each of the addresses, summed over the heads."""
    found_BLHKR = lookup.addresses[..., None] == addresses_R
    return (found_BLHKR * lookup.weights[..., None]).sum(dim=(2, 3))


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
