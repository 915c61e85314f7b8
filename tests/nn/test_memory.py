"""The memory path against a search through every one of its n1 * n2 keys."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hydra_lab.config import HydraConfig
from hydra_lab.nn.memory import MemoryPath
from hydra_lab.taps import Lookup
from tests.helpers import listen

SHAPES: list[dict[str, Any]] = [
    {},
    {"memory_num_keys": [5, 9], "memory_top_k": 5, "memory_value_size": 12},
    {"memory_num_keys": [16, 4], "memory_num_heads": 1, "memory_top_k": 1},
]


def path(**fields: Any) -> MemoryPath:
    torch.manual_seed(0)
    ours = MemoryPath(HydraConfig.from_preset("nano", **fields)).eval()
    ours.reset_parameters()
    with torch.no_grad():
        for parameter in (ours.gate.weight, ours.gate.bias, ours.out_proj.weight):
            parameter.normal_(std=0.5)
    return ours


def by_brute_force(ours: MemoryPath, hidden: Tensor) -> tuple[Tensor, Lookup]:
    """Score every key of every head for every token."""
    n1, n2, size = ours.keys1.shape[1], ours.keys2.shape[1], ours.key_size
    rows, length, _ = hidden.shape
    addresses = torch.zeros(rows, length, ours.num_heads, ours.top_k, dtype=torch.long)
    weights = torch.zeros(rows, length, ours.num_heads, ours.top_k)
    output = torch.zeros(rows, length, hidden.shape[-1])
    gate = torch.sigmoid(hidden @ ours.gate.weight[0] + ours.gate.bias)[..., None]
    for b in range(rows):
        for t in range(length):
            read = torch.zeros(ours.values.shape[1])
            for h in range(ours.num_heads):
                rows_of_head = slice(h * 2 * size, (h + 1) * 2 * size)
                first, second = (ours.query_proj.weight[rows_of_head] @ hidden[b, t]).chunk(2)
                first = first / (first.square().mean() + ours.norm_eps).sqrt()
                second = second / (second.square().mean() + ours.norm_eps).sqrt()
                scores = torch.stack(
                    [
                        first @ ours.keys1[h, i] + second @ ours.keys2[h, j]
                        for i in range(n1)
                        for j in range(n2)
                    ]
                )
                order = scores.argsort(descending=True)[: ours.top_k]
                addresses[b, t, h] = order
                weights[b, t, h] = scores[order].softmax(0)
                read = read + weights[b, t, h] @ ours.values[order]
            output[b, t] = gate[b, t] * (ours.out_proj.weight @ read)
    return output, Lookup(addresses, weights, gate)


@pytest.mark.parametrize("fields", SHAPES)
@torch.no_grad()
def test_lookups_and_outputs_are_those_of_a_search_through_all_keys(fields: dict[str, Any]) -> None:
    ours = path(**fields)
    seen: list[Lookup] = listen(ours.lookup)
    hidden = torch.randn(2, 7, 32)
    found = ours(hidden)
    expected, lookup = by_brute_force(ours, hidden)
    print(f"largest difference {(found - expected).abs().max():.1e}")
    assert torch.equal(seen[0].addresses, lookup.addresses)
    torch.testing.assert_close(seen[0].weights, lookup.weights, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[0].gate, lookup.gate, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_queries_of_any_length_find_the_same() -> None:
    ours = path()
    seen: list[Lookup] = listen(ours.lookup)
    hidden = torch.randn(1, 20, 32)
    ours(hidden)
    ours(100 * hidden)
    assert torch.equal(seen[0].addresses, seen[1].addresses)
    torch.testing.assert_close(
        seen[0].weights, seen[1].weights, rtol=1e-3, atol=1e-4
    )  # norm_eps counts a little


def test_beta_starts_at_one_half_and_only_rows_that_are_read_get_a_gradient() -> None:
    torch.manual_seed(0)
    ours = MemoryPath(HydraConfig.from_preset("nano"))
    ours.reset_parameters()
    torch.nn.init.normal_(ours.out_proj.weight)
    seen: list[Lookup] = listen(ours.lookup)
    ours(torch.randn(1, 3, 32)).sum().backward()
    assert (seen[0].gate == 0.5).all()
    assert ours.values.grad is not None
    read = set(seen[0].addresses.flatten().tolist())
    assert {row for row in range(64) if ours.values.grad[row].any()} == read
    assert 0 < len(read) < 64
