"""Results with made-up but plausible numbers, for the figures' tests and for looking at the figures.

python tests/figures/samples.py OUT      writes every figure as PNG, light and dark
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from hydra_lab import figures, metrics

DOMAINS = ("code", "technical", "prose", "arithmetic", "chains", "recall", "facts", "structured")


def path_use() -> metrics.PathUse:
    """A model of six blocks: the experts live, the memory is idle."""
    nan = np.nan
    share = np.array(
        [
            [0.55, nan, 0.45, nan, nan],
            [0.90, nan, nan, 0.10, nan],
            [0.52, 0.20, 0.28, nan, nan],
            [0.99, nan, nan, nan, 0.01],
            [0.70, nan, 0.02, 0.28, nan],
            [0.74, 0.26, nan, nan, nan],
        ]
    )
    increase = np.array([[4.1, 3.9, 3.5, 2.5, 3.9, 4.0, 4.4, 3.1], np.linspace(0, 0.4, 8), np.linspace(0.3, 0.05, 8),
                         [0.0, 0.0, 0.01, 0.0, 0.31, 0.12, 0.0, 0.0], np.linspace(-0.001, 0.012, 8)])  # fmt: skip
    return metrics.PathUse(
        layers=tuple(range(6)),
        paths=("ssm", "attention", "moe", "workspace", "memory"),
        share=share,
        cosine=np.where(np.isnan(share), nan, 0.5),
        domains=DOMAINS,
        loss=np.linspace(1, 3, 8),
        loss_increase=increase,
        loss_increase_error=np.full((5, 8), 0.01),
        num_samples=np.full(8, 12),
        num_tokens=np.full(8, 12 * 255),
    )


def routing() -> metrics.RoutingRecord:
    """Three blocks with eight experts, the last of which the middle block never uses; block 0 follows the domain."""
    rng = np.random.default_rng(0)
    num_samples, num_chunks, num_experts = 48, 16, 8
    domains = tuple(DOMAINS[n % 8] for n in range(num_samples))
    logits = rng.gumbel(size=(3, num_samples, num_chunks, num_experts))
    for n in range(num_samples):
        logits[0, n, :, n % 8] += 3
        logits[2, n] += rng.normal(size=num_experts)
    logits[1, ..., 7] = -np.inf
    experts = np.argsort(-logits, axis=-1)[..., :2]
    first = rng.uniform(0.5, 1, size=(3, num_samples, num_chunks * 32))
    return metrics.RoutingRecord(
        layers=(0, 2, 4),
        experts=experts,
        num_experts=num_experts,
        chunk_size=32,
        length=np.full(num_samples, num_chunks * 32),
        domains=domains,
        weights=np.stack([first, 1 - first], axis=-1),
        logits=logits,
        tokens=rng.integers(6, size=(num_samples, num_chunks * 32)),
    )


def earlier_routings() -> list[metrics.RoutingRecord]:
    """The same texts at four earlier checkpoints, ever closer to the last."""
    last, rng = routing(), np.random.default_rng(5)
    records: list[metrics.RoutingRecord] = []
    assert last.logits is not None
    for noise in (8.0, 4.0, 2.0, 1.0):
        logits = last.logits + noise * rng.gumbel(size=last.logits.shape)
        records.append(replace(last, experts=np.argsort(-logits, axis=-1)[..., :2], logits=logits))
    return records


def prompts() -> metrics.LookupRecord:
    """Ten facts, three prompts about each, that read some rows of their own."""
    rng = np.random.default_rng(6)
    own = rng.integers(128 * 128, size=(10, 4, 8))
    addresses = rng.integers(128 * 128, size=(30, 6, 4, 8))
    addresses[:, -1] = np.where(rng.random((30, 4, 8)) < 0.6, own.repeat(3, axis=0), addresses[:, -1])
    return metrics.LookupRecord(
        layer=3,
        addresses=addresses,
        weights=rng.dirichlet(np.ones(8), size=(30, 6, 4)),
        gate=np.full((30, 6), 0.5),
        tokens=np.zeros((30, 6), dtype=int),
        length=np.full(30, 6),
        domains=("facts",) * 30,
        num_keys=(128, 128),
    )


CAPITALS = ("Rome", "Oslo", "Lima", "Bern", "Kyiv", "Doha", "Cairo", "Paris", "Quito", "Tunis")


def contexts() -> metrics.TopContexts:
    """Five chunks of an expert."""
    score = np.array([0.94, 0.9, 0.82, 0.8, 0.44])
    return metrics.TopContexts(
        2, "expert", 5, score, np.array([7, 3, 20, 1, 44]), 32 * np.arange(5), 30_000, 60
    )


def lookups(num_keys: tuple[int, int] = (128, 128)) -> metrics.LookupRecord:
    """A memory whose rows are read unevenly, with a gate that opens for facts."""
    rng = np.random.default_rng(1)
    num_samples, num_positions = 40, 200
    rows = num_keys[0] * num_keys[1]
    popular = rng.permutation(rows)[
        np.minimum(rng.pareto(0.6, size=(num_samples, num_positions, 4, 8)), rows - 1).astype(int)
    ]
    domains = tuple(DOMAINS[n % 8] for n in range(num_samples))
    beta = rng.beta(2, 5, size=(num_samples, num_positions))
    beta[[d == "facts" for d in domains]] = rng.beta(5, 3, size=(5, num_positions))
    return metrics.LookupRecord(
        layer=3,
        addresses=popular,
        weights=rng.dirichlet(np.ones(8), size=(num_samples, num_positions, 4)),
        gate=beta,
        tokens=rng.integers(0, 30, size=(num_samples, num_positions)),
        length=np.full(num_samples, num_positions),
        domains=domains,
        num_keys=num_keys,
    )


def workspace() -> metrics.WorkspaceRecord:
    """Sixteen slots from short to long memories."""
    rng = np.random.default_rng(2)
    taste = rng.normal(size=(1, 1, 16)) + np.linspace(0, 2, 512)[None, :, None] * rng.normal(size=(1, 1, 16))
    read = np.exp(taste + 0.5 * rng.normal(size=(8, 512, 16)))
    gate = 1 / (1 + np.exp(-np.linspace(-5, 2, 16) + 0.3 * rng.normal(size=(8, 16, 16))))
    return metrics.WorkspaceRecord(
        layer=1,
        read_address=read / read.sum(axis=-1, keepdims=True),
        read_gate=np.clip(np.linspace(0.1, 0.6, 512) + 0.1 * rng.normal(size=(8, 512)), 0, 1),
        write_gate=gate,
        length=np.full(8, 512),
        chunk_size=32,
    )


def states() -> metrics.StateRecord:
    """Six heads with half-lives from 3 to 3,000 tokens."""
    rng = np.random.default_rng(3)
    rate = np.log(2) / np.geomspace(3, 3000, 6)
    decay = -rate * rng.gamma(2, 0.5, size=(8, 512, 6))
    end = 64 * np.arange(1, 9)
    norms = (1 - np.exp(-end[None, :, None] * rate)) * np.linspace(2, 9, 6) + 0.2 * rng.random((8, 8, 6))
    return metrics.StateRecord(0, norms, decay, np.full(8, 512), 64)


def selections() -> metrics.SelectionRecord:
    """Two heads: one prefers near blocks, the other any."""
    rng = np.random.default_rng(4)
    candidates = metrics.num_candidates(np.arange(1024), window=128, block_size=32)
    blocks = np.full((4, 1024, 2, 2), -1)
    for t, count in enumerate(candidates):
        for n in range(4):
            some = min(2, count)
            blocks[n, t, 0, :some] = count - np.arange(some) if rng.random() < 0.7 else 1 + np.arange(some)
            blocks[n, t, 1, :some] = 1 + rng.permutation(count)[:some]
    return metrics.SelectionRecord(2, blocks, np.full(4, 1024), 128, 32)


def makers() -> dict[str, Callable[..., go.Figure]]:
    """Every figure by name; each takes `theme` and, but for `path_use` itself, `path_use`."""
    record, lookup, space, state = routing(), lookups(), workspace(), states()
    classes = metrics.expert_by_token_class(record, np.arange(6))
    last = np.broadcast_to(np.arange(6) == 5, (30, 6))
    overlap = metrics.address_overlap(prompts(), [c for c in CAPITALS for _ in range(3)], where=last)
    texts = ["def f(x):\n    return x", "for i in range(9):", "<b> & so on", "import os", "x = 1"]
    top = metrics.top_tokens(lookup, int(np.argmax(lookup.mass())), 8)
    return {
        "path_use": lambda theme, path_use=None: figures.path_use(globals()["path_use"](), theme=theme),
        "expert_load": partial(figures.expert_load, metrics.expert_load(record)),
        "expert_by_domain": partial(figures.expert_by_domain, metrics.expert_by_domain(record)),
        "expert_by_chunk": partial(figures.expert_by_chunk, metrics.expert_by_chunk(record)),
        "expert_by_position": partial(figures.expert_by_position, metrics.expert_by_position(record)),
        "co_activation": partial(figures.co_activation, metrics.co_activation(record)),
        "switch_rate": partial(figures.switch_rate, metrics.switch_rate(record)),
        "routing_map": partial(figures.routing_map, metrics.routing_map(record, 3)),
        "routing_margin": partial(figures.routing_margin, metrics.routing_margin(record)),
        "expert_sparsity": partial(figures.expert_sparsity, metrics.expert_sparsity(record)),
        "router_saturation": partial(
            figures.router_saturation,
            metrics.router_saturation(
                earlier_routings(), record, labels=["step 1k", "step 2k", "step 4k", "step 8k"]
            ),
        ),
        "expert_by_token_class": partial(figures.expert_by_token_class, classes),
        "specialization": partial(
            figures.specialization, metrics.specialization(metrics.expert_by_domain(record))
        ),
        "memory_use_by_domain": partial(figures.memory_use_by_domain, metrics.memory_use_by_domain(lookup)),
        "memory_use_by_head": partial(figures.memory_use_by_head, metrics.memory_use_by_head(lookup)),
        "dead_addresses": partial(figures.dead_addresses, metrics.dead_addresses(lookup, max_size=64)),
        "address_overlap": partial(figures.address_overlap, overlap),
        "top_contexts": partial(figures.top_contexts, contexts(), texts),
        "memory_use": partial(figures.memory_use, metrics.memory_use(lookup)),
        "beta_by_domain": partial(figures.beta_by_domain, metrics.beta_by_domain(lookup)),
        "top_tokens": partial(
            figures.top_tokens, top, [" cat", "\n", "<p>", "a", " b", "c", "d", "e"][: len(top.tokens)]
        ),
        "memory_map": partial(figures.memory_map, metrics.memory_map(lookup)),
        "slot_reads": partial(figures.slot_reads, metrics.slot_reads(space)),
        "slot_writes": partial(figures.slot_writes, metrics.slot_writes(space)),
        "state_norms": partial(figures.state_norms, metrics.state_norms(state)),
        "half_life": partial(figures.half_life, metrics.half_life(state)),
        "selection_use": partial(figures.selection_use, metrics.selection_use(selections())),
    }


if __name__ == "__main__":
    out = Path(sys.argv[1])
    use = path_use()
    for theme in ("light", "dark"):
        drawn = {f"{name}_{theme}": make(theme=theme, path_use=use) for name, make in makers().items()}
        figures.write_png(drawn, out, width=900, scale=1.0)
        print(*sorted(drawn), sep="\n")
