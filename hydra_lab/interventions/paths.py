"""Changes to a whole path of a block, whichever path it is."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar

from hydra_lab.interventions.arguments import number
from hydra_lab.interventions.base import Intervention
from hydra_lab.interventions.hooks import edited
from hydra_lab.modeling import HydraForCausalLM
from hydra_lab.taps import PATHS


@dataclass(frozen=True, kw_only=True)
class _PathChange(Intervention):
    def __post_init__(self) -> None:
        if self.path not in PATHS:
            raise ValueError(f"path {self.path!r} is not one of {', '.join(PATHS)}")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class CutPath(_PathChange):
    """The path adds nothing to the residual stream; its decisions are still made and can be read."""

    action: ClassVar[str] = "cut"

    def on(self, model: HydraForCausalLM, block: int) -> AbstractContextManager[None]:
        return model.cut(self.path, [block])


@dataclass(frozen=True, kw_only=True)
class ScalePath(_PathChange):
    """What the path adds to the residual stream is multiplied.

    Attributes:
        factor: any finite number; negative turns the contribution round.
    """

    action: ClassVar[str] = "scale"
    factor: Annotated[float, number()]

    @contextmanager
    def on(self, model: HydraForCausalLM, block: int) -> Iterator[None]:
        contribution = model.model.blocks[block].contributions[self.path]
        with edited(contribution, lambda update_BLD: update_BLD * self.factor):
            yield
