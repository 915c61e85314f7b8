"""What the study asks of the model: answers, slots, and answers with slots from another run.

Shape suffixes: N problems, B rows of a batch, C chunks, S slots, V slot size, Y blocks with a workspace.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_lab.capture import record
from hydra_lab.capture.path_use import batches
from hydra_lab.data.samples import samples_from_tokens
from hydra_lab.interventions import intervened
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM
from probes.workspace_tracing.problems import Problem

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Slots = dict[int, Tensor]
"""[B, C, S, V] fp32 by block: what the tokens of each chunk find in the slots."""


@contextmanager
def reading_slots(model: HydraForCausalLM, into: Slots) -> Iterator[None]:
    """Within the context, every forward pass leaves the slots of all blocks in `into`."""

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: object, inputs: tuple[Tensor]) -> None:
            into[layer] = inputs[0].detach().clone()

        return hook

    with ExitStack() as hooks:
        for layer in model.config.layers_with("workspace"):
            handle = _slots_input(model, layer).register_forward_pre_hook(keep(layer))
            hooks.callback(handle.remove)
        yield


@contextmanager
def with_slots_of(
    model: HydraForCausalLM, other: Slots, chosen: Mapping[int, Sequence[int]]
) -> Iterator[None]:
    """Within the context, tokens find in the `chosen` slots of each block what they held in another run.

    What is written goes on from the model's own slots: only reading is changed, and whatever follows from it.
    """

    def put(layer: int) -> Callable[..., tuple[Tensor]]:
        def hook(_module: object, inputs: tuple[Tensor]) -> tuple[Tensor]:
            slots_BCSV = inputs[0].clone()
            slots_BCSV[:, :, list(chosen[layer])] = other[layer][:, :, list(chosen[layer])]
            return (slots_BCSV,)

        return hook

    with ExitStack() as hooks:
        for layer in chosen:
            handle = _slots_input(model, layer).register_forward_pre_hook(put(layer))
            hooks.callback(handle.remove)
        yield


def _slots_input(model: HydraForCausalLM, layer: int) -> torch.nn.Module:
    """The module that receives the slots on their way to the tokens that read them."""
    return model.model.blocks[layer].workspace.slot_norm


@dataclass(frozen=True, eq=False)
class Baseline:
    """Runs of the three versions of each problem, nothing changed in the model.

    Attributes:
        contrast: [N] logit of the answer less that of the changed answer, version `tokens`.
        contrast_changed: [N] the same, version `changed`.
        hits: [N, N] whether the most likely token of problem i (row) is the answer of problem j (column).
        hits_changed: [N, N] the same for `changed` and the changed answers.
        content: [Y, N, S] distance of the slots that the last token finds in `tokens` and in `changed`, over their mean
            norm; 0 the same, about 1.4 unrelated.
        written: [Y, N, S] share of the slot, as the last token finds it, that was written from the premise's tokens.
        read: [Y, N, S] attention of the last token on the slot, times the read gate.
        lag: [N] tokens from the end of the premise's chunk, where it is written, to the last token.
    """

    contrast: Floats
    contrast_changed: Floats
    hits: Bools
    hits_changed: Bools
    content: Floats
    written: Floats
    read: Floats
    lag: NDArray[np.int64]

    @property
    def solved(self) -> Bools:
        """[N] whether both versions are answered right."""
        return np.diagonal(self.hits) & np.diagonal(self.hits_changed)


def baseline(model: HydraForCausalLM, problems: Sequence[Problem], *, batch_size: int) -> Baseline:
    """Run both versions of every problem and look at the slots."""
    config = model.config
    layers, num_slots, size = config.layers_with("workspace"), config.workspace_num_slots, len(problems)
    chunk = config.workspace_chunk_size
    contrast, contrast_changed = np.zeros((2, size))
    top, top_changed = np.zeros((2, size), dtype=np.int64)
    content, written, read = np.zeros((3, len(layers), size, num_slots))
    for rows in _groups(size, batch_size):
        group = [problems[row] for row in rows]
        slots: Slots = {}
        slots_changed: Slots = {}
        with model_lock(model), reading_slots(model, slots):
            ids, mask = _padded([problem.tokens for problem in group])
            recording = record(model, ids, mask, taps=["workspace.write", "workspace.read"])
        logits = _last(recording.logits, group)
        with reading_slots(model, slots_changed):
            logits_changed = _last_logits(model, [problem.changed for problem in group])
        contrast[rows], top[rows] = _contrast(logits, group), logits.argmax(dim=-1).cpu().numpy()
        contrast_changed[rows] = _contrast(logits_changed, group)
        top_changed[rows] = logits_changed.argmax(dim=-1).cpu().numpy()
        writes, reads = recording.by_layer("workspace.write"), recording.by_layer("workspace.read")
        for y, layer in enumerate(layers):
            for place, row in enumerate(rows):
                problem = group[place]
                end, asking = len(problem.tokens) - 1, (len(problem.tokens) - 1) // chunk
                pair = torch.stack([slots[layer][place, asking], slots_changed[layer][place, asking]])
                norm = torch.linalg.vector_norm(pair, dim=-1).mean(dim=0)
                apart = torch.linalg.vector_norm(pair[0] - pair[1], dim=-1)
                content[y, row] = (apart / norm).double().cpu().numpy()
                address, gate = writes[layer].address[place].double(), writes[layer].gate[place].double()
                written[y, row] = _written_share(address, gate, problem, chunk).cpu().numpy()
                found = reads[layer].address[place, end] * reads[layer].gate[place, end]
                read[y, row] = found.double().cpu().numpy()
    answers = np.array([problem.answer for problem in problems])
    changed = np.array([problem.changed_answer for problem in problems])
    lag = [len(each.tokens) - 1 - (each.premise[-1] // chunk + 1) * chunk for each in problems]
    return Baseline(
        contrast=contrast,
        contrast_changed=contrast_changed,
        hits=top[:, None] == answers,
        hits_changed=top_changed[:, None] == changed,
        content=content,
        written=written,
        read=read,
        lag=np.array(lag, dtype=np.int64),
    )


def _written_share(address_CST: Tensor, gate_CS: Tensor, problem: Problem, chunk_size: int) -> Tensor:
    """[S] share of each slot, as the last token finds it, that the premise's tokens wrote."""
    asking = (len(problem.tokens) - 1) // chunk_size
    total = torch.zeros_like(gate_CS[0])
    for place in problem.premise:
        c, t = divmod(place, chunk_size)
        kept = (1 - gate_CS[c + 1 : asking]).prod(dim=0)
        total = total + address_CST[c, :, t] * gate_CS[c] * kept
    return total


@dataclass(frozen=True)
class Patch:
    """Slots that are taken from another run: slots by block."""

    slots: tuple[tuple[int, tuple[int, ...]], ...]

    @classmethod
    def of(cls, slots: Mapping[int, Sequence[int]]) -> "Patch":
        """From slots by block."""
        return cls(tuple((layer, tuple(chosen)) for layer, chosen in slots.items()))


def patched(
    model: HydraForCausalLM,
    problems: Sequence[Problem],
    patches: Sequence[Patch],
    version: str,
    *,
    batch_size: int,
) -> Floats:
    """[P, N] contrast of every problem under each patch, with slots from its `version` ("changed" or "control")."""
    contrasts = np.zeros((len(patches), len(problems)))
    for rows in _groups(len(problems), batch_size):
        group = [problems[row] for row in rows]
        slots: Slots = {}
        with reading_slots(model, slots):
            _last_logits(model, [getattr(problem, version) for problem in group])
        for index, patch in enumerate(patches):
            with model_lock(model), with_slots_of(model, slots, dict(patch.slots)):
                logits = _last_logits(model, [problem.tokens for problem in group])
            contrasts[index, rows] = _contrast(logits, group)
    return contrasts


def cut(model: HydraForCausalLM, problems: Sequence[Problem], layer: int, *, batch_size: int) -> Floats:
    """[N] contrast of every problem with the workspace of one block cut."""
    contrasts = np.zeros(len(problems))
    with model_lock(model), intervened(model, f"workspace[{layer}].cut()"):
        for rows in _groups(len(problems), batch_size):
            group = [problems[row] for row in rows]
            contrasts[rows] = _contrast(_last_logits(model, [each.tokens for each in group]), group)
    return contrasts


def _groups(size: int, batch_size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, size, batch_size):
        yield np.arange(start, min(start + batch_size, size))


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    samples = samples_from_tokens(rows)
    ((_, input_ids, attention_mask),) = batches(samples, len(samples))
    return input_ids, attention_mask


def _last_logits(model: HydraForCausalLM, rows: Sequence[Sequence[int]]) -> Tensor:
    """[B, vocabulary] logits after each row's last token."""
    ids, mask = _padded(rows)
    with model_lock(model), torch.no_grad():
        logits = model(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
        ).logits
    last = (mask.sum(dim=1) - 1).to(logits.device)
    return logits[torch.arange(len(rows), device=logits.device), last].double()


def _last(logits_BLV: Tensor, group: Sequence[Problem]) -> Tensor:
    last = torch.tensor([len(problem.tokens) - 1 for problem in group], device=logits_BLV.device)
    return logits_BLV[torch.arange(len(group), device=logits_BLV.device), last].double()


def _contrast(logits_BV: Tensor, group: Sequence[Problem]) -> Floats:
    index = torch.tensor([[each.answer, each.changed_answer] for each in group], device=logits_BV.device)
    answer, changed = logits_BV.gather(1, index).T
    return (answer - changed).cpu().numpy()
