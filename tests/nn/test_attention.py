"""The attention path against dense attention under an explicit mask, and its selection against a loop over blocks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from hydra_lab.chunks import Span
from hydra_lab.config import HydraConfig
from hydra_lab.nn.attention import AttentionPath, rotate
from hydra_lab.taps import Selection
from tests.helpers import listen

LENGTH, THETA = 61, 100.0

CASES: dict[str, dict[str, Any]] = {
    "token": {},
    "tile": {"attention_selection": "tile"},
    "rope": {"attention_rope_theta": THETA},
    "tile, rope": {"attention_selection": "tile", "attention_rope_theta": THETA},
    "wide blocks": {"attention_window": 3, "attention_block_size": 8, "attention_num_selected": 1},
    "wide tiles": {"attention_selection": "tile", "attention_window": 3, "attention_block_size": 8},
    "one key head": {"attention_num_heads": 3, "attention_num_kv_heads": 1},
    "none selected": {"attention_num_selected": 0},
    "all selected": {"attention_num_selected": 20},
}
EACH = pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())


def path(fields: dict[str, Any]) -> AttentionPath:
    torch.manual_seed(0)
    ours = AttentionPath(HydraConfig.from_preset("nano", **fields)).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.25)
    return ours


def heads(ours: AttentionPath, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one row, [heads, L, d], rotated as Llama does it."""
    query, key, value = (
        projection(hidden).unflatten(-1, (-1, ours.head_dim)).transpose(0, 1)
        for projection in (ours.q_proj, ours.k_proj, ours.v_proj)
    )
    if ours.rope_theta is not None:
        parameters = {"rope_type": "default", "rope_theta": ours.rope_theta}
        rotary = LlamaRotaryEmbedding(
            LlamaConfig(
                head_dim=ours.head_dim, num_attention_heads=1, hidden_size=8, rope_parameters=parameters
            )
        )
        cos, sin = rotary(hidden[None], torch.arange(len(hidden))[None])
        query, key = (rotated[0] for rotated in apply_rotary_pos_emb(query[None], key[None], cos, sin))
    return query, key, value


def chosen_blocks(ours: AttentionPath, query: Tensor, key: Tensor, head: int, t: int) -> list[int]:
    """The blocks that key-value head `head` selects for the query at position t, by trying each of them."""
    size, window = ours.block_size, ours.window
    group = ours.num_heads // ours.num_kv_heads
    decides, last_served = t, t
    if ours.tiled:
        decides = t // size * size
        last_served = decides + size - 1
    candidates: list[tuple[float, int]] = []
    for block in range(
        1, decides // size
    ):  # complete before the deciding token's own block, and not the sink
        if block * size > last_served - window:  # wholly inside the window of all that it would serve
            continue
        mean = key[head, block * size : (block + 1) * size].mean(0)
        scores = [float(query[head * group + each, decides] @ mean) for each in range(group)]
        candidates.append((-sum(scores) / group, block))
    return [block for _, block in sorted(candidates)[: ours.num_selected]]


def expected_mask(ours: AttentionPath, query: Tensor, key: Tensor) -> Tensor:
    """[query heads, L, L] True where a key is seen, one entry at a time."""
    length = query.shape[1]
    mask = torch.zeros(ours.num_heads, length, length, dtype=torch.bool)
    group = ours.num_heads // ours.num_kv_heads
    for head in range(ours.num_heads):
        for t in range(length):
            blocks = {0, *chosen_blocks(ours, query, key, head // group, t)}
            for j in range(t + 1):
                mask[head, t, j] = t - j < ours.window or j // ours.block_size in blocks
    return mask


@EACH
@torch.no_grad()
def test_outputs_are_those_of_dense_attention_under_the_mask(fields: dict[str, Any]) -> None:
    ours = path(fields)
    hidden = torch.randn(1, LENGTH, 32)
    seen: list[Selection] = listen(ours.selection)
    found, _ = ours(hidden, Span(LENGTH), None, keep_state=False)
    query, key, value = heads(ours, hidden[0])
    mask = expected_mask(ours, query, key)
    group = ours.num_heads // ours.num_kv_heads
    dense = F.scaled_dot_product_attention(
        query, key.repeat_interleave(group, 0), value.repeat_interleave(group, 0), attn_mask=mask
    )
    expected = dense.transpose(0, 1).flatten(1) @ ours.o_proj.weight.T
    print(f"{mask.float().mean():.0%} of all pairs seen, difference {(found[0] - expected).abs().max():.1e}")
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    for t in range(LENGTH):
        for head in range(ours.num_kv_heads):
            blocks = [block for block in seen[0].blocks[0, t, head].tolist() if block >= 0]
            assert blocks == chosen_blocks(ours, query, key, head, t)
    assert torch.equal(seen[0].blocks < 0, seen[0].scores == -torch.inf)


@EACH
@torch.no_grad()
def test_the_state_continues_what_one_pass_would_have_done(fields: dict[str, Any]) -> None:
    ours = path(fields)
    hidden = torch.randn(2, LENGTH, 32)
    whole, _ = ours(hidden, Span(LENGTH), None, keep_state=False)
    state, found = None, []
    for first, end in [(0, 13), (13, 14), (14, 37), (37, 38), (38, LENGTH)]:
        span = Span(end - first, torch.full((2,), first))
        output, state = ours(hidden[:, first:end], span, state, keep_state=True)
        found.append(output)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_window_over_everything_is_full_causal_attention() -> None:
    ours = path({"attention_window": 1000})
    hidden = torch.randn(1, LENGTH, 32)
    query, key, value = heads(ours, hidden[0])
    dense = F.scaled_dot_product_attention(query, key.repeat(2, 1, 1), value.repeat(2, 1, 1), is_causal=True)
    wrong_heads = dense.transpose(0, 1).flatten(1) @ ours.o_proj.weight.T
    key, value = key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)
    dense = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    expected = dense.transpose(0, 1).flatten(1) @ ours.o_proj.weight.T
    found, _ = ours(hidden, Span(LENGTH), None, keep_state=False)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    assert (found[0] - wrong_heads).abs().max() > 1e-2  # queries of a group are neighbours


def test_gradients_are_those_of_dense_attention() -> None:
    ours = path({})
    hidden = torch.randn(1, LENGTH, 32)
    gradients: list[Tensor | None] = []
    for dense in (False, True):
        x = hidden.clone().requires_grad_()
        if dense:
            query, key, value = heads(ours, x[0])
            mask = expected_mask(ours, query.detach(), key.detach())
            out = F.scaled_dot_product_attention(
                query, key.repeat_interleave(2, 0), value.repeat_interleave(2, 0), attn_mask=mask
            )
            output = (out.transpose(0, 1).flatten(1) @ ours.o_proj.weight.T)[None]
        else:
            output, _ = ours(x, Span(LENGTH), None, keep_state=False)
        output.square().sum().backward()
        gradients.append(x.grad)
    assert gradients[0] is not None and gradients[1] is not None
    scale = float(gradients[1].abs().max())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5 * scale)


def test_rotary_embedding_depends_on_distance_alone() -> None:
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def product(at_query: int, at_key: int) -> float:
        positions = torch.tensor([[at_query]]), torch.tensor([[at_key]])
        return float((rotate(query, positions[0], THETA) * rotate(key, positions[1], THETA)).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-5)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-3)
