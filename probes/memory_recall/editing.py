"""Facts edited in the memory: does the new answer hold where it was not edited in, and what else changes?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from hydra_lab.attribution import edit_fact
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM
from probes.memory_recall.measure import Bools, Floats, answers
from probes.memory_recall.questions import EditableFact, Question


@dataclass(frozen=True, eq=False)
class Editing:
    """What edits of M facts do.

    Attributes:
        facts: [M] what was edited.
        achieved: [M] whether the edited prompt is answered as edited.
        rise: [M, M] rise of the log-probability of fact j's new answer (column; its first token), asked fact i (row) in
            the phrasing that was not edited, when fact i is edited, nats.
        repeated: [M] whether the new answer, whole, is given in that phrasing.
        kept: [M] share of other questions, answered right before, that still are.
    """

    facts: tuple[EditableFact, ...]
    achieved: Bools
    rise: Floats
    repeated: Bools
    kept: Floats


def edit_all(
    model: HydraForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[EditableFact],
    others: Sequence[Question],
    *,
    layer: int,
    batch_size: int,
    progress: Callable[[str], None],
) -> Editing:
    """Edit each fact in turn in the memory of block `layer`; the model stays as it was.

    Args:
        others: questions about other facts, asked alone.
    """
    size = len(facts)
    rephrased = [fact.rephrased for fact in facts]
    before = answers(model, rephrased, "closed", batch_size=batch_size).log_probability
    right = answers(model, others, "closed", batch_size=batch_size).right
    achieved, repeated = np.zeros((2, size), dtype=bool)
    rise, kept = np.zeros((size, size)), np.full(size, np.nan)
    for index, fact in enumerate(facts):
        progress(f"editing fact {index + 1} of {size}: {fact.text}")
        with model_lock(model):
            edit = edit_fact(model, tokenizer, fact.prompt, fact.new_answer, layer=layer)
            achieved[index] = edit.achieved
            with edit.applied(model):
                after = answers(model, rephrased, "closed", batch_size=batch_size)
                still = answers(model, others, "closed", batch_size=batch_size).right
        rise[index] = (after.log_probability - before)[index]
        repeated[index] = after.right[index]
        if right.any():
            kept[index] = still[right].mean()
    return Editing(tuple(facts), achieved, rise, repeated, kept)
