"""The study put to models whose workspace is wired by hand.

A text of fillers holds a token of class 1 and one of class 2, and ends in a question for class 1; the answer is that
token again. Two channels of the embedding mark the classes and one the question; the others tell tokens apart. Either
the workspace answers, through one slot per class, or attention does and the workspace has no part in it.
"""

import random

import torch

from hydra_lab.config import HydraConfig
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.nn.attention import AttentionPath
from hydra_lab.nn.workspace import WorkspacePath
from hydra_lab.probing import Calibration, corrected
from probes.workspace_tracing.analysis import findings, is_shown
from probes.workspace_tracing.problems import Problem
from probes.workspace_tracing.run import trace
from probes.workspace_tracing.settings import Settings

NUM_PROBLEMS = 48
_CHUNK, _NUM_CHUNKS = 8, 3
_QUESTION = 1
_CLASS_1, _CLASS_2, _FILLERS = range(2, 14), range(14, 26), range(26, 50)
_MARK_1, _MARK_2, _MARK_QUESTION, _FIRST_NAME = range(
    4
)  # channels; those from _FIRST_NAME on tell tokens apart
_SETTINGS = Settings(
    num_problems=NUM_PROBLEMS, most_tokens=64, least_share=0.05, num_resamplings=999, batch_size=64
)  # fmt: skip


def _blank_model(seed: int) -> HydraForCausalLM:
    """A block with a workspace and an attention path that add nothing yet, and embeddings as described above."""
    torch.manual_seed(seed)
    config = HydraConfig.from_preset(
        "nano",
        vocab_size=_FILLERS.stop,
        num_hidden_layers=1,
        attention_every=1,
        attention_num_heads=1,
        attention_num_kv_heads=1,
        attention_head_dim=32,
        attention_window=64,
        moe_layers=[],
        memory_layers=[],
        workspace_layers=[0],
        workspace_slot_size=32,
        workspace_chunk_size=_CHUNK,
    )
    model = HydraForCausalLM(config).eval()
    with torch.no_grad():
        embedding = model.get_parameter("model.embed_tokens.weight")
        embedding.normal_()
        embedding[:, :_FIRST_NAME] = 0.0
        for tokens, channel in ((_CLASS_1, _MARK_1), (_CLASS_2, _MARK_2), ((_QUESTION,), _MARK_QUESTION)):
            embedding[list(tokens), channel] = 4.0
    return model


def _names() -> torch.Tensor:
    """[D, D] keeps the channels that tell tokens apart."""
    keep = torch.ones(32)
    keep[:_FIRST_NAME] = 0.0
    return torch.diag(keep)


@torch.no_grad()
def _wire_workspace(path: WorkspacePath, slots: tuple[int, int]) -> None:
    """Each of two slots takes up the tokens of one class and keeps them; the question reads the first."""
    for channel, slot in enumerate(slots):
        path.write_key.weight[channel] = 0.0
        path.write_key.weight[channel, channel] = 1.0
        path.write_query[:, channel] = 0.0
        path.slot_name[:, channel] = 0.0
        path.write_query[slot, channel] = 8.0
        # Open where the chunk's mean shows the class, which a single token of it does.
        path.forget_gate.weight[slot] = 0.0
        path.forget_gate.weight[slot, channel] = -30.0
        path.forget_gate.bias[slot] = 6.0
    path.write_value.weight.copy_(_names())
    path.slot_key.weight.zero_()
    path.read_query.weight.zero_()
    path.read_query.weight[0, _MARK_QUESTION] = 4.0
    path.slot_name[slots[0], 0] = 4.0
    path.read_gate.weight.zero_()
    path.read_gate.weight[0, _MARK_QUESTION] = 2.0
    path.out_proj.weight.copy_(3.0 * _names())


@torch.no_grad()
def _wire_attention(path: AttentionPath) -> None:
    """The question looks at tokens of class 1 and copies what tells them apart."""
    path.q_proj.weight.zero_()
    path.k_proj.weight.zero_()
    path.q_proj.weight[0, _MARK_QUESTION] = path.k_proj.weight[0, _MARK_1] = 2.5
    path.v_proj.weight.copy_(_names())
    path.o_proj.weight.copy_(3.0 * _names())


@torch.no_grad()
def _scramble_workspace(path: WorkspacePath) -> None:
    """A workspace that writes and reads at random, and adds about a third of what attention adds."""
    for parameter in (path.write_value, path.write_key, path.read_query, path.slot_key):
        parameter.weight.normal_(std=0.3)
    path.out_proj.weight.normal_(std=0.2)


def planted_model(seed: int) -> tuple[HydraForCausalLM, int]:
    """A model whose workspace answers, and the slot that holds the premise."""
    model = _blank_model(seed)
    slots = random.Random(seed).sample(range(model.config.workspace_num_slots), 2)
    _wire_workspace(model.model.blocks[0].workspace, (slots[0], slots[1]))
    return model, slots[0]


def structureless_model(seed: int) -> HydraForCausalLM:
    """A model whose attention answers. Its workspace writes and reads at random; or, for odd seeds, holds the premise
    as in `planted_model`, but nobody reads it."""
    if seed % 2:
        model, _ = planted_model(seed)
        with torch.no_grad():
            model.model.blocks[0].workspace.read_gate.weight.zero_()
            model.model.blocks[0].workspace.read_gate.bias.fill_(-20.0)
    else:
        model = _blank_model(seed)
        _scramble_workspace(model.model.blocks[0].workspace)
    _wire_attention(model.model.blocks[0].attention)
    return model


def draw(seed: int, num_problems: int = NUM_PROBLEMS) -> list[Problem]:
    """Texts of up to three chunks whose premises stand in the first two."""
    rng = random.Random(seed)
    problems: list[Problem] = []
    for _ in range(num_problems):
        tokens = rng.choices(_FILLERS, k=rng.randint(2 * _CHUNK, _NUM_CHUNKS * _CHUNK - 1))
        first, second = rng.sample(range(2 * _CHUNK), 2)
        (answer, changed), (other, changed_other) = (rng.sample(each, 2) for each in (_CLASS_1, _CLASS_2))
        versions = []
        for in_first, in_second in ((answer, other), (changed, other), (answer, changed_other)):
            version = [*tokens, _QUESTION]
            version[first], version[second] = in_first, in_second
            versions.append(tuple(version))
        problems.append(
            Problem(
                tokens=versions[0],
                changed=versions[1],
                control=versions[2],
                answer=answer,
                changed_answer=changed,
            )
        )
    return problems


def finds_planted(seed: int) -> bool:
    """Whether the planted slot is named, and the workspace as a whole is found to carry the premise."""
    model, slot = planted_model(seed)
    traced = trace(model, "planted", draw(seed), _SETTINGS)
    solved, held = corrected(
        findings([traced], least_share=_SETTINGS.least_share, num_resamplings=999, seed=seed)
    )
    carried = solved.causal is not None and is_shown(solved.causal)
    return carried and held.is_claimed() and int(traced.chosen[0]) == slot


def claims_nothing_there(seed: int) -> bool:
    """Whether the workspace, or a slot of it, is said to hold or to matter where attention does it all."""
    traced = trace(structureless_model(seed), "absent", draw(seed), _SETTINGS)
    solved, held = corrected(
        findings([traced], least_share=_SETTINGS.least_share, num_resamplings=999, seed=seed)
    )
    effects = [each.causal for each in (solved, held) if each.causal is not None]
    return held.is_claimed() or any(is_shown(each) for each in effects)


CALIBRATION = Calibration(
    planted="one of five slots takes up the premise and the question reads it there",
    absent="attention answers; the workspace writes and reads at random, or holds the premise and is not read",
    sample_size="48 problems: half choose a slot, half test it",
    finds_planted=finds_planted,
    claims_nothing_there=claims_nothing_there,
)
