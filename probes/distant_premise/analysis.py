"""From answers to evidence: numpy only, so that it can be tested on data with a known answer.

Shape suffixes: N problems, A questions, P pairs, H key-value heads, K selected blocks, W permutations.
"""

import numpy as np
from numpy.typing import NDArray

from hydra_lab.metrics import PairingTest, mean_interval, pairing_test, sign_flip_p_value
from hydra_lab.probing import Effect, Finding
from probes.distant_premise.measure import CUT, FORCED, OTHER_STATE, Answers, Floats, Ints, forbidden


def findings(answers: list[Answers], asked: Ints, *, num_resamplings: int, seed: int) -> tuple[Finding, ...]:
    """What the study claims at every distance.

    Args:
        asked: [A] which pair each question asks for.
    """
    resampling = {"num_resamplings": num_resamplings, "seed": seed}
    found: list[Finding] = []
    for each in answers:
        found.append(_accuracy(each, asked, resampling))
        found += [_hits(each, y, asked, resampling) for y in range(len(each.layers)) if is_selectable(each)]
        found.append(_changed(each, FORCED, asked, resampling))
        found.append(_changed(each, OTHER_STATE, asked, resampling))
    return tuple(found)


def is_selectable(answers: Answers) -> bool:
    """Whether the block of every asked pair lies beyond sink and window, so that only a selection shows it."""
    return bool((answers.premise >= 1).all() and (answers.premise <= answers.num_candidates).all())


def is_right(score_NAP: Floats, asked: Ints) -> NDArray[np.bool_]:
    """[N, A] whether the right one of the problem's values is the most probable of them."""
    return score_NAP.argmax(axis=-1) == asked


def margin(score_NAP: Floats, asked: Ints) -> Floats:
    """[N, A] score of the right value less the mean score of the others, nats.

    A change of it says that the right value gained on the others. Its own log-probability would fall under
    any disturbance, since noise on the scores of a guess makes one of them win.
    """
    right_NA = score_NAP[:, np.arange(len(asked)), asked]
    return (right_NA - score_NAP.mean(axis=-1)) * score_NAP.shape[-1] / (score_NAP.shape[-1] - 1)


def hits(answers: Answers, y: int) -> NDArray[np.bool_]:
    """[N, A, A] whether a head of the y-th block with attention, asked question a, selects the block of question b's
    pair."""
    selected_NAK = answers.selected[y].reshape(*answers.selected[y].shape[:2], -1)
    return (selected_NAK[:, :, None, :] == answers.premise[:, None]).any(axis=-1)


def matching_test(
    match_NAA: NDArray[np.bool_], *, num_resamplings: int, seed: int
) -> tuple[Floats, PairingTest]:
    """Does what is asked decide what is found?

    Were it indifferent, any question of a problem would fit any pair of it as well, so the pairs are permuted
    over the questions within each problem. What is found for every question alike (the blocks of all pairs,
    the first value) scores no higher than its permutations.

    Args:
        match_NAA: [n, a, b] whether what question a of problem n finds belongs to the pair of its question b.

    Returns:
        (share of each problem's questions that find their own pair [N], test).
    """
    num_problems, num_questions, _ = match_NAA.shape
    problem = np.repeat(np.arange(num_problems), num_questions)
    scores = np.zeros((num_problems, num_questions, num_problems, num_questions))
    scores[np.arange(num_problems), :, np.arange(num_problems)] = match_NAA
    test = pairing_test(
        scores.reshape(len(problem), len(problem)), problem, num_resamplings=num_resamplings, seed=seed
    )
    return match_NAA.diagonal(axis1=1, axis2=2).mean(axis=1), test


def chance_of_selection(answers: Answers) -> float:
    """Chance that a head which selects at random among the candidates selects one given block."""
    num_places = answers.selected.shape[-1]
    return min(num_places, answers.num_candidates) / max(answers.num_candidates, 1)


def _accuracy(answers: Answers, asked: Ints, resampling: dict[str, int]) -> Finding:
    chosen_NA = answers.score.argmax(axis=-1)
    own_N, test = matching_test(chosen_NA[:, :, None] == asked, **resampling)
    num_pairs = answers.score.shape[-1]
    without_N = is_right(answers.score_under[CUT], asked).mean(axis=1)
    lost_N = own_N - without_N
    return Finding(
        name=f"{answers.distance} tokens: accuracy",
        estimate=float(own_N.mean()),
        unit="share of questions",
        interval=mean_interval(own_N, **resampling),
        null="the answer does not depend on which pair is asked for (pairs permuted within a problem)",
        null_value=test.null_value,
        p_value=test.p_value,
        n=len(own_N),
        n_unit="problems",
        verdict=f"With {answers.distance} tokens in between, {own_N.mean():.0%} of the answers are right (a "
        f"blind choice among the values: {1 / num_pairs:.0%}); with the attention cut while the question is "
        f"read, {without_N.mean():.0%}.",
        causal=Effect(
            description="attention cut while the question is read: accuracy that goes",
            estimate=float(lost_N.mean()),
            unit="share of questions",
            interval=mean_interval(lost_N, **resampling),
            p_value=sign_flip_p_value(lost_N, two_sided=True, **resampling),
        ),
    )


def _hits(answers: Answers, y: int, asked: Ints, resampling: dict[str, int]) -> Finding:
    layer = answers.layers[y]
    own_N, test = matching_test(hits(answers, y), **resampling)
    lost_N = _lost(answers, forbidden(layer), asked)
    num_heads = answers.selected.shape[3]
    chance = 1 - (1 - chance_of_selection(answers)) ** num_heads
    return Finding(
        name=f"{answers.distance} tokens: block {layer} selects the premise's block",
        estimate=float(own_N.mean()),
        unit="share of questions",
        interval=mean_interval(own_N, **resampling),
        null="the selection does not depend on which pair is asked for (pairs permuted within a problem)",
        null_value=test.null_value,
        p_value=test.p_value,
        n=len(own_N),
        n_unit="problems",
        verdict=f"With {answers.distance} tokens in between, a head of block {layer} selects the premise's "
        f"block for {own_N.mean():.0%} of the questions, the block of another pair for "
        f"{test.null_value:.0%} (at random among {answers.num_candidates} candidates: {chance:.1%}).",
        causal=Effect(
            description=f"the premise's block forbidden in block {layer}: lead of the right value over the "
            "others that goes",
            estimate=float(lost_N.mean()),
            unit="nats",
            interval=mean_interval(lost_N, **resampling),
            p_value=sign_flip_p_value(lost_N, two_sided=True, **resampling),
        ),
        layer=layer,
    )


def _lost(answers: Answers, intervention: str, asked: Ints) -> Floats:
    """[N] margin of the right value that goes with an intervention, mean over questions, nats."""
    return (margin(answers.score, asked) - margin(answers.score_under[intervention], asked)).mean(axis=1)


def _changed(answers: Answers, intervention: str, asked: Ints, resampling: dict[str, int]) -> Finding:
    gained_N = -_lost(answers, intervention, asked)
    before_N = is_right(answers.score, asked).mean(axis=1)
    after_N = is_right(answers.score_under[intervention], asked).mean(axis=1)
    return Finding(
        name=f"{answers.distance} tokens: {intervention}",
        estimate=float(gained_N.mean()),
        unit="nats of lead of the right value over the others",
        interval=mean_interval(gained_N, **resampling),
        null="the intervention makes no difference to the lead (sign flips over problems)",
        null_value=0.0,
        p_value=sign_flip_p_value(gained_N, two_sided=True, **resampling),
        n=len(gained_N),
        n_unit="problems",
        verdict=f"With {answers.distance} tokens in between and the {intervention}, {after_N.mean():.0%} of "
        f"the answers are right instead of {before_N.mean():.0%}.",
        causal=Effect(
            description=f"{intervention}: change of accuracy",
            estimate=float((after_N - before_N).mean()),
            unit="share of questions",
            interval=mean_interval(after_N - before_N, **resampling),
        ),
    )


def breaks_at(answers: list[Answers], asked: Ints) -> str:
    """One sentence: how far the model still answers, and where it guesses."""
    chance = 1 / answers[0].score.shape[-1]
    right = {each.distance: is_right(each.score, asked).mean(axis=1) for each in answers}
    good = [distance for distance, share_N in right.items() if share_N.mean() >= 0.5]
    guessing = [distance for distance, share_N in right.items() if mean_interval(share_N)[0] <= chance]
    reach = (
        f"at least half of the answers are right up to {max(good)} tokens" if good else "never half are right"
    )
    end = (
        f"not above chance at {', '.join(map(str, guessing))}"
        if guessing
        else "above chance at every distance"
    )
    last = answers[-1].distance
    return f"Accuracy by distance: {reach}, {right[last].mean():.0%} at {last}; {end}."
