"""Changes to the state of a state-space path, at the taps `ssm.states` and `ssm.readout`, and to its decay.

Shape suffixes: B rows, C chunks of the piece, H heads, P channels of a head, N state size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from hydra_lab.config import HydraConfig
from hydra_lab.interventions.arguments import Index, State, number, one_of, shape
from hydra_lab.interventions.base import Intervention
from hydra_lab.interventions.hooks import edited, noted
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import ChunkStates, requested


@dataclass(frozen=True, kw_only=True)
class PatchState(Intervention):
    """At the end of a chunk the state is another one, such as `capture_state` takes from another run.

    Attributes:
        position: token after which the state stands, the last of a chunk (`ssm_chunk_size`), counted from a row's
            first token. Rows that end before it do not change.
        state: [H, P, N] of all heads, or [P, N] of one.
        head: the head that a [P, N] state is for.
        kind: "write" puts the state there: every later token goes on from it. "read" changes what that one token
            reads and leaves the recurrence as it was.

    A written state travels beside the measured ones until the piece ends (`hydra_lab.nn.state_edits`): later tokens
    read it, but for the later chunks of the same pass the taps `ssm.states` and `ssm.state` go on reporting what the
    run would have held without it.
    """

    action: ClassVar[str] = "patch"
    path: str = field(default="ssm", init=False)
    position: Index
    state: State
    head: Index | None = None
    kind: Annotated[str, one_of("write", "read")] = "write"

    def check_arguments(self, config: HydraConfig) -> None:
        size = config.ssm_chunk_size
        if (self.position + 1) % size:
            before, after = (size * (self.position // size + more) - 1 for more in (0, 1))
            ends = f"{before} and {after}" if before >= 0 else str(after)
            raise self.wrong(
                f"position {self.position} is not the last of a chunk of {size} tokens; near it: {ends}"
            )
        expected = [config.ssm_num_heads, config.ssm_head_dim, config.ssm_state_size]
        if self.head is not None:
            self.check_below("head", self.head, config.ssm_num_heads)
            expected = expected[1:]
        if shape(self.state) != expected:
            whose = "all heads" if self.head is None else "one head"
            raise self.wrong(f"state has shape {shape(self.state)}, that of {whose} is {expected}")

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        path = model.model.blocks[block].ssm
        tap = path.states if self.kind == "write" else path.readout
        heads = slice(None) if self.head is None else slice(self.head, self.head + 1)
        given = torch.tensor(self.state, dtype=torch.float32, device=path.A_log.device)

        def patched(measured: ChunkStates) -> ChunkStates:
            grid = passage.grid(path.chunk_size)
            chunk_BC = passage.chunk_indices(grid)
            ends_here_BC = grid.complete_BC & (chunk_BC == self.position // path.chunk_size)
            states_BCHPN = measured.states.clone()
            states_BCHPN[:, :, heads] = torch.where(
                ends_here_BC[..., None, None, None], given, states_BCHPN[:, :, heads]
            )
            return ChunkStates(states_BCHPN)

        with requested([tap]), noted(path) as passage, edited(tap, patched):
            yield


@dataclass(frozen=True, kw_only=True)
class ScaleDecay(Intervention):
    """The log decay `dt * A` of a head is multiplied at every token, so that its half-life is divided; what a token
    adds to the state stays as it is.

    Attributes:
        head: the head.
        factor: 0 (the head never forgets) or more; 1 changes nothing.
    """

    action: ClassVar[str] = "scale_decay"
    path: str = field(default="ssm", init=False)
    head: Index
    factor: Annotated[float, number(0.0)]

    def check_arguments(self, config: HydraConfig) -> None:
        self.check_below("head", self.head, config.ssm_num_heads)

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        # The tap `ssm.state` could carry this too, but it also carries norms that are measured before it is written.
        # `A_log` is shadowed during the path's own pass alone: the weights are never touched.
        path = model.model.blocks[block].ssm

        def shadow(_path: nn.Module, _inputs: Any) -> None:
            A_H = path.A_log.float()
            is_head_H = torch.arange(A_H.shape[0], device=A_H.device) == self.head
            log_factor = torch.tensor(self.factor, dtype=torch.float32, device=A_H.device).log()
            vars(path)["A_log"] = torch.where(is_head_H, A_H + log_factor, A_H)

        def uncover(_path: nn.Module, _inputs: Any, _output: Any) -> None:
            vars(path).pop("A_log", None)

        handles = [
            path.register_forward_pre_hook(shadow),
            path.register_forward_hook(uncover, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def capture_state(
    model: HydraForCausalLM, input_ids: Tensor, block: int, position: int | None = None
) -> Tensor:
    """The state that a run leaves behind one of its tokens, to `PatchState` another run with.

    Interventions that are in force take part.

    Args:
        input_ids: [L] or [1, L] token ids, without padding.
        block: whose state.
        position: the token, any one; None for the last.

    Returns:
        [H, P, N] fp32.

    Raises:
        ValueError: there is no such block or token, or the ids are those of several rows.
    """
    ids = input_ids[None] if input_ids.ndim == 1 else input_ids
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ValueError(f"input_ids must be one row of tokens, [L] or [1, L], got {list(input_ids.shape)}")
    position = ids.shape[1] - 1 if position is None else position
    if not 0 <= position < ids.shape[1]:
        raise ValueError(f"position {position} is out of range: the row has tokens 0 to {ids.shape[1] - 1}")
    if block not in model.config.layers_with("ssm"):
        raise ValueError(f"there is no block {block}; blocks {model.config.layers_with('ssm')} have a state")
    tap = model.model.blocks[block].ssm.states
    seen: list[ChunkStates] = []

    def keep(_tap: nn.Module, _inputs: Any, decision: ChunkStates) -> None:
        seen.append(decision)

    with model_lock(model), requested([tap]), tap.register_forward_hook(keep):
        model(input_ids=ids[:, : position + 1].to(model.device), use_cache=False)
    return seen[-1].states[0, -1].clone()
