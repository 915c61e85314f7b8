"""The study put to models whose memory is written by hand.

A question is two tokens, a word for the relation and a subject. In block 1, the query of subject s meets the half keys
of the address that is s's own; the row there is either the answer's direction in the residual stream or noise.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_lab.config import HydraConfig
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.nn.memory import MemoryPath
from hydra_lab.probing import Calibration, corrected
from hydra_lab.taps import Lookup
from probes.memory_recall.analysis import findings, is_shown
from probes.memory_recall.questions import Question
from probes.memory_recall.run import gather
from probes.memory_recall.settings import Settings

NUM_FACTS = 24
LAYER = 1
_RELATION, _NOTE = 1, 2
_FIRST_SUBJECT, _FIRST_ANSWER = 3, 3 + NUM_FACTS
_SETTINGS = Settings(
    num_questions=NUM_FACTS,
    num_notes=2,
    num_deleted=NUM_FACTS,
    num_addresses=1,
    num_edited=0,
    num_resamplings=999,
    batch_size=64,
)


def hand_built(seed: int, *, planted: bool) -> tuple[HydraForCausalLM, list[Question], list[int]]:
    """A model, its questions and the address of each.

    Args:
        planted: whether the row at a fact's address speaks for its answer; otherwise all rows are noise of that size.
    """
    torch.manual_seed(seed)
    config = HydraConfig.from_preset(
        "nano",
        vocab_size=_FIRST_ANSWER + NUM_FACTS,
        hidden_size=64,
        num_hidden_layers=2,
        attention_every=0,
        moe_layers=[],
        workspace_layers=[],
        memory_layers=[LAYER],
        memory_num_heads=1,
        memory_top_k=2,
    )
    model = HydraForCausalLM(config).eval()
    memory = model.model.blocks[LAYER].memory
    rng = random.Random(seed)
    subjects = list(range(_FIRST_SUBJECT, _FIRST_ANSWER))
    answers = rng.sample(range(_FIRST_ANSWER, _FIRST_ANSWER + NUM_FACTS), NUM_FACTS)
    addresses = rng.sample(range(int(np.prod(config.memory_num_keys))), NUM_FACTS)
    with torch.no_grad():
        embedding = model.get_parameter("model.embed_tokens.weight")
        embedding.normal_()
        _aim_queries(model, memory, subjects, addresses)
        memory.out_proj.weight.copy_(torch.eye(64))
        memory.values.normal_(std=1.0 if planted else 6.0)
        memory.gate.weight.normal_(std=0.02)
        if planted:
            memory.values[addresses] = 6.0 * embedding[answers]
            _close_gate_where_subject_was_named(model)
    return model, _questions(rng, subjects, answers, shuffled=not planted), addresses


def _aim_queries(
    model: HydraForCausalLM, memory: MemoryPath, subjects: list[int], addresses: list[int]
) -> None:
    """Write the query projection so that each subject meets the two half keys of its address."""
    _, n2 = model.config.memory_num_keys
    for keys in (memory.keys1, memory.keys2):
        keys.copy_(4.0 * F.normalize(keys, dim=-1))  # the softmax over what is read is sharp
    wanted = torch.cat(
        [
            memory.keys1[0, [address // n2 for address in addresses]],
            memory.keys2[0, [address % n2 for address in addresses]],
        ],
        dim=-1,
    )
    hidden = _hidden_of(model, subjects)
    memory.query_proj.weight.copy_(torch.linalg.lstsq(hidden, wanted).solution.T)


def _hidden_of(model: HydraForCausalLM, subjects: list[int]) -> Tensor:
    """[N, D] what the memory of block `LAYER` is given at each subject."""
    seen: list[Tensor] = []
    block = model.model.blocks[LAYER]

    def keep(_module: object, _inputs: object, hidden: Tensor) -> None:
        seen.append(hidden)

    handle = block.norm.register_forward_hook(keep)
    model(torch.tensor([[_RELATION, subject] for subject in subjects]), use_cache=False)
    handle.remove()
    return seen[0][:, -1]


def _questions(
    rng: random.Random, subjects: list[int], answers: list[int], *, shuffled: bool
) -> list[Question]:
    """Questions, each with notes of other facts and notes that name its own; `shuffled`: which is called which is
    chance."""
    facts = list(zip(subjects, answers, strict=True))
    questions: list[Question] = []
    for subject, answer in facts:
        first, second = rng.sample([fact for fact in facts if fact[0] != subject], 2)
        notes = [(_NOTE, *first, _NOTE, *second), (_NOTE, *first, _NOTE, subject, answer)]
        if shuffled:
            rng.shuffle(notes)
        questions.append(
            Question(
                relation="relation",
                asked=(_RELATION, subject),
                lacking=notes[0],
                holding=notes[1],
                answer=(answer,),
                text=f"{subject}: {answer}",
            )
        )
    return questions


def _close_gate_where_subject_was_named(model: HydraForCausalLM) -> None:
    """Make beta four times smaller at tokens that the context has named before, by hooks on the tap."""
    ids: list[Tensor] = []

    def note(_module: object, inputs: tuple[Tensor], _output: Tensor) -> None:
        ids[:] = [inputs[0]]

    def close(_module: object, _inputs: object, lookup: Lookup) -> Lookup:
        same_BLL = ids[0][:, :, None] == ids[0][:, None, :]
        named_BL = same_BLL.tril(diagonal=-1).any(dim=-1) & (ids[0] >= _FIRST_SUBJECT)
        return lookup._replace(gate=torch.where(named_BL[..., None], lookup.gate / 4, lookup.gate))

    model.get_submodule("model.embed_tokens").register_forward_hook(note)
    model.get_submodule(f"model.layers.{LAYER}.memory.lookup").register_forward_hook(close)


def finds_planted(seed: int) -> bool:
    """Whether beta, the cost of the cut and the deletion are claimed, and nearly every fact's address is named."""
    model, questions, addresses = hand_built(seed, planted=True)
    evidence = gather(model, questions, _SETTINGS)
    found = corrected(findings(evidence, num_resamplings=_SETTINGS.num_resamplings, seed=seed))
    by_name = {finding.name: finding for finding in found}
    beta = by_name[f"block {LAYER}: beta over the question, notes without the answer less notes with it"]
    claimed = (
        beta,
        by_name["closed book: cost of cutting the memory"],
        by_name["deletion: own addresses masked less those of another fact"],
    )
    named = evidence.deletion.addresses[LAYER][:, 0] == np.array(addresses)
    return all(each.is_claimed() for each in claimed) and beta.estimate > 0 and bool(named.mean() >= 0.9)


def claims_nothing_there(seed: int) -> bool:
    """Whether anything is claimed of a memory whose rows are noise."""
    model, questions, _ = hand_built(seed, planted=False)
    evidence = gather(model, questions, _SETTINGS)
    found = corrected(findings(evidence, num_resamplings=_SETTINGS.num_resamplings, seed=seed))
    return any(each.is_claimed() or (each.causal is not None and is_shown(each.causal)) for each in found)


CALIBRATION = Calibration(
    planted="each of 24 facts lies in one row of the memory, which its question reads",
    absent="the same rows hold noise, and which notes hold the answer is chance",
    sample_size="24 questions, 1 address each",
    finds_planted=finds_planted,
    claims_nothing_there=claims_nothing_there,
)
