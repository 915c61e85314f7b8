"""Contests between implementations of one operation: the backends of ours, and what others offer for the same work.

Every contest is at the sizes of a preset, batch 1. Its inputs are made once and shared; contestants differ in layout
only where a library asks for it.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_lab.config import HydraConfig
from hydra_lab.ops.backend import BACKENDS, Backend, unavailable
from hydra_lab.ops.causal_conv import causal_conv
from hydra_lab.ops.chunk_moe import chunk_moe
from hydra_lab.ops.product_key import memory_read, product_key_topk
from hydra_lab.ops.sparse_attention import block_means, select_blocks, sparse_attention
from hydra_lab.ops.ssd import ssd, state_passing
from hydra_lab.ops.workspace import workspace_read

Run = Callable[[], Tensor]

REFERENCE_ELEMENTS = 1 << 31
"""A reference that would build an array of more numbers than this is left out."""


@dataclass(frozen=True)
class Contestant:
    """One implementation, ready to run.

    Attributes:
        run: the forward pass.
        leaves: tensors that a backward pass goes to; none where the operation has no gradient.
    """

    run: Run
    leaves: tuple[Tensor, ...]


@dataclass
class Contest:
    """One operation at one size.

    Attributes:
        operation: its name; a key of `hydra_lab.ops.backend.PACKAGES`, or one of its own.
        length: tokens.
        flops: of a forward pass, at least.
        num_bytes: read and written by a forward pass, at least.
        contestants: by backend or peer.
        skipped: why a contestant is missing, by name.
    """

    operation: str
    length: int
    flops: float
    num_bytes: float
    contestants: dict[str, Contestant] = field(default_factory=dict[str, Contestant])
    skipped: dict[str, str] = field(default_factory=dict[str, str])


class Arena:
    """Makes the contests of one preset on one device.

    Args:
        config: sizes.
        length: tokens.
        device, dtype: of the inputs.
        seed: of their random values.
    """

    def __init__(
        self, config: HydraConfig, length: int, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> None:
        self.config, self.length, self.device, self.dtype = config, length, device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def random(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """A normal tensor that takes a gradient."""
        values = torch.randn(*shape, generator=self.generator, device=self.device) * scale
        return values.to(self.dtype if dtype is None else dtype).requires_grad_()

    def contest(
        self,
        operation: str,
        run: Callable[[Backend], Tensor],
        leaves: tuple[Tensor, ...],
        *,
        flops: float,
        num_bytes: float,
        reference_elements: float = 0.0,
        package: str | None = None,
    ) -> Contest:
        """A contest between the backends that can run here."""
        made = Contest(operation, self.length, flops, num_bytes)
        for backend in BACKENDS:
            if backend == "auto":
                continue
            reason = unavailable(package or operation, backend, self.device, self.dtype)
            if backend == "reference" and reference_elements > REFERENCE_ELEMENTS:
                reason = f"would build an array of {reference_elements:.1e} numbers"
            if reason is not None:
                made.skipped[backend] = reason
                continue
            made.contestants[backend] = Contestant(_bound(run, backend), leaves)
        return made

    def peer(
        self,
        contest: Contest,
        name: str,
        module: str | None,
        make: Callable[[], Contestant],
        why_not: str = "",
    ) -> None:
        """Add what another library does for the same work, where it is installed and `why_not` is empty."""
        if module is not None and importlib.util.find_spec(module) is None:
            contest.skipped[name] = "not installed"
        elif why_not:
            contest.skipped[name] = why_not
        else:
            try:
                contest.contestants[name] = make()
            except torch.OutOfMemoryError:
                contest.skipped[name] = "out of memory"

    def all(self) -> Iterator[Contest]:
        """Every operation once."""
        yield self.ssd()
        yield self.state_passing()
        yield self.causal_conv()
        yield self.select_blocks()
        yield self.sparse_attention()
        yield self.chunk_moe()
        yield self.product_key()
        yield self.memory_read()
        yield self.workspace_read()

    def ssd_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, dt, A, B and C of `ssd`, with step sizes as a fresh Mamba-2 has them."""
        c, L = self.config, self.length
        H, P, N, G = c.ssm_num_heads, c.ssm_head_dim, c.ssm_state_size, c.ssm_num_groups
        x, B, C = self.random(1, L, H, P), self.random(1, L, G, N), self.random(1, L, G, N)
        dt = F.softplus(self.random(1, L, H, dtype=torch.float32).detach() - 4).requires_grad_()
        A = (-torch.linspace(1, 16, H, device=self.device)).requires_grad_()
        return x, dt, A, B, C

    def ssd(self) -> Contest:
        """The state-space recurrence, against mamba_ssm's kernel (a backend) and fla's nearest, simple_gla."""
        c, L = self.config, self.length
        H, P, N, G, T = c.ssm_num_heads, c.ssm_head_dim, c.ssm_state_size, c.ssm_num_groups, c.ssm_chunk_size
        x, dt, A, B, C = leaves = self.ssd_inputs()
        made = self.contest(
            "ssd",
            lambda backend: ssd(x, dt, A, B, C, chunk_size=T, backend=backend).y,
            leaves,
            flops=L * (H * (4 * P * N + 2 * T * P) + G * 2 * T * N),
            num_bytes=_size(x, B, C, dt) + _size(x),
        )

        def fla() -> Contestant:
            from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

            q, k = (t.detach().expand(-1, -1, H, -1).contiguous().requires_grad_() for t in (C, B))
            v = (x.detach() * dt.detach()[..., None].to(x.dtype)).requires_grad_()
            g = (dt.detach() * A.detach()).requires_grad_()
            return Contestant(lambda: chunk_simple_gla(q, k, v, g=g, scale=1.0)[0], (q, k, v, g))

        self.peer(made, "fla simple_gla", "fla", fla)
        return made

    def state_passing(self) -> Contest:
        """The recurrence over chunks alone, at the size of the workspace."""
        c, chunks = self.config, math.ceil(self.length / self.config.workspace_chunk_size)
        S, V = c.workspace_num_slots, c.workspace_slot_size
        update = self.random(1, chunks, S, V, dtype=torch.float32)
        decay = (-torch.rand(1, chunks, S, device=self.device)).requires_grad_()
        initial = self.random(1, S, V, dtype=torch.float32)
        return self.contest(
            "state_passing",
            lambda backend: state_passing(update, decay, initial, backend=backend)[0],
            (update, decay, initial),
            flops=2 * update.numel(),
            num_bytes=2 * _size(update) + _size(decay, initial),
        )

    def causal_conv(self) -> Contest:
        """The short convolution, against torch's depthwise `conv1d`."""
        c, L, W = self.config, self.length, self.config.ssm_conv_kernel
        D = c.ssm_inner_size + 2 * c.ssm_num_groups * c.ssm_state_size
        x, weight, bias = self.random(1, L, D), self.random(D, W), self.random(D)
        made = self.contest(
            "causal_conv",
            lambda backend: causal_conv(x, weight, bias, activation="silu", backend=backend)[0],
            (x, weight, bias),
            flops=2 * W * L * D,
            num_bytes=2 * _size(x),
        )

        def conv1d() -> Contestant:
            def run() -> Tensor:
                padded = F.pad(x.transpose(1, 2), (W - 1, 0))
                return F.silu(F.conv1d(padded, weight[:, None], bias, groups=D)).transpose(1, 2)

            return Contestant(run, (x, weight, bias))

        self.peer(made, "torch conv1d", None, conv1d)
        return made

    def attention_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """q, k, v, the blocks that each tile's first token selects, and the options of `sparse_attention`."""
        c, L, d = self.config, self.length, self.config.attention_head_dim
        heads = (c.attention_num_heads, c.attention_num_kv_heads, c.attention_num_kv_heads)
        q, k, v = (self.random(1, L, count, d) for count in heads)
        options: dict[str, Any] = {"window": c.attention_window, "block_size": c.attention_block_size}
        size = c.attention_block_size
        chosen, _ = select_blocks(
            q.detach()[:, ::size],
            block_means(k.detach(), block_size=size, backend="torch"),
            **options,
            num_selected=c.attention_num_selected,
            serves=size,
            backend="torch",
        )
        return q, k, v, chosen.repeat_interleave(size, dim=1)[:, :L].contiguous(), options

    def select_blocks(self) -> Contest:
        """The choice of blocks by the first token of each tile."""
        c = self.config
        q, k, _, _, options = self.attention_inputs()
        size = c.attention_block_size
        first, means = q.detach()[:, ::size], block_means(k.detach(), block_size=size, backend="torch")

        def run(backend: Backend) -> Tensor:
            return select_blocks(
                first, means, **options, num_selected=c.attention_num_selected, serves=size, backend=backend
            )[1]

        tiles, blocks = first.shape[1], means.shape[1]
        return self.contest(
            "select_blocks",
            run,
            (),
            flops=2 * tiles * blocks * c.attention_num_heads * c.attention_head_dim,
            num_bytes=_size(first, means),
        )

    def sparse_attention(self) -> Contest:
        """Window, sink and selected blocks, against dense causal attention and FlexAttention with the same mask."""
        c, L = self.config, self.length
        q, k, v, blocks, options = self.attention_inputs()
        size = c.attention_block_size
        most = c.attention_window + (c.attention_num_selected + 1) * size
        seen = float(torch.arange(1, L + 1).clamp(max=most).sum())
        made = self.contest(
            "sparse_attention",
            lambda backend: sparse_attention(q, k, v, blocks, **options, backend=backend).y,
            (q, k, v),
            flops=4 * seen * c.attention_num_heads * c.attention_head_dim,
            num_bytes=2 * _size(q) + _size(k, v),
            reference_elements=float(L) * L * c.attention_num_heads,
        )

        def dense() -> Contestant:
            def run() -> Tensor:
                query, key, value = (t.transpose(1, 2) for t in (q, k, v))
                return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

            return Contestant(run, (q, k, v))

        def flex() -> Contestant:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            allowed = _allowed_blocks(blocks[:, ::size], math.ceil(L / size))  # [H_kv, tiles, blocks]
            group = q.shape[2] // k.shape[2]
            window = c.attention_window

            def mask(_b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return (i >= j) & ((i - j < window) | allowed[h // group, i // size, j // size])

            # Compiled, it never holds the mask of all pairs.
            block_mask = create_block_mask(
                mask, 1, q.shape[2], L, L, device=str(self.device), BLOCK_SIZE=128, _compile=True
            )
            compiled: Any = torch.compile(flex_attention)

            def run() -> Tensor:
                heads_first = (t.transpose(1, 2) for t in (q, k, v))
                return compiled(*heads_first, block_mask=block_mask, enable_gqa=True)

            return Contestant(run, (q, k, v))

        self.peer(made, "dense SDPA", None, dense)
        on_cpu = "" if self.device.type == "cuda" else "has no backward pass on a CPU"
        self.peer(made, "FlexAttention", None, flex, on_cpu)
        return made

    def chunk_moe(self) -> Contest:
        """Experts, against one dense product of equal FLOPs and `grouped_mm` with its sort and its permutes."""
        c, L = self.config, self.length
        D, Fh, E, K, T = (
            c.hidden_size, c.moe_hidden_size, c.moe_num_experts, c.moe_top_k, c.moe_chunk_size,
        )  # fmt: skip
        chunks = math.ceil(L / T)
        x = self.random(1, L, D)
        gate_up, down = self.random(E, 2 * Fh, D, scale=D**-0.5), self.random(E, D, Fh, scale=Fh**-0.5)
        scores = torch.rand(1, chunks, E, generator=self.generator, device=self.device)
        experts = scores.topk(K, dim=-1).indices
        weights = self.random(1, L, K)
        leaves = (x, weights, gate_up, down)
        made = self.contest(
            "chunk_moe",
            lambda backend: chunk_moe(x, experts, weights, gate_up, down, chunk_size=T, backend=backend),
            leaves,
            flops=6 * L * K * D * Fh,
            num_bytes=2 * _size(x) + _size(gate_up, down),
        )

        def dense() -> Contestant:
            wide = x.detach().repeat(1, K, 1)[0].requires_grad_()
            one_up, one_down = gate_up.detach()[0].requires_grad_(), down.detach()[0].requires_grad_()

            def run() -> Tensor:
                gate, up = F.linear(wide, one_up).chunk(2, dim=-1)
                return F.linear(F.silu(gate) * up, one_down)

            return Contestant(run, (wide, one_up, one_down))

        def grouped() -> Contestant:
            expert_of = experts.repeat_interleave(T, dim=1)[0, :L].flatten()

            def run() -> Tensor:
                order = expert_of.argsort(stable=True)
                ends = torch.bincount(expert_of, minlength=E).cumsum(0).to(torch.int32)
                rows = x[0][order // K]
                gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
                out = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
                out = out * weights.reshape(-1, 1)[order]
                return torch.zeros_like(x[0]).index_add(0, order // K, out)

            return Contestant(run, leaves)

        self.peer(made, "dense GEMM", None, dense)
        self.peer(made, "grouped_mm", None, grouped)
        return made

    def product_key(self) -> Contest:
        """Search, softmax and read of the memory, as the model does it."""
        c, L = self.config, self.length
        n1, n2 = c.memory_num_keys
        H, d, K = c.memory_num_heads, c.memory_key_size, c.memory_top_k
        assert c.memory_value_size is not None
        query = self.random(1, L, H, 2 * d, dtype=torch.float32)
        keys1, keys2 = self.random(H, n1, d, dtype=torch.float32), self.random(H, n2, d, dtype=torch.float32)
        values = self.random(n1 * n2, c.memory_value_size)

        def run(backend: Backend) -> Tensor:
            addresses, scores = product_key_topk(query, keys1, keys2, top_k=K, backend=backend)
            weights = scores.softmax(dim=-1).to(values.dtype)
            return memory_read(addresses, weights, values, backend=backend)

        return self.contest(
            "product_key",
            run,
            (query, keys1, keys2, values),
            flops=2 * L * H * ((n1 + n2) * d + K * c.memory_value_size),
            num_bytes=_size(query, keys1, keys2)
            + L * (H * K + 1) * c.memory_value_size * values.element_size(),
            reference_elements=float(L) * H * n1 * n2,
        )

    def memory_read(self) -> Contest:
        """The weighted gather of value rows, against `F.embedding_bag`."""
        c, L = self.config, self.length
        n1, n2 = c.memory_num_keys
        shape = (1, L, c.memory_num_heads, c.memory_top_k)
        assert c.memory_value_size is not None
        addresses = torch.randint(n1 * n2, shape, generator=self.generator, device=self.device)
        weights, values = self.random(*shape), self.random(n1 * n2, c.memory_value_size)
        made = self.contest(
            "memory_read",
            lambda backend: memory_read(addresses, weights, values, backend=backend),
            (weights, values),
            flops=2 * addresses.numel() * c.memory_value_size,
            num_bytes=(addresses.numel() + L) * c.memory_value_size * values.element_size(),
            reference_elements=float(addresses.numel()) * c.memory_value_size,
            package="product_key",
        )

        def bag() -> Contestant:
            flat, of_bag = addresses.flatten(0, 1).flatten(1), weights.flatten(0, 1).flatten(1)
            return Contestant(
                lambda: F.embedding_bag(flat, values, per_sample_weights=of_bag, mode="sum"),
                (weights, values),
            )

        lacks_gradient = self.device.type == "cuda" and self.dtype == torch.bfloat16
        why_not = "has no gradient of bfloat16 weights on CUDA" if lacks_gradient else ""
        self.peer(made, "F.embedding_bag", None, bag, why_not)
        return made

    def workspace_read(self) -> Contest:
        """What tokens read from the slots."""
        c, L = self.config, self.length
        T, S, V = c.workspace_chunk_size, c.workspace_num_slots, c.workspace_slot_size
        address = self.random(1, L, S).detach().softmax(dim=-1).requires_grad_()
        gate = torch.rand(1, L, 1, device=self.device, dtype=self.dtype).requires_grad_()
        slots = self.random(1, math.ceil(L / T), S, V)
        return self.contest(
            "workspace_read",
            lambda backend: workspace_read(address, gate, slots, chunk_size=T, backend=backend),
            (address, gate, slots),
            flops=2 * L * S * V,
            num_bytes=_size(address, slots) + L * V * slots.element_size(),
        )


def _bound(run: Callable[[Backend], Tensor], backend: Backend) -> Run:
    return lambda: run(backend)


def _size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _allowed_blocks(chosen: Tensor, num_blocks: int) -> Tensor:
    """[H_kv, tiles, blocks] True for the sink and the blocks that a tile selects; `chosen` [1, tiles, H_kv, K]."""
    per_head = chosen[0].transpose(0, 1)
    allowed = torch.zeros(*per_head.shape[:2], num_blocks + 1, dtype=torch.bool, device=chosen.device)
    allowed.scatter_(-1, torch.where(per_head < 0, num_blocks, per_head), True)
    allowed[..., 0] = True
    return allowed[..., :num_blocks]
