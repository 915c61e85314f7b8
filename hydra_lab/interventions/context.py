"""Put changes on a model and take them off again."""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from hydra_lab.interventions.base import Intervention
from hydra_lab.interventions.text import parse
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM

_in_force: "weakref.WeakKeyDictionary[nn.Module, tuple[Intervention, ...]]" = weakref.WeakKeyDictionary()


@contextmanager
def intervened(model: HydraForCausalLM, *changes: str | Intervention) -> Iterator[tuple[Intervention, ...]]:
    """Within the context, `model` runs with these changes, made in the order given; then it is what it was.

    Contexts may be nested; the outer one's changes come first. The model's lock (`hydra_lab.locks`) is held meanwhile.

    Args:
        changes: interventions, or texts that `parse` reads.

    Yields:
        The interventions.

    Raises:
        ValueError: a text is not in the vocabulary, or the model lacks what a change is for. Nothing is changed then.
    """
    wanted = tuple(
        each
        for change in changes
        for each in ((change,) if isinstance(change, Intervention) else parse(change))
    )
    placed = [(change, block) for change in wanted for block in change.blocks_in(model.config)]
    with model_lock(model), ExitStack() as stack:
        for change, block in placed:
            stack.enter_context(change.on(model, block))
        outer = in_force(model)
        _in_force[model] = (*outer, *wanted)
        stack.callback(_in_force.__setitem__, model, outer)
        yield wanted


def in_force(model: nn.Module) -> tuple[Intervention, ...]:
    """The interventions that `model` runs with at the moment, in order."""
    return _in_force.get(model, ())
