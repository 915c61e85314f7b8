"""The study on models whose experts serve a domain and stand in for each other, and on models where neither holds."""

import dataclasses
from typing import Any

import numpy as np

from hydra_lab.data.samples import Samples
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.probing import Calibration, Probe, claims_anything, corrected, planted
from probes.expert_ablation import run

NUM_SAMPLES = 24
NUM_CHUNKS = 4
SETTINGS: dict[str, Any] = {
    "pair_samples_per_domain": NUM_SAMPLES // 2,
    "num_resamplings": 199,
    "num_controls": 1,
    "batch_size": 24,
}
LETTER_EXPERTS = (2, 3)
DIGIT_EXPERTS = (0, 1)


def finds_planted(seed: int) -> bool:
    """Two experts serve letters and two digits; either of the two would do nearly as well alone."""
    rng = np.random.default_rng(seed)
    samples = planted.letters_and_digits(rng, num_samples=NUM_SAMPLES, num_chunks=NUM_CHUNKS, purity=0.85)
    model = planted.one_block_model(seed, feature=planted.LETTERS, other=planted.DIGITS, moe_top_k=2)
    planted.tie_experts(model, LETTER_EXPERTS, DIGIT_EXPERTS, strength=0.5)
    costs = run.measure(_probe(model, samples, seed), SETTINGS)
    evidence = run.weigh(costs, num_resamplings=SETTINGS["num_resamplings"], seed=seed)
    by_domain, of_pairs = corrected(run.findings(costs, evidence))
    most = evidence.costliest[0]
    serve = LETTER_EXPERTS if costs.domains[most.domain] == "letters" else DIGIT_EXPERTS
    return bool(
        by_domain.is_claimed() and most.expert in serve and of_pairs.is_claimed() and of_pairs.estimate > 0
    )


def claims_nothing_there(seed: int) -> bool:
    """Experts follow a taste of the text that no domain shares, and the interaction of two is noise around 0: as
    often above as below, and heavy-tailed, as differences of losses are."""
    rng = np.random.default_rng(seed)
    samples = planted.texts_of_two_tastes(rng, num_samples=NUM_SAMPLES, num_chunks=NUM_CHUNKS)
    model = planted.taste_model(seed)
    planted.tie_experts(model, (2,), (0,))
    costs = run.measure(_probe(model, samples, seed), SETTINGS)
    single_YEM = costs.single[:, :, costs.pair_rows]
    noise = 0.01 * rng.standard_t(3, size=costs.both.shape)
    additive = single_YEM[:, :, None] + single_YEM[:, None, :] + noise
    costs = dataclasses.replace(costs, both=additive)
    evidence = run.weigh(costs, num_resamplings=SETTINGS["num_resamplings"], seed=seed)
    return claims_anything(run.findings(costs, evidence))


def _probe(model: HydraForCausalLM, samples: Samples, seed: int) -> Probe:
    return Probe(model=model, tokenizer=planted.byte_tokenizer(), name="planted", samples=samples, seed=seed)


CALIBRATION = Calibration(
    planted="two experts serve one domain and two another, and either of the two would do nearly as well alone",
    absent="the experts follow a feature of the text that has nothing to do with its domain, and the interactions of "
    "pairs are heavy-tailed noise around 0",
    sample_size=f"{NUM_SAMPLES} samples of {NUM_CHUNKS} chunks, two domains, one block of four experts",
    finds_planted=finds_planted,
    claims_nothing_there=claims_nothing_there,
)
