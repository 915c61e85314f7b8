"""The moe path against Mixtral's block, against its equations written out, and its losses against hand counts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from hydra_lab.chunks import Span
from hydra_lab.config import HydraConfig
from hydra_lab.nn.moe import MoEPath
from hydra_lab.taps import Routing
from tests.helpers import listen

EXPERTS, CHUNK, SIZE = 4, 8, 32


def path(**fields: Any) -> MoEPath:
    """A path of 4 experts, chunks of 8 tokens and hidden size 32, with nothing at zero."""
    torch.manual_seed(0)
    ours = MoEPath(HydraConfig.from_preset("nano", **fields)).eval()
    ours.reset_parameters()
    with torch.no_grad():
        for weight in (ours.router.weight, ours.token_router.weight, ours.down_proj):
            weight.normal_(std=0.3)
        if ours.average_norm is not None:
            ours.average_norm.weight.uniform_(0.5, 1.5)
    return ours


def routing_of(ours: MoEPath, hidden: Tensor, span: Span | None = None) -> Routing:
    seen: list[Routing] = listen(ours.routing)
    ours(hidden, Span(hidden.shape[1]) if span is None else span, None)
    return seen[0]


def expert_of(ours: MoEPath, expert: int, x: Tensor) -> Tensor:
    gate, up = (ours.gate_up_proj[expert] @ x).chunk(2)
    return ours.down_proj[expert] @ (F.silu(gate) * up)


# --- Mixtral ---


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_single_token_chunks_are_mixtral(top_k: int) -> None:
    ours = path(moe_chunk_size=1, moe_chunk_pooling="first", moe_top_k=top_k)
    theirs = MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=SIZE, intermediate_size=24, num_local_experts=EXPERTS, num_experts_per_tok=top_k
        )
    ).eval()
    theirs.load_state_dict(
        {
            "gate.weight": ours.router.weight,
            "experts.gate_up_proj": ours.gate_up_proj,
            "experts.down_proj": ours.down_proj,
        }
    )
    hidden = torch.randn(2, 37, SIZE)
    torch.nn.init.zeros_(ours.token_router.weight)
    outputs, gradients = [], []
    for run in (lambda x: ours(x, Span(37), None)[0], theirs):
        x = hidden.clone().requires_grad_()
        outputs.append(run(x))
        outputs[-1].square().sum().backward()
        gradients.append(x.grad)
    print(f"top {top_k}, largest difference {(outputs[0] - outputs[1]).abs().max():.1e}")
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.gate_up_proj.grad, theirs.experts.gate_up_proj.grad, rtol=1e-5, atol=1e-5)
    # Sums over 74 tokens of differences between the experts' shares: absolute errors of terms of size 10.
    torch.testing.assert_close(ours.router.weight.grad, theirs.gate.weight.grad, rtol=1e-5, atol=1e-4)


# --- the equations, one token at a time ---


@pytest.mark.parametrize("pooling", ["ema", "first"])
@torch.no_grad()
def test_routing_and_output_by_hand(pooling: str) -> None:
    ours = path(moe_chunk_pooling=pooling)
    length = 29
    hidden = torch.randn(1, length, SIZE)
    found, _, _ = ours(hidden, Span(length), None)
    routing = routing_of(ours, hidden)
    average = torch.zeros(SIZE)
    for chunk, start in enumerate(range(0, length, CHUNK)):
        tokens = hidden[0, start : start + CHUNK]
        router_input = tokens[0]
        if ours.average_norm is not None:
            norm = average / (average.square().mean() + 1e-5).sqrt() * ours.average_norm.weight
            router_input = torch.cat([tokens[0], norm])
        logits = ours.router.weight @ router_input
        torch.testing.assert_close(routing.logits[0, chunk], logits, rtol=1e-5, atol=1e-5)
        experts = logits.argsort(descending=True)[:2]
        assert routing.experts[0, chunk].tolist() == experts.tolist()
        for t, token in enumerate(tokens, start=start):
            weights = torch.softmax((logits + ours.token_router.weight @ token)[experts], dim=0)
            torch.testing.assert_close(routing.weights[0, t], weights, rtol=1e-5, atol=1e-5)
            output = sum(w * expert_of(ours, int(e), token) for w, e in zip(weights, experts, strict=True))
            torch.testing.assert_close(found[0, t], output, rtol=1e-5, atol=1e-5)
        if len(tokens) == CHUNK:
            average = 0.8 * average + 0.2 * tokens.mean(0)


@torch.no_grad()
def test_a_chunk_is_routed_before_its_second_token() -> None:
    ours = path()
    hidden = torch.randn(1, 24, SIZE)
    before = routing_of(ours, hidden)
    changed = hidden.clone()
    changed[0, CHUNK + 1 : 2 * CHUNK] += 5.0  # all but the first token of chunk 1
    after = routing_of(ours, changed)
    assert torch.equal(before.logits[:, :2], after.logits[:, :2])
    assert not torch.equal(before.logits[:, 2], after.logits[:, 2])


def test_the_mean_of_the_own_chunk_warns() -> None:
    with pytest.warns(UserWarning, match='moe_chunk_pooling="mean" routes a chunk by its own mean'):
        path(moe_chunk_pooling="mean")


# --- symmetry ---


@torch.no_grad()
def test_permuting_the_experts_changes_their_names_only() -> None:
    ours, permuted = path(), path()
    order = torch.tensor([2, 0, 3, 1])  # expert i of `permuted` is expert order[i] of `ours`
    for name in ("router.weight", "token_router.weight", "gate_up_proj", "down_proj"):
        permuted.get_parameter(name).copy_(ours.get_parameter(name)[order])
    hidden, span = torch.randn(2, 29, SIZE), Span(29)
    (output, state, losses), (output_2, state_2, losses_2) = (
        ours(hidden, span, None),
        permuted(hidden, span, None),
    )
    routing, routing_2 = routing_of(ours, hidden), routing_of(permuted, hidden)
    torch.testing.assert_close(output_2, output, rtol=1e-6, atol=1e-6)
    assert torch.equal(order[routing_2.experts], routing.experts)
    torch.testing.assert_close(routing_2.logits, routing.logits[..., order])
    torch.testing.assert_close(routing_2.weights, routing.weights)
    torch.testing.assert_close(losses_2, losses)
    assert torch.equal(order[state_2.open_experts], state.open_experts)


# --- losses ---


def force(ours: MoEPath, logits: Tensor, experts: Tensor) -> None:
    """Let every run of `ours` decide this; the weights stay."""
    ours.routing.register_forward_hook(lambda _m, _a, out: Routing(logits, experts, out.weights))


def test_an_expert_without_chunks_counts_as_zero_load() -> None:
    ours = path(moe_top_k=1)
    logits = torch.tensor([[[2.0, 0.0, 0.0, -1.0], [1.0, 0.5, 0.0, 0.0], [3.0, 0.0, 1.0, 0.0]]])
    force(ours, logits, torch.zeros(1, 3, 1, dtype=torch.long))
    _, _, losses = ours(torch.randn(1, 3 * CHUNK, SIZE), Span(3 * CHUNK), None)
    mean_probability_of_0 = logits.softmax(-1)[0, :, 0].mean()
    # shares (1, 0, 0, 0): E * (1 * P_0). A mean over the experts in use would give 1 * P_0.
    torch.testing.assert_close(losses.load_balance, 4 * mean_probability_of_0)


def test_losses_by_hand() -> None:
    ours = path(moe_top_k=2)
    logits = torch.randn(2, 2, EXPERTS)
    experts = torch.tensor([[[0, 1], [1, 2]], [[1, 0], [0, 1]]])
    force(ours, logits, experts)
    _, _, losses = ours(torch.randn(2, 2 * CHUNK, SIZE), Span(2 * CHUNK), None)
    share = torch.tensor([3, 4, 1, 0]) / 8
    probability = logits.softmax(-1).mean(dim=(0, 1))
    torch.testing.assert_close(losses.load_balance, 4 * (share * probability).sum())
    torch.testing.assert_close(losses.router_z, logits.exp().sum(-1).log().square().mean())


def test_a_balanced_router_has_loss_one() -> None:
    ours = path(moe_top_k=2)
    experts = torch.tensor([[[0, 1], [2, 3]]])
    force(ours, torch.zeros(1, 2, EXPERTS), experts)
    _, _, losses = ours(torch.randn(1, 2 * CHUNK, SIZE), Span(2 * CHUNK), None)
    torch.testing.assert_close(losses.load_balance, torch.tensor(1.0))
    torch.testing.assert_close(losses.router_z, torch.tensor(4.0).log().square())


def test_chunks_of_padding_do_not_count() -> None:
    ours = path()
    hidden = torch.randn(2, 3 * CHUNK, SIZE)
    lengths = torch.tensor([3 * CHUNK, CHUNK + 1])  # chunk 2 of row 1 is empty
    _, _, losses = ours(hidden, Span(3 * CHUNK, None, lengths), None)
    routing = routing_of(ours, hidden, Span(3 * CHUNK, None, lengths))
    decided = torch.cat([routing.logits[0], routing.logits[1, :2]])
    torch.testing.assert_close(losses.router_z, decided.logsumexp(-1).square().mean())
    chosen = torch.cat([routing.experts[0], routing.experts[1, :2]]).flatten()
    share = torch.bincount(chosen, minlength=EXPERTS) / len(chosen)
    torch.testing.assert_close(losses.load_balance, 4 * (share * decided.softmax(-1).mean(0)).sum())


def test_an_expert_that_nothing_chose_gets_no_gradient_and_every_token_trains_the_router() -> None:
    ours = path()
    experts = torch.tensor([[[0, 1], [1, 3]]])
    ours.routing.register_forward_hook(lambda _m, _a, out: out._replace(experts=experts))
    hidden = torch.randn(1, 2 * CHUNK, SIZE, requires_grad=True)
    output, _, _ = ours(hidden, Span(2 * CHUNK), None)
    output[0, 5].sum().backward()  # one token inside a chunk
    assert ours.gate_up_proj.grad is not None and ours.down_proj.grad is not None
    used = [bool(ours.gate_up_proj.grad[e].any() or ours.down_proj.grad[e].any()) for e in range(EXPERTS)]
    assert used == [True, True, False, False]
    assert ours.router.weight.grad is not None and ours.router.weight.grad.any()
    assert ours.token_router.weight.grad is not None and ours.token_router.weight.grad.any()
