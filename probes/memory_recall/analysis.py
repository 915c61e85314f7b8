"""From answers to findings: numpy only, so that it can be tested on data with a known answer.

Every test asks for more than "something changed": a memory of random rows changes every prediction a little. What it
adds must be right for *this* question and not for others of its relation, and a deletion must hit *this* fact and not
others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hydra_lab.metrics import mcnemar_p_value, mean_interval, pairing_test, sign_flip_p_value
from hydra_lab.probing import Effect, Finding, corrected
from probes.memory_recall.editing import Editing
from probes.memory_recall.measure import Answers, Deletion, Floats, Ints

FORM_NAMES = {"closed": "closed book", "lacking": "notes without the answer", "holding": "open book"}


@dataclass(frozen=True, eq=False)
class Evidence:
    """Everything that was measured.

    Attributes:
        layers: [Y] blocks with memory.
        relations: [N] index of each question's relation.
        whole, without: answers by form, with the memory and with it cut.
        deletion: of the first M questions.
        editing: None where no fact was edited.
    """

    layers: tuple[int, ...]
    relations: Ints
    whole: Mapping[str, Answers]
    without: Mapping[str, Answers]
    deletion: Deletion
    editing: Editing | None = None

    def cost(self, form: str) -> Floats:
        """[N] fall of the log-probability of each question's answer when the memory is cut, nats."""
        return np.diagonal(self.whole[form].log_probability - self.without[form].log_probability).copy()


Draft = tuple[Finding, Callable[[Finding], str]]
"""A finding, and what to say of it once its p-values are corrected."""


def findings(evidence: Evidence, *, num_resamplings: int, seed: int) -> tuple[Finding, ...]:
    """Every finding, with raw p-values; the sentences go by the corrected ones."""
    drafts = [_accuracy(evidence, form, num_resamplings, seed) for form in FORM_NAMES]
    drafts += [_cost(evidence, form, num_resamplings, seed) for form in ("closed", "holding")]
    for y in range(len(evidence.layers)):
        for form in _CONTRASTS:
            drafts += [_beta(evidence, y, form, field, num_resamplings, seed) for field in _PLACES]
    drafts.append(_deletion(evidence, num_resamplings, seed))
    if evidence.editing is not None:
        drafts.append(_editing(evidence.editing, num_resamplings, seed))
    made = [finding for finding, _ in drafts]
    return tuple(
        replace(finding, verdict=say(fixed))
        for finding, fixed, (_, say) in zip(made, corrected(made), drafts, strict=True)
    )


def _accuracy(evidence: Evidence, form: str, num_resamplings: int, seed: int) -> Draft:
    whole, without = evidence.whole[form], evidence.without[form]
    test = pairing_test(
        whole.hits.astype(float), evidence.relations, num_resamplings=num_resamplings, seed=seed
    )
    lost = whole.right.astype(float) - without.right
    effect = Effect(
        description="memory cut in every block: share of the questions that turn wrong less those that turn right",
        estimate=float(lost.mean()),
        unit="share of questions",
        interval=mean_interval(lost, num_resamplings=num_resamplings, seed=seed),
        p_value=mcnemar_p_value(whole.right, without.right),
    )
    name = FORM_NAMES[form]

    def say(fixed: Finding) -> str:
        known = (
            f"{name}: {_percent(fixed.estimate)} right"
            if fixed.is_claimed()
            else f"{name}: no evidence that the model knows the answers ({_percent(fixed.estimate)} right)"
        )
        assert fixed.causal is not None
        if is_shown(fixed.causal):
            return f"{known}; without the memory {_percent(fixed.causal.estimate)} of the questions are lost."
        return f"{known}; that cutting the memory loses answers is not shown."

    finding = Finding(
        name=f"{name}: accuracy",
        estimate=float(whole.right.mean()),
        unit="share of questions",
        interval=mean_interval(whole.right.astype(float), num_resamplings=num_resamplings, seed=seed),
        null="answers handed out at random among the questions of a relation (first tokens compared)",
        null_value=test.null_value,
        p_value=test.p_value,
        n=len(whole.right),
        n_unit="questions",
        verdict="",
        causal=effect,
    )
    return finding, say


def _cost(evidence: Evidence, form: str, num_resamplings: int, seed: int) -> Draft:
    own_N = evidence.cost(form)
    fall_NN = evidence.whole[form].log_odds - evidence.without[form].log_odds
    settings: dict[str, Any] = {"num_resamplings": num_resamplings, "seed": seed}
    # Both must fail for a claim: without a memory, no question is answered worse; every answer suffers as much. The
    # second alone would claim of answers that are certain either way: only the others' logits then move.
    test = pairing_test(fall_NN, evidence.relations, **settings)
    p_value = max(test.p_value, sign_flip_p_value(own_N, **settings))
    name = FORM_NAMES[form]

    def say(fixed: Finding) -> str:
        if fixed.is_claimed():
            return (
                f"{name}: the memory speaks for the right answer; without it the answer's log-probability falls by "
                f"{fixed.estimate:.3f} nats."
            )
        return f"{name}: cutting the memory is not shown to cost the right answer more than any other."

    finding = Finding(
        name=f"{name}: cost of cutting the memory",
        estimate=float(own_N.mean()),
        unit="nats",
        interval=mean_interval(own_N, **settings),
        null="the cut costs nothing; and the right answer no more than those to other questions of its relation, in "
        "log-odds (p is the larger one)",
        null_value=0.0,
        p_value=p_value,
        n=len(own_N),
        n_unit="questions",
        verdict="",
    )
    return finding, say


_CONTRASTS = {
    "closed": "closed book less open book",
    "lacking": "notes without the answer less notes with it",
}
"""What beta is compared between: as the paper says it, and with nothing but one note different.

Only the second is tested. A question alone and a question after notes differ in length and in all that the notes say,
so beta differs between them in a random model too."""
_PLACES = {"beta_asked": "over the question", "beta_answer": "at the answer"}


def _beta(evidence: Evidence, y: int, form: str, field: str, num_resamplings: int, seed: int) -> Draft:
    settings: dict[str, Any] = {"num_resamplings": num_resamplings, "seed": seed}
    layer, where, contrast = evidence.layers[y], _PLACES[field], _CONTRASTS[form]
    less_N, more_N = (getattr(evidence.whole[each], field)[y] for each in ("holding", form))
    difference_N = more_N - less_N
    tested = form == "lacking"
    effect = None
    if field == "beta_asked":
        dearer_N = evidence.cost(form) - evidence.cost("holding")
        effect = Effect(
            description=f"memory cut in every block: its cost to the right answer, {contrast}",
            estimate=float(dearer_N.mean()),
            unit="nats",
            interval=mean_interval(dearer_N, **settings),
            p_value=sign_flip_p_value(dearer_N, **settings) if tested else None,
        )

    def say(fixed: Finding) -> str:
        values = f"{more_N.mean():.3f} against {less_N.mean():.3f}"
        said = f"Block {layer}, beta {where}, {contrast.replace(' less ', ' against ')}: {values}"
        if not tested:
            return f"{said}. Not tested: the length of the context differs too."
        if not fixed.is_claimed():
            said += ", no evidence of a difference"
        elif fixed.estimate < 0:
            said += ", lower: against the claim"
        if fixed.causal is None:
            return f"{said}."
        if is_shown(fixed.causal):
            return f"{said}. Cutting the memory costs {fixed.causal.estimate:.2f} nats more there."
        return f"{said}. That cutting the memory costs more there is not shown."

    finding = Finding(
        name=f"block {layer}: beta {where}, {contrast}",
        estimate=float(difference_N.mean()),
        unit="beta",
        interval=mean_interval(difference_N, **settings),
        null="the two contexts swapped at random within each question"
        if tested
        else "no difference (not tested)",
        null_value=0.0,
        p_value=sign_flip_p_value(difference_N, two_sided=True, **settings) if tested else None,
        n=len(difference_N),
        n_unit="questions",
        verdict="",
        causal=effect,
        layer=layer,
    )
    return finding, say


def _deletion(evidence: Evidence, num_resamplings: int, seed: int) -> Draft:
    deletion = evidence.deletion
    size = len(deletion.drop)
    relations = evidence.relations[:size]
    settings: dict[str, Any] = {"num_resamplings": num_resamplings, "seed": seed}
    # Both must fail for a claim: any addresses would do as well; any answer suffers as much.
    other_addresses = pairing_test(deletion.drop.T, np.zeros(size, dtype=np.int64), **settings)
    other_answers = pairing_test(deletion.drop_of_answers, relations, **settings)
    elsewhere_N = (deletion.drop.sum(axis=0) - np.diagonal(deletion.drop)) / max(1, size - 1)
    own_N = np.diagonal(deletion.drop)
    whole = evidence.whole["closed"].right[:size]
    others = ~np.eye(size, dtype=bool)
    kept_elsewhere_N = np.where(others, deletion.right, False).sum(axis=0) / max(1, size - 1)
    lost_N = kept_elsewhere_N - np.diagonal(deletion.right)
    rows = next(iter(deletion.addresses.values())).shape[1]
    effect = Effect(
        description=f"its own {rows} addresses of a block masked, against another fact's: questions lost",
        estimate=float(lost_N.mean()),
        unit="share of questions",
        interval=mean_interval(lost_N, **settings),
    )

    def say(fixed: Finding) -> str:
        if fixed.is_claimed():
            return (
                f"The {rows} addresses that a question reads most serve its own fact: masking them costs its answer "
                f"{fixed.estimate:.2f} nats more than masking those of another question, and loses "
                f"{_percent(effect.estimate)} more of the questions."
            )
        return (
            f"Masking the {rows} addresses that a question reads most is not shown to remove its own fact rather than "
            "others."
        )

    finding = Finding(
        name="deletion: own addresses masked less those of another fact",
        estimate=float((own_N - elsewhere_N).mean()),
        unit="nats",
        interval=mean_interval(own_N - elsewhere_N, **settings),
        null="the addresses of facts handed out at random; and the answers within a relation, in log-odds "
        "(p is the larger one)",
        null_value=0.0,
        p_value=max(other_addresses.p_value, other_answers.p_value),
        n=size,
        n_unit=f"facts ({int(whole.sum())} of them known)",
        verdict="",
        causal=effect,
    )
    return finding, say


def _editing(editing: Editing, num_resamplings: int, seed: int) -> Draft:
    settings: dict[str, Any] = {"num_resamplings": num_resamplings, "seed": seed}
    size = len(editing.achieved)
    own_N = np.diagonal(editing.rise).copy()
    test = pairing_test(editing.rise, np.zeros(size, dtype=np.int64), **settings)
    lost_N = 1.0 - editing.kept
    effect = Effect(
        description="a fact edited: share of other facts, right before, that are no longer",
        estimate=float(lost_N.mean()),
        unit="share of questions",
        interval=mean_interval(lost_N, **settings),
    )

    def say(fixed: Finding) -> str:
        told = (
            f"{editing.achieved.sum()} of {size} edits hold in the phrasing that was edited, "
            f"{editing.repeated.sum()} in another one; an edit loses {100 * lost_N.mean():.1f}% of the other facts"
        )
        if fixed.is_claimed():
            return f"{told}. The new answer reaches the other phrasing of its own fact, not other facts' answers."
        return f"{told}. That the edit reaches the other phrasing is not shown."

    finding = Finding(
        name="editing: rise of the new answer in a phrasing that was not edited",
        estimate=float(own_N.mean()),
        unit="nats",
        interval=mean_interval(own_N, **settings),
        null="new answers handed out at random among the edits; and no rise (p is the larger one)",
        null_value=0.0,
        p_value=max(test.p_value, sign_flip_p_value(own_N, **settings)),
        n=size,
        n_unit="edited facts",
        verdict="",
        causal=effect,
    )
    return finding, say


def is_shown(effect: Effect) -> bool:
    """Whether the corrected p-value of an effect allows the claim."""
    return effect.p_corrected is not None and effect.p_corrected <= 0.05


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
