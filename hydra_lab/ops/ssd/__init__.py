"""Structured state-space duality: the Mamba-2 recurrence, whole sequences and single steps.

Shape suffixes: B rows, L positions, C chunks, H heads, G groups of heads, P head dimension, N state dimension,
M any number of values that share a decay.
"""

from torch import Tensor
from torch import bool as torch_bool  # the package's own `torch` module takes the name `torch`

from hydra_lab.ops.backend import Backend, implementation
from hydra_lab.ops.checks import check_shape
from hydra_lab.ops.ssd.output import SSDOutput as SSDOutput

__all__ = ["SSDOutput", "ssd", "ssd_step", "state_passing"]


def ssd(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    *,
    D: Tensor | None = None,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_size: int = 64,
    squared_norms: bool = False,
    chunk_states: bool = False,
    backend: Backend | None = None,
) -> SSDOutput:
    """The state-space recurrence `h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T`, `y_t = h_t C_t + D x_t`.

    Source: Dao and Gu 2024 (arXiv 2405.21060), section 6. A position with `dt = 0` leaves the state untouched:
    that is how padding is expressed.

    Args:
        x_BLHP: [B, L, H, P] inputs, L >= 1.
        dt_BLH: [B, L, H] step sizes, after softplus (not negative).
        A_H: [H] continuous-time decay rates, negative.
        B_BLGN: [B, L, G, N] input projections; head h belongs to group `h // (H / G)`.
        C_BLGN: [B, L, G, N] output projections.
        D: [H] skip weights, or None for no skip.
        log_decay: [B, L, H] logarithm of what is kept of the state at each position, in place of `dt * A`: this is
            how an edited decay enters. None for `dt * A`.
        initial_state: [B, H, P, N] state before the first position, or None for zeros.
        starts: [B, L] bool, True where a new document begins: nothing is kept of the state before it, whatever the
            decay there, and no gradient flows to that decay. None for one document, which goes on from
            `initial_state`.
        chunk_size: positions computed in parallel; it changes the speed and the chunks of `squared_norms` and
            `chunk_states`, not `y`.
        squared_norms: whether to return the squared norm of each head's state at the chunks' ends.
        chunk_states: whether to return the states themselves.
        backend: see `hydra_lab.ops.backend`; None for what `use_backend` says, else the fastest measured one.

    Returns:
        Outputs `y` in the dtype of `x_BLHP`, and states and norms in float32 (float64 if an input is).

    Raises:
        ValueError: shapes that do not fit, H not a multiple of G, chunk_size < 1, or a backend that cannot run this.
    """
    check_shape("x_BLHP", x_BLHP, (None, None, None, None), "[B, L, H, P]")
    rows, length, heads, head_dim = x_BLHP.shape
    check_shape("B_BLGN", B_BLGN, (rows, length, None, None), "[B, L, G, N]")
    groups, state_dim = B_BLGN.shape[2:]
    check_shape("C_BLGN", C_BLGN, (rows, length, groups, state_dim), "[B, L, G, N]")
    check_shape("dt_BLH", dt_BLH, (rows, length, heads), "[B, L, H]")
    _check_heads(A_H, D, initial_state, rows, heads, groups, head_dim, state_dim)
    if log_decay is not None:
        check_shape("log_decay", log_decay, (rows, length, heads), "[B, L, H]")
    if starts is not None:
        check_shape("starts", starts, (rows, length), "[B, L]")
        if starts.dtype != torch_bool:
            raise ValueError(f"starts must be bool, got {starts.dtype}")
    if length < 1:
        raise ValueError(f"x_BLHP must have at least one position, got shape {list(x_BLHP.shape)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    run = implementation("ssd", backend, x_BLHP).ssd
    sequences = (x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D, log_decay, initial_state, starts)
    return run(*sequences, chunk_size, squared_norms, chunk_states)


def ssd_step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `ssd`: what decoding runs for each token.

    Args:
        x_BHP: [B, H, P] input.
        dt_BH: [B, H] step sizes, after softplus.
        A_H: [H] decay rates, negative.
        B_BGN: [B, G, N] input projection.
        C_BGN: [B, G, N] output projection.
        state: [B, H, P, N] state before the step; it is not changed.
        D: [H] skip weights, or None.
        backend: as in `ssd`.

    Returns:
        (y [B, H, P] in the dtype of `x_BHP`, the new state [B, H, P, N]).

    Raises:
        ValueError: shapes that do not fit, H not a multiple of G, or a backend that cannot run this.
    """
    check_shape("x_BHP", x_BHP, (None, None, None), "[B, H, P]")
    rows, heads, head_dim = x_BHP.shape
    check_shape("B_BGN", B_BGN, (rows, None, None), "[B, G, N]")
    groups, state_dim = B_BGN.shape[1:]
    check_shape("C_BGN", C_BGN, (rows, groups, state_dim), "[B, G, N]")
    check_shape("dt_BH", dt_BH, (rows, heads), "[B, H]")
    _check_heads(A_H, D, state, rows, heads, groups, head_dim, state_dim, state_name="state")
    return implementation("ssd", backend, x_BHP).ssd_step(x_BHP, dt_BH, A_H, B_BGN, C_BGN, state, D)


def state_passing(
    update_BCHM: Tensor, log_decay_BCH: Tensor, initial_BHM: Tensor, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence over chunks `M_{c+1} = exp(log_decay_c) M_c + update_c`.

    Args:
        update_BCHM: [B, C, H, M] what each chunk adds, C >= 1.
        log_decay_BCH: [B, C, H] logarithm of what is kept over each chunk, at most 0.
        initial_BHM: [B, H, M] the value that enters the first chunk.
        backend: as in `ssd`; mamba_ssm has no such function.

    Returns:
        (entering [B, C, H, M], the value that each chunk starts from; final [B, H, M], the one after the last).

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run this.
    """
    check_shape("update_BCHM", update_BCHM, (None, None, None, None), "[B, C, H, M]")
    rows, chunks, heads, values = update_BCHM.shape
    check_shape("log_decay_BCH", log_decay_BCH, (rows, chunks, heads), "[B, C, H]")
    check_shape("initial_BHM", initial_BHM, (rows, heads, values), "[B, H, M]")
    if chunks < 1:
        raise ValueError(f"update_BCHM must have at least one chunk, got shape {list(update_BCHM.shape)}")
    run = implementation("state_passing", backend, update_BCHM).state_passing
    return run(update_BCHM, log_decay_BCH, initial_BHM)


def _check_heads(
    A_H: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    rows: int,
    heads: int,
    groups: int,
    head_dim: int,
    state_dim: int,
    *,
    state_name: str = "initial_state",
) -> None:
    check_shape("A_H", A_H, (heads,), "[H]")
    if D is not None:
        check_shape("D", D, (heads,), "[H]")
    if state is not None:
        check_shape(state_name, state, (rows, heads, head_dim, state_dim), "[B, H, P, N]")
    if groups < 1 or heads % groups != 0:
        raise ValueError(
            f"the number of heads must be a multiple of the number of groups, got {heads} and {groups}"
        )
