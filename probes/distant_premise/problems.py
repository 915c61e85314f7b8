"""Recall problems whose pairs lie at the same places, so that one intervention fits all of them."""

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hydra_lab.data.names import invent_name
from hydra_lab.data.samples import Samples
from hydra_lab.data.tasks import FILLER, VALUES, query

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Problems:
    """N problems of P pairs, A of which are asked for.

    Attributes:
        given: [N, L] token ids up to the end of the pairs.
        filler: [N, F] what may follow, as far as the largest distance.
        questions: [N, A, T] token ids of each question; the answer comes next.
        values: [N, P] token id of each pair's value, in the order of the pairs.
        asked: [A] which pairs are asked for.
        place: [A] index in `given` of the value of each asked pair, the same in every problem.
    """

    given: Tensor
    filler: Tensor
    questions: Tensor
    values: Ints
    asked: Ints
    place: Ints


def make_problems(
    tokenizer: PreTrainedTokenizerBase,
    samples: Samples,
    *,
    num_problems: int,
    num_pairs: int,
    num_questions: int,
    largest_distance: int,
    lead: int,
    seed: int,
) -> Problems:
    """Problems in the words of `hydra_lab.data.tasks`, each after `lead` tokens of another text.

    The other text keeps the pairs out of block 0, which every query sees. Names are invented and all of the
    same number of tokens, the most frequent one, so that every problem has its pairs at the same places.

    Raises:
        ValueError: the tokenizer does not keep the values whole, there are more pairs than values, or no sample is
            long enough to lead.
    """
    if num_pairs > len(VALUES):
        raise ValueError(f"num_pairs={num_pairs} must be at most {len(VALUES)}, the number of values")
    broken = [value for value in VALUES if len(_ids(tokenizer, value)) != 1]
    if broken:
        raise ValueError(
            f"the tokenizer splits the value {broken[0]!r}; recall problems need values of one token"
        )
    leaders = np.flatnonzero(samples.length >= lead - 1)
    if len(leaders) == 0:
        raise ValueError(f"no sample has the {lead - 1} tokens that come before a problem")
    rng = random.Random(seed)
    name_size = Counter(len(_ids(tokenizer, f" {invent_name(rng)}")) for _ in range(200)).most_common(1)[0][0]
    filler_ids = [_ids(tokenizer, word)[0] for word in FILLER]
    asked = np.linspace(0, num_pairs - 1, num_questions).round().astype(np.int64)

    given: list[list[int]] = []
    questions: list[list[list[int]]] = []
    values: list[list[int]] = []
    filler: list[list[int]] = []
    places: list[list[int]] = []
    for _ in range(num_problems):
        names: list[str] = []
        while len(names) < num_pairs:
            name = f" {invent_name(rng)}"
            if name not in names and len(_ids(tokenizer, name)) == name_size:
                names.append(name)
        drawn = rng.sample(VALUES, num_pairs)
        text = [*samples.tokens[rng.choice(leaders.tolist()), : lead - 1].tolist(), tokenizer.eos_token_id]
        text += _ids(tokenizer, "recall:")
        places.append([])
        for name, value in zip(names, drawn, strict=True):
            text += _ids(tokenizer, f"{name} =")
            places[-1].append(len(text))
            text += _ids(tokenizer, f"{value};")
        given.append(text)
        values.append([_ids(tokenizer, value)[0] for value in drawn])
        questions.append([_ids(tokenizer, query(names[pair])) for pair in asked])
        filler.append(rng.choices(filler_ids, k=largest_distance))
    assert all(each == places[0] for each in places)
    return Problems(
        given=torch.tensor(given),
        filler=torch.tensor(filler),
        questions=torch.tensor(questions),
        values=np.array(values, dtype=np.int64),
        asked=asked,
        place=np.array(places[0], dtype=np.int64)[asked],
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
