"""Path patching: change what one path hears from another, and nothing else (Wang et al. 2022, arXiv 2211.00593;
Goldowsky-Dill et al. 2023, arXiv 2304.05969).

Every path of a block reads `norm(residual stream)`, and the stream is the sum of what the embedding and the earlier
blocks' paths put into it. So the direct edge from a sender to a receiver is changed by letting the receiver read
`norm(residual + sender's clean contribution - its own one of this run)`.

Shape suffixes: N pairs of texts, L positions, D hidden size, S senders, R receivers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hydra_lab.attribution.patching import Metric, measured, recovered, run_and_keep
from hydra_lab.attribution.progress import Report, counting
from hydra_lab.attribution.sites import Site
from hydra_lab.capture.record import check_inputs
from hydra_lab.locks import model_lock
from hydra_lab.modeling import HydraForCausalLM

LOGITS = "logits"
"""The receiver that is not a path: the final norm and the head."""

Group = str | Sequence[str]


@dataclass(frozen=True, eq=False)
class PathPatching:
    """A metric of the corrupted run while receivers hear what senders said in the clean run.

    Axes: S senders, R receivers, N pairs of texts.

    Attributes:
        senders: [S] names; those of a group are joined by " + ".
        receivers: [R] likewise.
        value: [S, R, N] the metric, in its own unit; NaN where no sender comes before a receiver.
        clean, corrupted: [N] the metric of the two runs as they are.
    """

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    value: NDArray[np.float64]
    clean: NDArray[np.float64]
    corrupted: NDArray[np.float64]

    def recovery(self) -> NDArray[np.float64]:
        """[S, R] where the mean over the pairs lies between the corrupted run (0) and the clean one (1); NaN where the
        two do not differ, or there is no edge."""
        return recovered(self.value, self.clean, self.corrupted)


def path_patching(
    model: HydraForCausalLM,
    clean: Tensor,
    corrupted: Tensor,
    metric: Metric,
    senders: Sequence[Group],
    receivers: Sequence[Group],
    *,
    mask: Tensor | None = None,
    progress: Report = True,
) -> PathPatching:
    """Effect of the direct edge from each sender to each receiver.

    The run is the corrupted one. A receiver reads the stream as it is there, but for the sender's contribution, which
    is the clean run's; what the receiver then computes goes on through the model as ever. The paths of one block do
    not hear each other. With every later path and the logits as one group of receivers this is activation patching
    of the sender.

    Args:
        clean, corrupted: [N, L] token ids of N pairs of texts, equally long token by token.
        metric: logits [N, L, V] of the patched run -> [N].
        senders: "embedding", or paths such as "layers.1.ssm"; a list of names is patched together.
        receivers: paths, or "logits"; a list of names is patched together.
        mask: [N, L] nonzero where a token is present, the same for both texts of a pair; None: all.
        progress: True for a bar on standard error, or a function that receives the numbers of edges done and to do.

    Raises:
        ValueError: texts of different shapes, a name that is no path, or a metric that does not give one number per
            pair.
    """
    clean, mask = check_inputs(model, clean, mask)
    corrupted, _ = check_inputs(model, corrupted, mask)
    if clean.shape != corrupted.shape:
        raise ValueError(
            f"the texts of a pair must be equally long, got {list(clean.shape)} and {list(corrupted.shape)}"
        )
    sending = [[_sender(model, name) for name in _names(group)] for group in senders]
    receiving = [[_receiver(model, name) for name in _names(group)] for group in receivers]
    everyone = {sender.name: sender for group in sending for sender in group}
    value = np.full((len(sending), len(receiving), len(clean)), np.nan)
    with (
        model_lock(model),
        torch.no_grad(),
        counting("path patching", len(sending) * len(receiving), progress) as advance,
    ):
        said, clean_logits = run_and_keep(model, list(everyone.values()), clean, mask)
        of_corrupted = model(input_ids=corrupted, attention_mask=mask, use_cache=False).logits
        for s, senders_of_group in enumerate(sending):
            for r, receivers_of_group in enumerate(receiving):
                if min(each.depth for each in senders_of_group) < max(
                    each.depth for each in receivers_of_group
                ):
                    edges = _Edges(model, senders_of_group, receivers_of_group, said)
                    value[s, r] = measured(metric, edges.run(corrupted, mask))
                advance(1)
    return PathPatching(
        senders=tuple(" + ".join(_names(group)) for group in senders),
        receivers=tuple(" + ".join(_names(group)) for group in receivers),
        value=value,
        clean=measured(metric, clean_logits),
        corrupted=measured(metric, of_corrupted),
    )


@dataclass(frozen=True)
class _Receiver:
    """A path by block and name; `path` None: the logits."""

    depth: int
    path: str | None


class _Edges:
    """The edges from senders to receivers, while they carry what the senders said in the clean run."""

    def __init__(
        self,
        model: HydraForCausalLM,
        senders: Sequence[Site],
        receivers: Sequence[_Receiver],
        said: dict[str, Tensor],
    ) -> None:
        self.model, self.senders, self.receivers, self.said = model, senders, receivers, said
        self.differences: dict[
            int, Tensor
        ] = {}  # by block of the sender: clean contributions minus this run's
        self.residual = torch.empty(0)  # what entered the block that is under way

    def run(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Logits [N, L, V]."""
        handles = [sender.hook(self._note_difference(sender)) for sender in self.senders]
        for receiver in self.receivers:
            handles += self._listen(receiver)
        try:
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()

    def _note_difference(self, sender: Site) -> Callable[[Tensor], None]:
        def note(update_NLD: Tensor) -> None:
            difference = self.said[sender.name] - update_NLD
            earlier = self.differences.get(sender.depth)
            self.differences[sender.depth] = difference if earlier is None else earlier + difference

        return note

    def _heard(self, depth: int) -> Tensor | float:
        """What the senders before block `depth` add to the stream that a receiver there reads."""
        return sum((each for sender, each in self.differences.items() if sender < depth), 0.0)

    def _listen(self, receiver: _Receiver) -> list[RemovableHandle]:
        if receiver.path is None:

            def before_norm(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
                return (args[0] + self._heard(receiver.depth),)

            return [self.model.model.norm.register_forward_pre_hook(before_norm)]
        block = self.model.model.blocks[receiver.depth]

        def before_block(_module: Any, args: tuple[Any, ...]) -> None:
            self.residual = args[0]

        def before_path(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (block.norm(self.residual + self._heard(receiver.depth)), *args[1:])

        return [
            block.register_forward_pre_hook(before_block),
            getattr(block, receiver.path).register_forward_pre_hook(before_path),
        ]


def _names(group: Group) -> list[str]:
    return [group] if isinstance(group, str) else list(group)


def _sender(model: HydraForCausalLM, name: str) -> Site:
    site = Site.find(model, name)
    if site.kind not in ("embedding", "contribution"):
        raise ValueError(f'sender {name!r} is no path: give "embedding" or a path such as "layers.0.ssm"')
    return site


def _receiver(model: HydraForCausalLM, name: str) -> _Receiver:
    if name == LOGITS:
        return _Receiver(len(model.model.blocks), None)
    site = Site.find(model, name)
    if site.kind != "contribution":
        raise ValueError(f'receiver {name!r} is no path: give "logits" or a path such as "layers.1.moe"')
    return _Receiver(site.depth, name.rsplit(".", 1)[1])
