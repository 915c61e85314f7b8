"""Changes to the blocks that sparse attention selects, at the tap `attention.selection`.

They concern the selection alone: what lies in a query's window or in block 0, the sink, stays visible to it. Queries
select per key-value head; a change holds for all of them.

Shape suffixes: B rows, L positions, H key-value heads, K selected blocks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hydra_lab.config import HydraConfig
from hydra_lab.interventions.arguments import Indices
from hydra_lab.interventions.base import Intervention
from hydra_lab.interventions.hooks import edited, noted
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import Selection


@dataclass(frozen=True, kw_only=True)
class ForbidBlocks(Intervention):
    """A query that selects one of these blocks selects nothing in its place (attention knockout, arXiv 2304.14767).

    Attributes:
        blocks: blocks of `attention_block_size` tokens, counted from a row's first token.
    """

    action: ClassVar[str] = "forbid"
    path: str = field(default="attention", init=False)
    blocks: Indices

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        def without(selection: Selection) -> Selection:
            blocks = torch.tensor(self.blocks, dtype=torch.long, device=selection.blocks.device)
            is_forbidden_BLHK = torch.isin(selection.blocks, blocks)
            return Selection(
                selection.blocks.masked_fill(is_forbidden_BLHK, -1),
                selection.scores.masked_fill(is_forbidden_BLHK, -torch.inf),
            )

        with edited(model.model.blocks[block].attention.selection, without):
            yield


@dataclass(frozen=True, kw_only=True)
class SelectBlocks(Intervention):
    """Every query selects these blocks and no others, each as soon as it lies wholly before the query's own block.

    Attributes:
        blocks: at most `attention_num_selected`, counted from a row's first token; none selects nothing. The scores of
            blocks that a query would not have selected by itself are NaN: they are not computed.
    """

    action: ClassVar[str] = "select"
    path: str = field(default="attention", init=False)
    blocks: Indices

    def check_arguments(self, config: HydraConfig) -> None:
        if len(self.blocks) > config.attention_num_selected:
            raise self.wrong(
                f"a query of this model selects at most {config.attention_num_selected} blocks, "
                f"got {list(self.blocks)}"
            )

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        path = model.model.blocks[block].attention

        def only(selection: Selection) -> Selection:
            size, device = selection.blocks.shape[-1], selection.blocks.device
            listed_K = torch.tensor((list(self.blocks) + [-1] * size)[:size], dtype=torch.long, device=device)
            own_BL11 = (passage.positions() // path.block_size)[..., None, None]
            blocks_BLHK = torch.where(listed_K < own_BL11, listed_K, -1).expand_as(selection.blocks)
            is_same_BLHKK = blocks_BLHK[..., None] == selection.blocks[..., None, :]
            scores_BLHK = torch.where(is_same_BLHKK, selection.scores[..., None, :], 0.0).sum(dim=-1)
            scores_BLHK = scores_BLHK.where(is_same_BLHKK.any(dim=-1), torch.nan)
            return Selection(blocks_BLHK, scores_BLHK.masked_fill(blocks_BLHK < 0, -torch.inf))

        with noted(path) as passage, edited(path.selection, only):
            yield
