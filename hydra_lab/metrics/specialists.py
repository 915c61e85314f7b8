"""Whether experts serve some kinds of text or token more than others.

See `hydra_lab.metrics.arrays` for the shape suffixes; A is a number of labels (domains or token classes). What these
metrics show is correlation in one sample of text; `hydra_lab.metrics.information` tests it against chance.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from hydra_lab.metrics.arrays import FloatArray, IntArray, ratio
from hydra_lab.metrics.routing import ExpertByDomain
from hydra_lab.metrics.routing_counts import Routing, counts_of

TOKEN_CLASSES = ("word", "word piece", "digit", "punctuation", "white space", "special")
"""A word starts with a space and has letters; a word piece has letters alone."""


def token_classes(texts: Sequence[str], special: Collection[int] = ()) -> IntArray:
    """[T] class of each token id, an index of `TOKEN_CLASSES`.

    Args:
        texts: the text of each token id, 0..T-1.
        special: ids of the special tokens.
    """
    names = ["special" if token in special else _class_of(text) for token, text in enumerate(texts)]
    return np.array([TOKEN_CLASSES.index(name) for name in names], dtype=np.int64)


def _class_of(text: str) -> str:
    if any(character.isdigit() for character in text):
        return "digit"
    if any(character.isalpha() for character in text):
        return "word" if text[0].isspace() else "word piece"
    return "white space" if text.isspace() else "punctuation"


@dataclass(frozen=True, eq=False)
class ExpertByTokenClass:
    """Which experts serve each class of token.

    A chunk's tokens share their experts, so classes can differ only as far as chunks differ in what they hold.

    Attributes:
        layers: [Y] indices of the blocks.
        classes: [A] names of the classes that occur.
        share: [Y, A, E] share of the choices made for the class's tokens that fall on the expert; sums to 1 over E.
        lift: [Y, A, E] log2 of `share` over its unweighted mean over the classes: 0 no preference, 1 twice the
            mean, -inf never chosen there, NaN chosen nowhere.
        num_tokens: [A] tokens of the class.
        num_samples: samples they come from.
    """

    layers: tuple[int, ...]
    classes: tuple[str, ...]
    share: FloatArray
    lift: FloatArray
    num_tokens: IntArray
    num_samples: int


def expert_by_token_class(
    routing: Routing, classes: IntArray, names: Sequence[str] = TOKEN_CLASSES
) -> ExpertByTokenClass:
    """Share of each expert in the choices made for each class of token; see `ExpertByTokenClass`.

    With the ids themselves as classes this is the vocabulary specialization of OLMoE (arXiv 2409.02060).

    Args:
        classes: [T] class of each token id, an index of `names` (see `token_classes`); -1: left out.
        names: [A] names of the classes.

    Raises:
        ValueError: the routing does not count tokens, a token id has no class, or a class no name.
    """
    counts = counts_of(routing)
    if counts.token_choices is None:
        raise ValueError("expert_by_token_class needs the token ids of the routing; this routing has none")
    choices_YET = counts.token_choices
    num_ids = int(np.flatnonzero(choices_YET.sum(axis=(0, 1))).max(initial=-1)) + 1
    if num_ids > len(classes):
        raise ValueError(f"token id {num_ids - 1} occurs, but classes has {len(classes)} entries")
    if len(classes) and int(classes.max()) >= len(names):
        raise ValueError(f"classes holds {classes.max()}, but there are {len(names)} names")
    member_TA = (classes[:num_ids, None] == np.arange(len(names))).astype(np.int64)
    choices_YEA = choices_YET[..., :num_ids] @ member_TA
    present: list[int] = np.flatnonzero(choices_YEA.sum(axis=(0, 1))).tolist()
    choices_YAE = choices_YEA[..., present].swapaxes(1, 2)
    share = ratio(choices_YAE.astype(np.float64), choices_YAE.sum(axis=-1, keepdims=True).astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = np.log2(share / share.mean(axis=1, keepdims=True))
    return ExpertByTokenClass(
        layers=counts.layers,
        classes=tuple(names[a] for a in present),
        share=share,
        lift=lift,
        num_tokens=choices_YAE[0].sum(axis=-1) // counts.top_k,
        num_samples=int(counts.num_samples.sum()),
    )


@dataclass(frozen=True, eq=False)
class Specialization:
    """How much the choice of an expert says about the kind of text or token that it serves.

    Were each of the A labels (domains or token classes) as common as the others, an expert would serve label a with
    p(a | e), its share of the label's choices over the sum of its shares. The score of an expert is that
    distribution's divergence from the even one, relative to its largest value:
    sum_a p(a | e) ln(A p(a | e)) / ln A; 0: it serves all labels alike, 1: a single one. (The specific information
    of DeWeese & Meister 1999.) A block's score is its experts' mean, weighted by their load: the mutual information
    of expert and label over ln A. The labels' sizes do not matter, so neither does the make-up of the sample.

    Attributes:
        layers: [Y] indices of the blocks.
        labels: [A] domains or token classes that have choices.
        kind: "domain" or "token class".
        score: [Y, E] score of each expert, 0..1; NaN where it was never chosen.
        favourite: [Y, E] index of the label that it serves most; -1 where it was never chosen.
        block: [Y] score of the block, 0..1.
        bias: [Y] what a block without any dependence would score at this many chunks or tokens, were they independent:
            (E - 1)(A - 1) / (2 A ln A) times the mean of 1/n over the labels (Miller 1955). Those of a sample are not
            independent, so more than this is to be expected of chance.
        num_choices: [A] chunks or tokens of each label, n.
        num_samples: samples they come from.
    """

    layers: tuple[int, ...]
    labels: tuple[str, ...]
    kind: str
    score: FloatArray
    favourite: IntArray
    block: FloatArray
    bias: FloatArray
    num_choices: IntArray
    num_samples: int


def specialization(experts: ExpertByDomain | ExpertByTokenClass) -> Specialization:
    """Score of each expert and block for its dependence on domains or token classes; see `Specialization`.

    Raises:
        ValueError: there are fewer than two labels.
    """
    if isinstance(experts, ExpertByDomain):
        kind, labels, number_A = "domain", experts.domains, experts.num_chunks
    else:
        kind, labels, number_A = "token class", experts.classes, experts.num_tokens
    seen: list[int] = np.flatnonzero(number_A).tolist()
    labels, number_A, share_YAE = tuple(labels[a] for a in seen), number_A[seen], experts.share[:, seen]
    num_labels, num_experts = len(labels), experts.share.shape[-1]
    if num_labels < 2:
        raise ValueError(f"specialization needs choices for two {kind}s or more, there are {num_labels}")
    load_YE = share_YAE.mean(axis=1)
    label_YAE = ratio(share_YAE, num_labels * load_YE[:, None])
    used_YE = load_YE > 0
    log = np.log(num_labels * label_YAE, out=np.zeros_like(label_YAE), where=label_YAE > 0)
    score_YE = np.where(used_YE, (np.nan_to_num(label_YAE) * log).sum(axis=1) / np.log(num_labels), np.nan)
    bias = (
        (num_experts - 1) * (num_labels - 1) / (2 * num_labels * np.log(num_labels)) * np.mean(1 / number_A)
    )
    return Specialization(
        layers=experts.layers,
        labels=labels,
        kind=kind,
        score=np.where(used_YE, np.clip(score_YE, 0.0, 1.0), np.nan),
        favourite=np.where(used_YE, np.nan_to_num(label_YAE, nan=-1.0).argmax(axis=1), -1),
        block=(load_YE * np.nan_to_num(score_YE)).sum(axis=-1),
        bias=np.full(len(experts.layers), bias),
        num_choices=number_A,
        num_samples=int(np.sum(experts.num_samples)),
    )
