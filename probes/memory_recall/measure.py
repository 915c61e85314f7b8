"""What the study asks of the model: its answers, its gate beta and the addresses that it reads, whole and edited.

Shape suffixes: N questions, Y blocks with memory, R rows of the value table, B rows of a batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hydra_lab.capture import record
from hydra_lab.capture.path_use import batches
from hydra_lab.capture.record import Recording
from hydra_lab.data.samples import samples_from_tokens
from hydra_lab.interventions import intervened
from hydra_lab.locks import model_lock
from hydra_lab.metrics.arrays import weighted_counts
from hydra_lab.modeling import HydraForCausalLM
from probes.memory_recall.questions import Question

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

CUT = "memory[*].cut()"


@dataclass(frozen=True, eq=False)
class Answers:
    """What the model says to the questions in one form.

    Attributes:
        right: [N] whether every token of the answer is the most likely one after those before it.
        hits: [N, N] whether the most likely first token, asked question i (row), is that of question j's answer
            (column).
        log_probability: [N, N] log-probability, nats, that question i (row) gives to the first token of question j's
            answer (column), at the place of its own answer.
        beta_asked: [Y, N] mean gate of the memory over the question's tokens, 0..1.
        beta_answer: [Y, N] the gate where the answer's first token is predicted.
    """

    right: Bools
    hits: Bools
    log_probability: Floats
    beta_asked: Floats
    beta_answer: Floats

    @property
    def log_odds(self) -> Floats:
        """[N, N] the log of p / (1 - p) for those probabilities.

        To compare answers with each other: the log-probability of a likely answer hardly moves, that of an unlikely one
        moves as its logit does.
        """
        log_p = np.minimum(self.log_probability, -1e-15)
        return log_p - np.log(-np.expm1(log_p))


def answers(model: HydraForCausalLM, questions: Sequence[Question], form: str, *, batch_size: int) -> Answers:
    """Ask every question in one of the `FORMS`, with the true answer laid behind it."""
    size = len(questions)
    layers = model.config.layers_with("memory")
    right = np.zeros(size, dtype=bool)
    hits = np.zeros((size, size), dtype=bool)
    log_probability = np.zeros((size, size))
    beta_asked, beta_answer = np.zeros((2, len(layers), size))
    first = torch.tensor([question.answer[0] for question in questions])
    for rows, recording in _asked(model, questions, form, batch_size):
        gates = [lookup.gate[..., 0] for lookup in recording.by_layer("memory.lookup").values()]
        for row, index in enumerate(rows):
            question = questions[index]
            begin = len(question.prompt(form))
            place = slice(begin - 1, begin - 1 + len(question.answer))
            logits = recording.logits[row, place].float()
            likeliest = logits.argmax(dim=-1).cpu()
            right[index] = bool((likeliest == torch.tensor(question.answer)).all())
            hits[index] = (likeliest[0] == first).numpy()
            log_probability[index] = logits[0].double().log_softmax(dim=-1)[first].cpu().numpy()
            for y, gate_BL in enumerate(gates):
                beta_asked[y, index] = float(gate_BL[row, begin - len(question.asked) : begin].mean())
                beta_answer[y, index] = float(gate_BL[row, begin - 1])
    return Answers(right, hits, log_probability, beta_asked, beta_answer)


def answers_without_memory(
    model: HydraForCausalLM, questions: Sequence[Question], form: str, *, batch_size: int
) -> Answers:
    """The same with the memory of every block cut."""
    with model_lock(model), intervened(model, CUT):
        return answers(model, questions, form, batch_size=batch_size)


def read_mass(
    model: HydraForCausalLM, questions: Sequence[Question], *, batch_size: int
) -> dict[int, Floats]:
    """[N, R] by block: what each question, asked alone, takes from each row of the value table.

    The sum over the question's tokens and the heads of the row's weight times beta.
    """
    num_rows = int(np.prod(model.config.memory_num_keys))
    mass = {layer: np.zeros((len(questions), num_rows)) for layer in model.config.layers_with("memory")}
    for rows, recording in _asked(model, questions, "closed", batch_size):
        for layer, lookup in recording.by_layer("memory.lookup").items():
            addresses = lookup.addresses.cpu().numpy()
            weights = (lookup.weights * lookup.gate[..., None]).double().cpu().numpy()
            for row, index in enumerate(rows):
                asked = len(questions[index].asked)
                mass[layer][index] = weighted_counts(addresses[row, :asked], weights[row, :asked], num_rows)
    return mass


def own_addresses(mass: Mapping[int, Floats], count: int) -> dict[int, Ints]:
    """[N, count] by block: the rows that each question reads most, beyond what the questions read on average.

    Without "beyond", they would be the rows of the words that every question has.

    Raises:
        ValueError: a block has fewer rows.
    """
    chosen: dict[int, Ints] = {}
    for layer, mass_NR in mass.items():
        if count > mass_NR.shape[1]:
            raise ValueError(
                f"num_addresses={count} must be at most {mass_NR.shape[1]}, the rows of block {layer}"
            )
        excess_NR = mass_NR - mass_NR.mean(axis=0)
        chosen[layer] = np.argsort(-excess_NR, axis=1, kind="stable")[:, :count]
    return chosen


@dataclass(frozen=True, eq=False)
class Deletion:
    """What masking the addresses of one question does to every question, asked alone.

    Attributes:
        addresses: [N, count] by block, those of each question.
        drop: [N, N] fall of the log-probability of question i's own answer (column) when the addresses of question j
            (row) are masked, nats.
        drop_of_answers: [N, N] fall of the log-odds of question j's answer (column), asked question i (row), when the
            addresses of question i itself are masked, nats.
        right: [N, N] whether question i (column) is still answered right without the addresses of question j (row).
    """

    addresses: Mapping[int, Ints]
    drop: Floats
    drop_of_answers: Floats
    right: Bools


def delete(
    model: HydraForCausalLM,
    questions: Sequence[Question],
    addresses: Mapping[int, Ints],
    *,
    batch_size: int,
    progress: Callable[[str], None],
) -> Deletion:
    """Mask every question's addresses in turn and ask all of them."""
    size = len(questions)
    intact = answers(model, questions, "closed", batch_size=batch_size)
    drop, drop_of_answers = np.zeros((2, size, size))
    right = np.zeros((size, size), dtype=bool)
    for deleted in range(size):
        if deleted % 16 == 0:
            progress(f"deleting fact {deleted + 1} of {size}")
        masks = [
            f"memory[{layer}].mask(addresses={own[deleted].tolist()})" for layer, own in addresses.items()
        ]
        with model_lock(model), intervened(model, *masks):
            found = answers(model, questions, "closed", batch_size=batch_size)
        drop[deleted] = np.diagonal(intact.log_probability - found.log_probability)
        drop_of_answers[deleted] = (intact.log_odds - found.log_odds)[deleted]
        right[deleted] = found.right
    return Deletion(addresses, drop, drop_of_answers, right)


def _asked(
    model: HydraForCausalLM, questions: Sequence[Question], form: str, batch_size: int
) -> Iterator[tuple[Ints, Recording]]:
    rows = [question.prompt(form) + question.answer for question in questions]
    for indices, input_ids, attention_mask in batches(samples_from_tokens(rows), batch_size):
        yield indices, record(model, input_ids, attention_mask, taps="memory.lookup")
